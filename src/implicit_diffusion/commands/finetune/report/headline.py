"""The headline of a run in words: on the terminal, and what the report and the model card say first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from implicit_diffusion.commands.finetune import guidance
from implicit_diffusion.commands.finetune.by_weights import ByWeights
from implicit_diffusion.commands.finetune.held_out_prompts import line_of
from implicit_diffusion.commands.finetune.summary import Headline, Summary
from implicit_diffusion.commands.shared.formatting import beside, number, percent
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.evaluation.judging import Judgement
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.callbacks.rise import smaller_rate


def headline_of(judgement: Judgement, *, lr: float, advise: bool, reward_std: float | None = None) -> Headline:
    """The numbers of a judgement, with sentences on what went wrong.

    Args:
        judgement: of the run.
        lr: learning rate of the run, for what to change.
        advise: whether to say what to change where J rose; not where the callback that stopped the run has said it.
        reward_std: deviation of the pretrained reward; by default that of the judgement. A run under prompts or labels
            has that within a prompt.
    """
    worse = _worse(judgement) if judgement.worse else None
    if worse is not None and advise:
        worse += f" {_advice(judgement, lr)}"
    bound = judgement.bound
    return Headline(
        worse=worse,
        reward_before=judgement.reward_before,
        reward_after=judgement.reward_after,
        reward_gain=judgement.reward_gain,
        reward_exported=judgement.reward_exported,
        exported_less_after=judgement.exported_less_after,
        reward_std_before=judgement.reward_std_before if reward_std is None else reward_std,
        path_kl=judgement.path_kl,
        j_before=judgement.j_before,
        j_after=judgement.j_after,
        j_fall=judgement.j_fall,
        j_bound=None if bound is None else Estimate(bound.j, bound.j_se),
        j_bound_from=judgement.bound_from,
        j_possible=judgement.possible,
        captured=judgement.captured,
        captured_unknown=_captured_unknown(judgement),
        untrained=judgement.untrained,
    )


def _begun(judgement: Judgement) -> Estimate | None:
    """J of the chain that training began with."""
    return judgement.j_before if judgement.untrained is None else judgement.untrained.j


def _worse(judgement: Judgement) -> str:
    """That J rose, or without a J that the reward fell, and by how much."""
    if judgement.beta is None:
        fall, error = -judgement.reward_gain.mean, judgement.reward_gain.error
        ends = (number(reward.mean, digits=4) for reward in (judgement.reward_before, judgement.reward_after))
        return (
            f"Fine-tuning made the model worse: the mean reward, which it raises, fell by {number(fall, error)}, from "
            f"{' to '.join(ends)}."
        )
    fall_of_j = judgement.j_fall
    words = "is no longer finite" if fall_of_j is None else f"rose by {number(-fall_of_j.mean, fall_of_j.error)}"
    ends = (number(None if j is None else j.mean, digits=4) for j in (_begun(judgement), judgement.j_after))
    return (
        f"Fine-tuning made the model worse: J (KL weight × path KL − reward), which it lowers, {words}, from "
        f"{' to '.join(ends)}."
    )


def _advice(judgement: Judgement, lr: float) -> str:
    """What to change where J rose."""
    factor = 10
    if judgement.bound is not None:
        old, new = (math.nan if j is None else j.mean for j in (_begun(judgement), judgement.j_after))
        factor = smaller_rate(new - judgement.bound.j, old - judgement.bound.j)
    return f"Try --lr {lr / factor:.1g}, {factor} times smaller."


def _captured_unknown(judgement: Judgement) -> str | None:
    """Why the captured share is not known; None where it is, and where there is none."""
    if judgement.doubt == "rose":
        return "J rose: nothing was captured."
    if judgement.doubt == "nothing" and judgement.possible is not None:
        return f"What could be gained, {number(*judgement.possible)} of J, may be nothing: judge more --starts."
    if judgement.doubt == "vague" and judgement.share is not None:
        error = percent(judgement.share.error)
        return f"The captured share has a standard error of {error}: judge more --starts."
    return None


def opening(worse: str | None, stopped: str | None, updates: int) -> list[str]:
    """What is said of a run before anything else.

    Args:
        worse: that J rose.
        stopped: why the run stopped early, and which model it ended with.
        updates: that were made.
    """
    ended = stopped and f"Stopped after update {updates}: {stopped}."
    return [sentence for sentence in (worse, ended) if sentence]


def opening_of(summary: Summary) -> list[str]:
    """`opening` of a single run."""
    return opening(summary.headline.worse, summary.training.stopped, summary.training.updates)


def updates_in_words(summary: Summary) -> str:
    """The number of updates."""
    updates = summary.training.updates
    return f"{updates} update{'s' * (updates != 1)}"


def print_headline(summary: Summary, directory: RunDirectory, report: Path) -> None:
    """Print the last lines of a run."""
    print("\n".join([*opening_of(summary), *_lines(summary, directory), f"report    {report}"]))


def _lines(summary: Summary, directory: RunDirectory) -> Iterator[str]:
    headline, training = summary.headline, summary.training
    before, after = (number(reward.mean, digits=4) for reward in (headline.reward_before, headline.reward_after))
    deviations = number(headline.gain_in_std, sign=True)
    yield f"reward    {before} → {after} ({number(*headline.reward_gain, sign=True)}, or {deviations} deviations)"
    yield from _lines_of_rewards(summary)
    yield from _lines_of_judges(summary)
    if summary.held_out_prompts is not None:
        yield line_of(summary.held_out_prompts)
    if headline.untrained is not None:
        yield guidance.line_of(headline.untrained)
    if headline.path_kl is not None:
        yield f"path KL   {number(*headline.path_kl)} nats"
    if headline.j_bound is not None:
        yield from _lines_of_j(headline, training.kl_weight)
    yield from _line_by_weights(summary.by_weights)
    yield f"cost      {clock.in_words(clock.seconds(directory.path) or {'training': training.seconds})}"
    evaluations = f"{training.network_evaluations:,} network evaluations"
    yield f"          {updates_in_words(summary)} with {evaluations}, estimator {training.estimator}"
    yield f"model     {directory.model}"
    if summary.model.adapter:
        yield f"adapter   {directory.model / 'lora'}: {summary.model.adapter}"
    if summary.model.adapter_comfyui:
        yield f"          {directory.model / summary.model.adapter_comfyui}, for ComfyUI and kohya's tools"


def _lines_of_rewards(summary: Summary) -> Iterator[str]:
    """Each of several rewards, which the line above has the weighted sum of."""
    for each in summary.rewards if len(summary.rewards) > 1 else ():
        before, after = (number(reward.mean, digits=4) for reward in (each.before, each.after))
        gain = f"{number(*each.gain, sign=True)}, or {number(each.gain_in_std, sign=True)} deviations"
        best = "" if each.expected is None else f"; the best law for the sum gains {number(*each.expected, sign=True)}"
        yield f"          {each.name} {before} → {after} ({gain}{best})"


def _lines_of_judges(summary: Summary) -> Iterator[str]:
    """Each judge, and whether it says that the reward was hacked."""
    for place, each in enumerate(summary.judges):
        before, after = (number(value.mean, digits=4) for value in (each.before, each.after))
        moved = f"{number(*each.change, sign=True)}, or {number(each.change_in_std, sign=True)} deviations"
        fell = "; it fell: look at the pictures before you use the model" if each.fell else ""
        best = "" if each.best_update is None else f"; highest after update {each.best_update}"
        yield f"{'' if place else 'judge':10}{each.name} {before} → {after} ({moved}{best}){fell}"


def _lines_of_j(headline: Headline, beta: float) -> Iterator[str]:
    """By how much J fell and could have fallen; a dash where J is no longer finite."""
    assert headline.j_bound is not None
    captured = percent(*(headline.captured or (None, None)))
    result = headline.captured_unknown or f"captured {captured}"
    source = ", from the pretrained chain" if headline.j_bound_from == "pretrained" else ""
    fall, error = headline.j_fall or (None, None)
    could, could_error = headline.j_possible or (None, None)
    before, after = (beside(j and j.mean, error) for j in (headline.j_begun, headline.j_after))
    moved = "fell" if fall is None or fall >= 0 else "rose"
    yield (
        f"J         {before} → {after}, {beta:.4g} × path KL − reward: {moved} by "
        f"{number(None if fall is None else abs(fall), error)}"
    )
    most = number(could, could_error)
    yield f"bound     {beside(headline.j_bound.mean, could_error)}{source}: J could fall by {most}; {result}"


def _line_by_weights(by_weights: ByWeights) -> Iterator[str]:
    """The trained chain with the weights of its trajectories, where they have any."""
    law = by_weights.reweighted
    if law is None:
        return
    share = by_weights.reweighted_captured
    captured = "" if share is None else f": captured {percent(*share)}"
    trust = "" if law.trusted else ", too small to trust"
    yield (
        f"weighted  reward {number(law.reward.mean, digits=4)} ({number(*law.reward_gain, sign=True)}), path KL "
        f"{number(*law.path_kl)} nats, J {beside(law.j.mean, law.j_fall.error)}{captured}; effective share "
        f"{percent(law.effective_share)}{trust}"
    )
