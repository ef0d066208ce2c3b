"""What a careful reader would ask about a fine-tuning run: warnings in plain words.

A reward that goes up is not yet a success. Reward hacking leaves traces that no optimisation aimed at: a judge that was
not optimised against loses confidence while the classifier gains it, samples move away from every real image, pixels
leave the range of an image, one class takes over. The distance of the *set* of samples to real data (MMD) is weaker
evidence: a reward may rightly ask for rare images. Real digits, resampled to be one standard deviation brighter, stand
already at twenty times the 95 % quantile of that distance; hence the large factor, and only a note. Their distance to
the nearest training digit moves by 2 %, and between the ten classes by at most 19 %: a third is not honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from implicit_diffusion.commands.finetune.result import Outcome, outside
from implicit_diffusion.commands.shared.formatting import number, percent

CAPTURED = 0.8  # share of the possible gain below which a run is called unfinished; ten Gaussian rows attain about 0.9
JUDGE_LOST = 0.05  # confidence that the judge may lose
GAP_GREW = 0.1  # by how much more the classifier may believe than the judge
AWAY = 1.3  # factor on the distance to the nearest real image
MMD_QUANTILES = 100.0  # MMD², in 95 % quantiles between two halves of the real data
OUTSIDE = 0.02  # more pixels than this newly outside [-1, 1]
MEMORISED = 0.05  # more samples than this newly at real training images
ONE_CLASS = 0.5  # share of one class
EXPORT = 0.1  # difference of the exported model's reward, in shares of the gain


@dataclass(frozen=True)
class Concern:
    """Something to know before using the result; a warning asks for action, a note explains."""

    warning: bool
    title: str
    text: str


def concerns(outcome: Outcome) -> list[Concern]:
    """All concerns, the warnings first."""
    found = [*_run(outcome), *_export(outcome), *_pixels(outcome), *_quality(outcome.summary)]
    return sorted(found, key=lambda concern: not concern.warning)


def _run(outcome: Outcome) -> list[Concern]:
    config, s, found = outcome.config, outcome.summary, []
    if s.get("worse"):
        found.append(Concern(True, "J rose" if s.get("j_before") is not None else "The reward fell", s["worse"]))
    stopped = s.get("stopped")
    if stopped:
        planned = f"after {s['updates']} of {config['updates']} updates"
        reached = "reached the target" in stopped
        found.append(Concern(not reached, "The run stopped early", f"It ended {planned}: {stopped}."))

    gain, error = s["reward_after"] - s["reward_before"], s["reward_gain_se"]
    if gain < -2 * error and not any(concern.title == "The reward fell" for concern in found):
        text = f"It is what fine-tuning was to raise, and changed by {number(gain, error, sign=True)}."
        found.append(Concern(True, "The reward fell", text))
    elif abs(gain) < 2 * error:
        text = f"The reward changed by {number(gain, error, sign=True)} (± 1 standard error), which may be chance."
        found.append(Concern(True, "No clear gain", text))

    captured, captured_se = s.get("captured"), s.get("captured_se") or 0.0
    if captured is not None and captured + 2 * captured_se < CAPTURED:
        text = (
            f"The run took {percent(captured, captured_se)} of the gain that this KL weight allows. More updates, "
            "another learning rate or a longer chain may get the rest; a larger KL weight asks for less."
        )
        found.append(Concern(True, "Much of the possible gain is left", text))
    elif captured is not None and captured_se > 0.05:
        text = f"The share of the possible gain is known to {percent(captured_se)} only: judge more --starts."
        found.append(Concern(False, "A rough number", text))
    if s.get("captured_unknown") and not s.get("worse"):
        found.append(Concern(False, "The captured share is unknown", s["captured_unknown"]))
    best = outcome.bound
    if best is not None and not best.trusted:
        text = (
            f"The bound rests on {best.effective_samples:.1f} effective samples per start: "
            "a few lucky trajectories decide it, and with it the captured share."
        )
        if abs(best.bias) > best.j_se:
            text += f" Made of half the trajectories of a start, it moves by {number(best.bias, sign=True, digits=2)}."
        found.append(Concern(True, "The bound is uncertain", text))

    target, kl = config.get("target_kl"), s.get("path_kl")
    if target is not None and kl is not None and kl - 2 * s["path_kl_se"] > 1.05 * target:
        text = f"The path KL is {number(kl, s['path_kl_se'])} nats, the target was {target:g}."
        found.append(Concern(True, "The KL is above its target", text))
    if target is not None and kl is not None and kl + 2 * s["path_kl_se"] < 0.95 * target:
        text = f"The path KL is {number(kl, s['path_kl_se'])} nats, the target was {target:g}: take more updates."
        found.append(Concern(False, "The KL is below its target", text))

    clipping = s.get("clipping")
    if clipping:
        text = (
            "The checkpoint was meant to be sampled with its pixels clipped at every step, which --no-clip switched "
            "off. On pretrained samples of the same noise that moved pixels by "
            f"{number(clipping['mean_absolute_change'], digits=2)} on average (at most "
            f"{number(clipping['largest_change'], digits=2)}), "
            "and the mean reward from "
            f"{number(clipping['reward_with_clipping'])} to {number(clipping['reward_without_clipping'])}."
        )
        found.append(Concern(False, "Clipping is off", text))
    return found


def _export(outcome: Outcome) -> list[Concern]:
    s = outcome.summary
    exported = s.get("reward_exported")
    if exported is None:
        return []
    difference, gain = exported - s["reward_after"], s["reward_after"] - s["reward_before"]
    if abs(difference) < max(EXPORT * abs(gain), 2 * s["exported_less_after_se"]):
        return []
    earned = number(exported, s["reward_exported_se"]), number(s["reward_after"], s["reward_after_se"])
    text = (
        f"model/ runs the trained network on every step of the chain and earns {earned[0]}; the chain that was trained "
        f"keeps the pretrained network where there is no noise and earns {earned[1]}."
    )
    if not s.get("pipeline_is_the_chain", True):
        text = (
            f"Diffusers cannot sample the chain that was trained, which earns {earned[1]}; model/ runs {s['pipeline']} "
            f"instead and earns {earned[0]}. `implicit-diffusion sample` draws from the trained chain."
        )
    return [Concern(True, "The exported model differs from the trained chain", text)]


def _pixels(outcome: Outcome) -> list[Concern]:
    before, after = map(outside, outcome.images) if outcome.images is not None else (0.0, 0.0)
    if after - before < OUTSIDE:
        return []
    text = (
        f"{percent(after)} of the pixels lie clearly outside [−1, 1], {percent(before)} did before. "
        "Image files cut them off, and with them a part of the reward."
    )
    return [Concern(True, "Pixels left the range of an image", text)]


def _quality(summary: dict[str, Any]) -> list[Concern]:
    before, after = summary.get("quality_before"), summary.get("quality_after")
    if not (before and after):
        return []
    found = []
    judge, network = ((before[key], after[key]) for key in ("judge_confidence", "classifier_confidence"))
    lost, widened = judge[0] - judge[1], (network[1] - judge[1]) - (network[0] - judge[0])
    if lost > JUDGE_LOST or widened > GAP_GREW:
        text = (
            f"A judge that was never optimised against is {percent(judge[1])} sure of the classes, {percent(judge[0])} "
            f"before; the classifier went from {percent(network[0])} to {percent(network[1])}. Raise --kl-weight."
        )
        found.append(Concern(True, "Reward hacking suspected: the judge lost confidence", text))
    if after["nearest_distance"] > AWAY * before["nearest_distance"]:
        text = (
            f"The nearest real digit is {number(after['nearest_distance'], digits=2)} away on average, "
            f"{number(before['nearest_distance'], digits=2)} before. Look at the samples; raise --kl-weight."
        )
        found.append(Concern(True, "Reward hacking suspected: samples left the real digits", text))
    quantile = after["mmd_reference"]["quantile_95"]
    if after["mmd"] > max(MMD_QUANTILES * quantile, 2 * before["mmd"]):
        text = (
            f"MMD² to real digits is {number(after['mmd'], digits=2)}, {number(before['mmd'], digits=2)} before; "
            f"chance explains up to {number(quantile, digits=2)}. A reward that asks for "
            "rare digits does this honestly, so look at single samples too."
        )
        found.append(Concern(False, "As a set, the samples are far from real digits", text))
    if after["memorised"] - before["memorised"] > MEMORISED:
        copies = percent(before["memorised"]), percent(after["memorised"])
        text = f"{copies[1]} of the samples are copies of training digits, {copies[0]} before."
        found.append(Concern(True, "The model recites", text))
    share = max(after["class_histogram"])
    digit = after["class_histogram"].index(share)
    if share > max(ONE_CLASS, 1.5 * before["class_histogram"][digit]):
        text = (
            f"{percent(share)} of the samples are classed as {digit}, {percent(before['class_histogram'][digit])} "
            "before. That is as it should be only if the reward asks for it."
        )
        found.append(Concern(False, "One class took over", text))
    return found
