"""Before against after: the headline numbers of a fine-tuning run, and its model card."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.shared.formatting import beside, markdown, model_name, number, percent
from implicit_diffusion.commands.shared.usage import usage
from implicit_diffusion.digits import EVENT_SHAPE, judge_samples
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import Bound, bound, captured, possible, sharpest
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.loops.on_chain import TRIAL
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.callbacks.rise import smaller_rate
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import NAMED_SAMPLERS


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
    """The summary's numbers, and the bound they refer to (None without a path KL)."""

    summary: dict[str, Any]
    bound: Bound | None


def particles(chain: Chain) -> Particles:
    """Two pretrained samples, to try a reward on."""
    noise = Noise(0)
    return chain.endpoint(chain.sample(noise, 2, TRIAL), noise, TRIAL)


def judge(
    before: Evaluation,
    after: Evaluation,
    exported: Evaluation,
    beta: float | None,
    *,
    lr: float | None = None,
    advise: bool = True,
) -> Judgement:
    """Rewards, path KL, J, the bound on it and the share of the possible gain that was captured.

    J = β·KL − reward holds for the numbers as they are, before, after and at the bound, and the captured share is the
    fall of J as a share of what J could fall: the path KL is that of the squares (`Evaluation.path_kl`). All were
    evaluated under the same noise, so that the errors of differences are those of paired differences. Where J rose, by
    more than two standard errors, the first entry says so, with what to change. There, and where the possible gain may
    be none, within two standard errors, a share of it means nothing: `captured_unknown` says why. Without a J it is the
    reward that must not have fallen.

    Args:
        before: the pretrained chain.
        after: the trained one.
        exported: the pipeline's.
        beta: weight of the path KL; None where the penalty is another one, and there is no J to speak of.
        lr: the learning rate of the run, for what to change.
        advise: whether to say what to change, where nobody has yet.
    """
    numbers: dict[str, Any] = {"worse": None}
    for name, values in (
        ("reward_before", before.reward),
        ("reward_after", after.reward),
        ("reward_gain", after.reward - before.reward),
        ("reward_exported", exported.reward),
        ("exported_less_after", exported.reward - after.reward),
        ("path_kl", after.path_kl),
        ("j_before", None if beta is None else before.objective(beta)),
        ("j_after", None if beta is None else after.objective(beta)),
        ("j_fall", None if beta is None else before.objective(beta) - after.objective(beta)),
    ):
        numbers |= _with_error(name, values)
    numbers["reward_std_before"] = before.reward.double().std().item()
    best, source = sharpest(before, after, beta) if beta and after.log_ratio.isfinite().all() else (None, None)
    if beta and best is None:  # of which a chain that overflows knows nothing
        best, source = bound(before, beta), "pretrained"
    numbers["worse"] = _worse(before, after, beta)
    if numbers["worse"] and advise:
        numbers["worse"] += f" {_advice(before, after, beta, best, lr)}"
    share: tuple[float | None, float | None] = (None, None)
    most, error, unknown = None, None, None
    if best is not None and beta and after.log_ratio.isfinite().all():
        (most, error), known = possible(before, after, beta), captured(before, after, beta)
        if not most > 2 * error:
            unknown = f"What could be gained, {number(most, error)} of J, may be nothing: judge more --starts."
        elif known[1] > UNKNOWN:
            unknown = f"The captured share has a standard error of {percent(known[1])}: judge more --starts."
        else:
            share = known
    if numbers["worse"] and best is not None:
        unknown, share = "J rose: nothing was captured.", (None, None)
    numbers["captured_unknown"] = unknown
    numbers["j_bound"] = best and best.j
    numbers["j_bound_se"] = best and best.j_se
    numbers["j_bound_from"] = source
    numbers["j_possible"], numbers["j_possible_se"] = most, error
    numbers["captured"], numbers["captured_se"] = share
    return Judgement(numbers, best)


UNKNOWN = 0.5  # standard error of a captured share that is not worth a number


def _worse(before: Evaluation, after: Evaluation, beta: float | None) -> str | None:
    """That J rose, and by how much; None where it did not, by more than two standard errors.

    Of a penalty that is not judged it is known that it was zero before: where the reward fell, what is minimised rose.
    """
    if beta is None:
        fall, error = mean_and_error(before.reward - after.reward)
        ends = (number(mean_and_error(seen.reward)[0], digits=4) for seen in (before, after))
        return (
            f"Fine-tuning made the model worse: the mean reward, which it raises, fell by {number(fall, error)}, from "
            f"{' to '.join(ends)}."
            if fall > 2 * error
            else None
        )
    old, new = before.objective(beta), after.objective(beta)
    rise, error = mean_and_error(new - old)
    if math.isfinite(rise) and not rise > 2 * error:
        return None
    j = [mean_and_error(values)[0] for values in (old, new)]
    words = "is not finite any more" if not math.isfinite(rise) else f"rose by {number(rise, error)}"
    return (
        f"Fine-tuning made the model worse: J (KL weight × path KL − reward), which it lowers, {words}, from "
        f"{number(j[0], digits=4)} to {number(j[1], digits=4)}."
    )


