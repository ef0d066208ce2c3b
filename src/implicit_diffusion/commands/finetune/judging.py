"""The judgement of a run: pretrained chain, trained chain and exported pipeline on the same held-out noise.

judged/before, judged/after, judged/exported   what is drawn so far, until the result is kept
judged/untrained                               where training began with another chain than the pretrained one
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from implicit_diffusion.commands.finetune.held_out_prompts import FOLDERS
from implicit_diffusion.commands.finetune.problem.setup import AFTER, Setup
from implicit_diffusion.commands.finetune.result import JUDGED
from implicit_diffusion.commands.finetune.summary import JudgeSummary, Look, RewardSummary
from implicit_diffusion.commands.rewards.weights import labels, name_in_cache, names_of, weighted
from implicit_diffusion.digits import EVENT_SHAPE, Quality, judge_samples
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.cache import evaluate_pretrained
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.each_reward import RewardJudgement, deviation
from implicit_diffusion.evaluation.plans import Plan
from implicit_diffusion.evaluation.stored import Stored
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import RunDirectory, progress, provenance
from implicit_diffusion.runs.callbacks.judges import Judges, fell
from implicit_diffusion.samplers.chain import Chain

REPEATS = 8  # trajectories from each start
UNTRAINED = "untrained"


class Judged(NamedTuple):
    """Evaluations on the same noise.

    Args:
        before: of the pretrained chain.
        after: of the trained chain.
        exported: of the exported pipeline.
    """

    before: Evaluation
    after: Evaluation
    exported: Evaluation


def evaluate_all(setup: Setup, trained: Chain, starts: int, keeping: Callable[[str], Stored]) -> Judged:
    """Evaluate the three chains, continuing an evaluation that was interrupted.

    Args:
        setup: of the run.
        trained: the chain at the end of the training.
        starts: number of initial noises.
        keeping: from `storage`.
    """
    reward, noise = setup.measured, setup.spec.noise.stream(AFTER)
    network: Any = trained.denoiser
    condition = trained.condition
    exported = Chain(network, setup.exported.table, trained.event_shape, reference=network, condition=condition)
    stored = _three(keeping, starts)
    name = name_in_cache((*names_of(setup.spec.reward), *setup.spec.judge))
    with progress(3 * REPEATS * starts, "judging") as bar:
        sizes: dict[str, Any] = {"starts": starts, "repeats": REPEATS, "skip": bar.skip, "progress": bar.advance}
        return Judged(
            evaluate_pretrained(trained, reward, noise, name=name, stored=stored.before, **sizes),
            stored.after.evaluate(trained, reward, noise, **sizes),
            stored.exported.evaluate(exported, reward, noise, **sizes),
        )


def evaluate_untrained(setup: Setup, starts: int, keeping: Callable[[str], Stored]) -> Evaluation | None:
    """Evaluate the chain that training began with on the noise of the others; None where it is the pretrained one.

    Arguments as in `evaluate_all`.
    """
    if setup.untrained is None:
        return None
    noise = setup.spec.noise.stream(AFTER)
    return keeping(UNTRAINED).evaluate(setup.untrained, setup.measured, noise, starts=starts, repeats=REPEATS)


class _Storage(NamedTuple):
    """What keeps each of the three evaluations while it is drawn."""

    before: Stored
    after: Stored
    exported: Stored


def storage(directory: RunDirectory, trained: Chain, starts: int) -> Callable[[str], Stored]:
    """What keeps an evaluation of this name in the run's folder.

    Args:
        directory: of the run. provenance.json holds what the run reads, and the changes that were accepted since.
        trained: the chain that is judged.
        starts: of each evaluation.
    """
    network: Any = trained.denoiser
    prints = (fingerprint(weight)["tensor"] for weight in network.state_dict().values())
    digests = hashlib.sha256("".join(prints).encode())
    inputs = hashlib.sha256(from_main((directory.path / provenance.PROVENANCE_FILE).read_bytes))
    depends_on = {"the trained weights": digests.hexdigest(), provenance.PROVENANCE_FILE: inputs.hexdigest()}
    return lambda name: Stored(directory.path / JUDGED / name, depends_on, starts)


def _three(keeping: Callable[[str], Stored], starts: int) -> _Storage:
    """What keeps the three evaluations; prints how far an interrupted judgement has come."""
    storage = _Storage(*map(keeping, Judged._fields))
    done = _judged(storage)
    if done:
        print(f"judging   continued: {done} of {len(storage) * starts} starts are judged")
    return storage


@main_only
def _judged(storage: _Storage) -> int:
    """The number of starts that are stored."""
    done = 0
    for each in storage:
        try:
            done += len((each.read() or {"reward": ()})["reward"])
        except InvalidInputError as error:
            print(f"judging   done again, not continued from {each.folder}: {error}")
    return done


@main_only
def forget(directory: RunDirectory) -> None:
    """Remove the evaluations, once the result is kept."""
    for side in (*Judged._fields, UNTRAINED, *FOLDERS):
        shutil.rmtree(directory.path / JUDGED / side, ignore_errors=True)


def each_reward(rewards: Sequence[str], plan: Plan, judgements: Sequence[RewardJudgement]) -> list[RewardSummary]:
    """The judgement of each reward under its name.

    Args:
        rewards: as they were given.
        plan: of the run, which has measured them.
        judgements: of the rewards, in their order, and of the judges.
    """
    deviations = [each.reward_std for each in plan.rewards] or [plan.reward_std]
    rows = zip(labels(rewards), weighted(rewards), deviations, judgements[: len(rewards)], strict=True)
    return [RewardSummary(name, weight, std, **vars(judged)) for name, (_, weight), std, judged in rows]


def each_judge(
    labels: Sequence[str], before: Evaluation, judgements: Sequence[RewardJudgement], judges: Judges
) -> list[JudgeSummary]:
    """The judgement of each judge under its name, with its course.

    Args:
        labels: of the judges.
        before: the judged evaluation of the pretrained chain.
        judgements: of the rewards and the judges, the judges last.
        judges: that watched the run.
    """
    columns = before.each_reward[-len(labels) :]
    rows = zip(labels, map(deviation, columns), judgements[-len(labels) :], strict=True)
    return [
        JudgeSummary(
            name=name,
            deviation=std,
            before=judged.before,
            after=judged.after,
            change=judged.gain,
            exported=judged.exported,
            course=[Look(int(updates), change, se) for updates, change, se in judges.course[name]],
            best_update=judges.best_update(name),
            warned=judges.warned.get(name),
            fell=fell(judged.gain, std),
        )
        for name, std, judged in rows
    ]


def qualities(judged: Judged) -> tuple[Quality | None, Quality | None, Quality | None]:
    """How much each set of samples looks like digits; None where samples do not have the digits' shape (1, 8, 8)."""
    if tuple(judged.before.samples.shape[2:]) != EVENT_SHAPE:
        return None, None, None
    before, after, exported = (judge_samples(evaluation.samples[:, 0]) for evaluation in judged)
    return before, after, exported
