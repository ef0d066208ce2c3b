"""Prompts that are not trained on: what the reward gained under them, beside the gain under those that are.

Both gains are of the same noise: trajectory by trajectory, x_0 and every ξ are shared, and the prompt is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from implicit_diffusion.commands.finetune.problem.setup import AFTER, Setup
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.page import table
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.judging import CLEAR
from implicit_diffusion.evaluation.stored import Stored
from implicit_diffusion.samplers.chain import Chain

FOLDERS = ("held-out-before", "held-out-after")


@dataclass(frozen=True)
class HeldOutPrompts:
    """The reward under prompts that were not trained on.

    Args:
        count: number of prompts.
        before: mean reward of the pretrained chain.
        after: mean reward of the trained chain.
        gain: the paired difference of the two.
        trained_less_held_out: gain under the prompts that were trained on, less this one, on the same noise.
    """

    count: int
    before: Estimate
    after: Estimate
    gain: Estimate
    trained_less_held_out: Estimate

    @property
    def part(self) -> bool:
        """Whether the gain is clearly smaller than under the prompts that were trained on."""
        less = self.trained_less_held_out
        return less.mean > CLEAR * less.error


def evaluate_held_out(
    setup: Setup,
    trained: Chain,
    seen: tuple[Evaluation, Evaluation],
    stored: Callable[[str], Stored],
    repeats: int,
) -> HeldOutPrompts | None:
    """Evaluate pretrained and trained chain under the prompts that were not trained on; None where there are none.

    Args:
        setup: of the run.
        trained: the chain at the end of the training.
        seen: pretrained and trained chain under the other prompts.
        stored: keeps an evaluation in a folder of this name.
        repeats: trajectories from each start.
    """
    conditions = setup.conditioning
    if conditions.held_out is None:
        return None
    chain, noise = trained.replace(condition=conditions.held_out), setup.spec.noise.stream(AFTER)
    before, after = (
        stored(name).evaluate(which, setup.reward, noise, starts=len(seen[0].reward), repeats=repeats)
        for name, which in zip(FOLDERS, (chain.pretrained(), chain))
    )
    gained = after.reward - before.reward
    return HeldOutPrompts(
        len(conditions.held_out.values),
        mean_and_error(before.reward),
        mean_and_error(after.reward),
        mean_and_error(gained),
        mean_and_error(seen[1].reward - seen[0].reward - gained),
    )


def line_of(unseen: HeldOutPrompts) -> str:
    """What is printed."""
    ends = (number(reward.mean, digits=4) for reward in (unseen.before, unseen.after))
    return (
        f"unseen    {' → '.join(ends)} ({number(*unseen.gain, sign=True)}) under {prompts_in_words(unseen.count)} that "
        f"were not trained on{'; ' + difference(unseen) if unseen.part else ''}"
    )


def difference(unseen: HeldOutPrompts) -> str:
    """By how much the gains part, in words."""
    return f"{number(*unseen.trained_less_held_out)} less than under those that were"


def prompts_in_words(count: int) -> str:
    """The number of prompts."""
    return f"{count} prompt{'s' * (count != 1)}"


def section(unseen: HeldOutPrompts | None, before: Estimate, after: Estimate, gain: Estimate) -> str:
    """The part of the report; empty where no prompts were held out.

    Args:
        unseen: from `evaluate_held_out`.
        before: mean reward of the pretrained chain under the prompts that were trained on.
        after: of the trained chain.
        gain: their paired difference.
    """
    if unseen is None:
        return ""
    rows = [
        [name, *(number(*each) for each in ends), number(*gained, sign=True)]
        for name, ends, gained in (
            ("trained on", (before, after), gain),
            (f"held out, {unseen.count}", (unseen.before, unseen.after), unseen.gain),
        )
    ]
    return f"""<section><h2>Prompts that were not trained on</h2>
<p>On the same noise as the others; the gain under them is smaller by {number(*unseen.trained_less_held_out)}.</p>
{table(("prompts", "before", "after", "gain"), rows)}</section>
"""