def _advice(before: Evaluation, after: Evaluation, beta: float | None, best: Bound | None, lr: float | None) -> str:
    """What to change where J rose."""
    factor = 10
    if beta is not None and best is not None:
        old, new = (mean_and_error(seen.objective(beta))[0] for seen in (before, after))
        factor = smaller_rate(new - best.j, old - best.j)
    rate = "a learning rate" if lr is None else f"--lr {lr / factor:.1g},"
    return f"Try {rate} {factor} times smaller."


def _with_error(name: str, values: Tensor | None) -> dict[str, float | None]:
    if values is None:
        return {name: None, f"{name}_se": None}
    mean, error = mean_and_error(values)
    known = math.isfinite(mean)
    return {name: mean if known else None, f"{name}_se": error if known else None}


def digits_quality(before: Evaluation, after: Evaluation, exported: Evaluation) -> dict[str, Any]:
    """Whether samples still look like digits, where they have the digits' shape (1, 8, 8)."""
    if tuple(before.samples.shape[2:]) != EVENT_SHAPE:
        return {f"quality_{when}": None for when in ("before", "after", "exported")}
    looks = {
        when: asdict(judge_samples(evaluation.samples[:, 0]))
        for when, evaluation in (("before", before), ("after", after), ("exported", exported))
    }
    summary: dict[str, Any] = {f"quality_{when}": quality for when, quality in looks.items()}
    for when in ("before", "after"):
        summary[f"classifier_confidence_{when}"] = looks[when]["classifier_confidence"]
        summary[f"class_histogram_{when}"] = looks[when]["class_histogram"]
    return summary


@torch.no_grad()
def effect_of_clipping(
    chain: Chain, clipped: Any, reward: Callable[..., Any] | Reward, noise: Noise, options: dict[str, Any]
) -> dict[str, float]:
    """What switching `clip_sample` off changed, on 128 samples of the same noise.

    Args:
        chain: without clipping.
        clipped: the diffusers scheduler with clipping.
        reward: R.
        noise: whose draws both use: the scheduler gets the generators that the chain's ξ come from.
        options: of `clipped.step`.
    """
    count, score = 128, as_reward(reward)
    x, condition = chain.initial(noise, count), chain.conditions(noise, count, [0])
    clipped.set_timesteps(chain.num_steps)
    with chain.evaluating():
        for row, t in enumerate(clipped.timesteps):
            u = chain.transition(x[None], [row], condition=condition).u[0]
            generator = noise.generator(0, row + 1, device=x.device)
            x = clipped.step(u, t, x, generator=generator, **options).prev_sample
    free = chain.sample(noise, count)
    return {
        "mean_absolute_change": (free - x).abs().mean().item(),
        "largest_change": (free - x).abs().max().item(),
        "reward_with_clipping": score.of(chain.endpoint(x, noise)).mean().item(),
        "reward_without_clipping": score.of(chain.endpoint(free, noise)).mean().item(),
    }


def opening(summary: dict[str, Any]) -> list[str]:
    """What is said of a run before anything else: that J rose; why it stopped, and which model it ended with."""
    stopped = summary.get("stopped") and f"Stopped after update {summary['updates']}: {summary['stopped']}."
    return [sentence for sentence in (summary.get("worse"), stopped) if sentence]


