"""What a careful reader would ask about a fine-tuning run: warnings in plain words.

A reward that goes up is not yet a success. Reward hacking leaves traces that no optimisation aimed at: a judge that was
not optimised against loses confidence while the classifier gains it, samples move away from every real image, pixels
leave the range of an image, one class becomes frequent. The distance of the *set* of samples to real data (MMD) is
weaker evidence: a reward may rightly ask for rare images. Real digits, resampled to be one standard deviation brighter,
already have twenty times the 95 % quantile of that distance; hence the large factor, and only a note. Their distance to
the nearest training digit changes by 2 %, and between the ten classes by at most 19 %: a change by a third is not
honest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from implicit_diffusion.commands.finetune.held_out_prompts import difference, prompts_in_words
from implicit_diffusion.commands.finetune.result import Result, outside
from implicit_diffusion.commands.shared.formatting import number, percent

CAPTURED = 0.8  # share of the possible gain below which a run is called unfinished; ten Gaussian rows attain about 0.9
ROUGH = 0.05  # standard error of that share above which it is called a rough number
JUDGE_LOST = 0.05  # confidence that the judge may lose
GAP_GREW = 0.1  # by how much more the classifier may believe than the judge
AWAY = 1.3  # factor on the distance to the nearest real image
MMD_QUANTILES = 100.0  # MMD², in 95 % quantiles between two halves of the real data
OUTSIDE = 0.02  # largest share of the pixels that may be newly outside [-1, 1]
MEMORISED = 0.05  # largest share of the samples that may be new copies of training images
ONE_CLASS = 0.5  # share of one class
EXPORT = 0.1  # difference of the exported model's reward, as a share of the gain

FELL = "The reward fell"


@dataclass(frozen=True)
class RunWarning:
    """Something to know before using the result.

    Args:
        serious: whether it asks for action; otherwise it is a note that explains.
        title: a few words.
        text: sentences.
    """

    serious: bool
    title: str
    text: str


def run_warnings(result: Result) -> list[RunWarning]:
    """All warnings, the serious ones first."""
    parts = (
        _worse,
        _stopped,
        _judges,
        _held_out_prompts,
        _gain,
        _captured,
        _bound,
        _target,
        _clipping,
        _export,
        _pixels,
        _quality,
    )
    return sorted((warning for part in parts for warning in part(result)), key=lambda warning: not warning.serious)


def _worse(result: Result) -> Iterator[RunWarning]:
    headline = result.summary.headline
    if headline.worse:
        yield RunWarning(True, FELL if headline.j_before is None else "J rose", headline.worse)


def _stopped(result: Result) -> Iterator[RunWarning]:
    training = result.summary.training
    if training.stopped:
        text = f"It ended after {training.updates} of {result.config.updates} updates: {training.stopped}."
        yield RunWarning(not training.reached_target, "The run stopped early", text)


def _judges(result: Result) -> Iterator[RunWarning]:
    training = result.summary.training
    for each in result.summary.judges:
        moved = f"{number(*each.change, sign=True)}, or {number(each.change_in_std, sign=True)} of its deviations"
        seen = "" if each.warned is None else f" It had clearly fallen after update {each.warned}."
        best = "" if each.best_update is None else f" It was highest after update {each.best_update} of the run."
        if each.fell:
            text = (
                f"The judge {each.name}, which was never raised, changed by {moved}, while the reward changed by "
                f"{number(*result.summary.headline.reward_gain, sign=True)}.{seen}{best} The reward may be raised by "
                "what the judge does not like: a larger KL weight, or --export best, stays nearer to the "
                "pretrained model."
            )
            yield RunWarning(True, f"The judge {each.name} fell", text)
        elif each.warned is not None:
            yield RunWarning(False, f"The judge {each.name} fell on the way", f"{seen.strip()} At the end: {moved}.")
    if result.config.export == "best" and training.kept is not None:
        text = f"It is the model of update {training.kept['updates']}, and the run made {training.updates}."
        yield RunWarning(False, "The model is not the last one", text)


def _held_out_prompts(result: Result) -> Iterator[RunWarning]:
    unseen = result.summary.held_out_prompts
    if unseen is not None and unseen.part:
        text = (
            f"Under {prompts_in_words(unseen.count)} that were not trained on the reward gained "
            f"{number(*unseen.gain, sign=True)}, {difference(unseen)}. What was learned belongs to the prompts: "
            "train on more of them, or for fewer updates."
        )
        yield RunWarning(True, "Prompts that were not trained on gained less", text)


def _gain(result: Result) -> Iterator[RunWarning]:
    headline = result.summary.headline
    gain, error = headline.reward_gain
    said = headline.worse and headline.j_before is None
    if headline.untrained is not None:  # what J fell by may be guidance alone
        if gain < -2 * error:
            text = (
                f"The reward is {number(-gain, error)} below that of the guided model. J weighs it against the path "
                "KL: a smaller KL weight asks for more of the reward, more updates for more of both."
            )
            yield RunWarning(False, "Less reward than under guidance", text)
        return
    if gain < -2 * error and not said:
        text = f"Fine-tuning was to raise it, and it changed by {number(gain, error, sign=True)}."
        yield RunWarning(True, FELL, text)
    elif abs(gain) < 2 * error:
        text = f"The reward changed by {number(gain, error, sign=True)} (± 1 standard error), which may be chance."
        yield RunWarning(True, "No clear gain", text)


def _captured(result: Result) -> Iterator[RunWarning]:
    headline = result.summary.headline
    if headline.captured is not None:
        captured, error = headline.captured
        if captured + 2 * error < CAPTURED:
            text = (
                f"The run captured {percent(captured, error)} of the gain that this KL weight allows. More updates, "
                "another learning rate or a longer chain may get the rest; a larger KL weight asks for less."
            )
            yield RunWarning(True, "Much of the possible gain is left", text)
        elif error > ROUGH:
            text = f"The share of the possible gain is known to {percent(error)} only: judge more --starts."
            yield RunWarning(False, "A rough number", text)
    if headline.captured_unknown and not headline.worse:
        yield RunWarning(False, "The captured share is unknown", headline.captured_unknown)


def _bound(result: Result) -> Iterator[RunWarning]:
    best = result.bound
    if best is None or best.trusted:
        return
    text = (
        f"The bound rests on {best.effective_samples:.1f} effective samples per start: "
        "a few lucky trajectories decide it, and with it the captured share."
    )
    if abs(best.bias) > best.j_se:
        text += f" Made of half the trajectories of a start, it moves by {number(best.bias, sign=True, digits=2)}."
    yield RunWarning(True, "The bound is uncertain", text)


def _target(result: Result) -> Iterator[RunWarning]:
    target, path_kl = result.config.target_kl, result.summary.headline.path_kl
    if target is None or path_kl is None:
        return
    kl, error = path_kl
    text = f"The path KL is {number(kl, error)} nats, the target was {target:g}"
    if kl - 2 * error > 1.05 * target:
        yield RunWarning(True, "The KL is above its target", f"{text}.")
    if kl + 2 * error < 0.95 * target:
        yield RunWarning(False, "The KL is below its target", f"{text}: make more updates.")


def _clipping(result: Result) -> Iterator[RunWarning]:
    clipping = result.summary.model.clipping
    if clipping is None:
        return
    text = (
        "The checkpoint was meant to be sampled with its pixels clipped at every step, which --no-clip switched off. "
        "On pretrained samples of the same noise that moved pixels by "
        f"{number(clipping.mean_absolute_change, digits=2)} on average (at most "
        f"{number(clipping.largest_change, digits=2)}), and the mean reward from "
        f"{number(clipping.reward_with_clipping)} to {number(clipping.reward_without_clipping)}."
    )
    yield RunWarning(False, "Clipping is off", text)


def _export(result: Result) -> Iterator[RunWarning]:
    headline, model = result.summary.headline, result.summary.model
    difference = headline.exported_less_after
    if abs(difference.mean) < max(EXPORT * abs(headline.reward_gain.mean), 2 * difference.error):
        return
    earned = number(*headline.reward_exported), number(*headline.reward_after)
    text = (
        f"model/ runs the trained network on every step of the chain and earns {earned[0]}; the chain that was trained "
        f"keeps the pretrained network where there is no noise and earns {earned[1]}."
    )
    if not model.pipeline_is_the_chain:
        text = (
            f"Diffusers cannot sample the chain that was trained, which earns {earned[1]}; model/ runs "
            f"{model.pipeline} instead and earns {earned[0]}. `implicit-diffusion sample` draws from the trained chain."
        )
    yield RunWarning(True, "The exported model differs from the trained chain", text)


def _pixels(result: Result) -> Iterator[RunWarning]:
    before, after = map(outside, result.images) if result.images is not None else (0.0, 0.0)
    if after - before < OUTSIDE:
        return
    text = (
        f"{percent(after)} of the pixels lie clearly outside [−1, 1], {percent(before)} did before. "
        "Image files cut them off, and with them a part of the reward."
    )
    yield RunWarning(True, "Pixels left the range of an image", text)


def _quality(result: Result) -> Iterator[RunWarning]:
    before, after = result.summary.quality_before, result.summary.quality_after
    if before is None or after is None:
        return
    judge = before.judge_confidence, after.judge_confidence
    network = before.classifier_confidence, after.classifier_confidence
    lost, widened = judge[0] - judge[1], (network[1] - judge[1]) - (network[0] - judge[0])
    if lost > JUDGE_LOST or widened > GAP_GREW:
        text = (
            f"The confidence of a second classifier, never optimised against, went from {percent(judge[0])} to "
            f"{percent(judge[1])}; that of the classifier went from {percent(network[0])} to {percent(network[1])}. "
            "Raise --kl-weight."
        )
        yield RunWarning(True, "Reward hacking suspected: the second classifier lost", text)
    if after.nearest_distance > AWAY * before.nearest_distance:
        text = (
            f"The nearest real digit is {number(after.nearest_distance, digits=2)} away on average, "
            f"{number(before.nearest_distance, digits=2)} before. Look at the samples; raise --kl-weight."
        )
        yield RunWarning(True, "Reward hacking suspected: samples left the real digits", text)
    quantile = after.mmd_reference.quantile_95
    if after.mmd > max(MMD_QUANTILES * quantile, 2 * before.mmd):
        text = (
            f"MMD² to real digits is {number(after.mmd, digits=2)}, {number(before.mmd, digits=2)} before; "
            f"chance explains up to {number(quantile, digits=2)}. A reward that asks for "
            "rare digits does this honestly, so look at single samples too."
        )
        yield RunWarning(False, "As a set, the samples are far from real digits", text)
    if after.memorised - before.memorised > MEMORISED:
        copies = percent(before.memorised), percent(after.memorised)
        text = f"{copies[1]} of the samples are copies of training digits, {copies[0]} before."
        yield RunWarning(True, "The model copies its training data", text)
    share = max(after.class_histogram)
    digit = after.class_histogram.index(share)
    if share > max(ONE_CLASS, 1.5 * before.class_histogram[digit]):
        text = (
            f"{percent(share)} of the samples are classed as {digit}, {percent(before.class_histogram[digit])} "
            "before. That is right only if the reward asks for it."
        )
        yield RunWarning(False, "One class took over", text)