def model_card(config: dict[str, Any], summary: dict[str, Any], chain: Chain) -> str:
    """README.md of the exported pipeline; the strings in it that are not ours have no effect as Markdown or HTML."""
    given = (short(config["reward"]), model_name(config["model"]), chain.table.name, summary["pipeline"])
    reward, model, table, pipeline = map(markdown, given)
    rows = sorted(chain.pretrained_rows)
    kept = f"the pretrained network acted on rows {rows} (no noise there)" if rows else "the network acted on all rows"
    kind = NAMED_SAMPLERS[config["scheduler"]]
    spacing = "the checkpoint's noise levels" if kind.flow else "trailing spacing, clip_sample off"
    runs = f"During training {kept}; this pipeline runs the trained network on all of them."
    if not summary["pipeline_is_the_chain"]:
        runs = f"""**This pipeline samples another chain than the one that was trained**, which diffusers does not have:
it runs {pipeline} with the trained network, and earns what the table says. The trained chain itself is
in `chain.json`; `implicit-diffusion sample --model "this folder"` draws from it. During training {kept}."""
    eta = f", eta={config['eta']:g}" if config["scheduler"] == "ddim" else ""
    guidance = f", guidance {config['guidance']:g}" if config.get("guidance") else ""
    if config["penalty"] == "drift":
        leash, judged = "the squared distance of the drifts from those of the pretrained model", ""
    else:
        leash = "KL of the sampling path to the pretrained model"
        judged = f"""| path KL (nats) | 0 | {number(summary["path_kl"], digits=4)} |
| J = {summary["kl_weight"]:.4g} × path KL − reward | {number(summary["j_before"], digits=4)} | {
            number(summary["j_after"], digits=4)
        } |
| share of the possible gain of J | 0 | {number(summary["captured"])} |
"""
    worse = "".join(f"\n**{sentence}**\n" for sentence in opening(summary))
    adapter = ""
    if summary.get("adapter"):
        adapter = f"""
The low-rank adapter is merged into these weights. By itself, of rank {config["lora_rank"]}, it is in `lora/`, to be
added to {model}, loaded as `pipeline`: `{summary["adapter"]}`.
"""
    return f"""# {model} fine-tuned for {reward}
{worse}
Trained by implicit-diffusion: E[reward] against {summary["kl_weight"]:.4g} × {leash},
over a chain of {chain.num_steps} {kind.words} steps ({table}).

| | before | after |
|---|---|---|
| reward, training chain | {summary["reward_before"]:.4g} | {summary["reward_after"]:.4g} |
| reward, this pipeline (network on all rows) | | {summary["reward_exported"]:.4g} |
{judged}
{runs}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
{usage(config, summary)}
```
{adapter}
Chain: {config["scheduler"]}, N = {chain.num_steps}{eta}{guidance}, {spacing}.
β = {summary["kl_weight"]:.6g}, reward = {reward}, {updates(summary)}, seed {config["seed"]}.
"""


def updates(summary: dict[str, Any]) -> str:
    """How many there were, in words."""
    return f"{summary['updates']} update{'s' * (summary['updates'] != 1)}"


def falls(summary: dict[str, Any]) -> tuple[tuple[float, float | None], tuple[float, float | None]]:
    """By how much J fell and could have fallen, with standard errors; of earlier versions' runs these are not known."""
    fell, could = (summary["j_before"] - summary[name] for name in ("j_after", "j_bound"))
    return (fell, summary.get("j_fall_se")), (could, summary.get("j_possible_se"))


def print_headline(summary: dict[str, Any], directory: RunDirectory, report: Path) -> None:
    """The last lines of a run."""

    def line(name: str) -> str:
        return number(summary[name], digits=4)

    def exact(name: str, *, sign: bool = False) -> str:
        return number(summary[name], summary[f"{name}_se"], sign=sign)

    deviations = number(summary["reward_gain"] / summary["reward_std_before"], sign=True)
    lines = opening(summary)
    lines += [
        f"reward    {line('reward_before')} → {line('reward_after')} "
        f"({exact('reward_gain', sign=True)}, or {deviations} deviations)"
    ]
    if summary["path_kl"] is not None:
        lines.append(f"path KL   {exact('path_kl')} nats")
    if summary["j_bound"] is not None:
        share = percent(summary["captured"], summary["captured_se"])
        result = summary["captured_unknown"] or f"captured {share}"
        source = ", from the pretrained chain" if summary["j_bound_from"] == "pretrained" else ""
        fell, could = falls(summary)
        before, after = (beside(summary[f"j_{when}"], fell[1]) for when in ("before", "after"))
        lines += [
            f"J         {before} → {after}, {summary['kl_weight']:.4g} × path KL − reward: "
            f"{'fell' if fell[0] >= 0 else 'rose'} by {number(abs(fell[0]), fell[1])}",
            f"bound     {beside(summary['j_bound'], could[1])}{source}: J could fall by {number(*could)}; {result}",
        ]
    lines += [
        f"cost      {clock.in_words(clock.seconds(directory.path) or {'training': summary['seconds']})}",
        f"          {updates(summary)} with {summary['network_evaluations']:,} network evaluations",
        f"model     {directory.model}",
        *([f"adapter   {directory.model / 'lora'}: {summary['adapter']}"] if summary.get("adapter") else []),
        f"report    {report}",
    ]
    print("\n".join(lines))
