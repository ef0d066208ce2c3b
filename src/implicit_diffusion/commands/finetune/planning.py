"""The pretrained trajectories that a plan is made of: drawn once for a run's folder, and continued there.

    plan/   the rewards, with all that they depend on: model, reward, chain, noise, and what rounds

`finetune --plan`, the run that follows in the same folder, and an attempt that was interrupted before its first update
share them. Where something that they depend on differs, a line says so and they are drawn again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.commands.finetune.problem.compiling import CHOICE
from implicit_diffusion.commands.finetune.problem.setup import PLAN, Setup
from implicit_diffusion.commands.finetune.problem.weighing import weighed_samples
from implicit_diffusion.commands.finetune.report.plan_table import plot, show
from implicit_diffusion.commands.finetune.specs import PlanSpec
from implicit_diffusion.commands.rewards.weights import labels, name_in_cache, weighted
from implicit_diffusion.commands.shared.inputs import INIT_LORA, with_imports
from implicit_diffusion.commands.shared.prompt_files import COPIES
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.cache import code_digest, evaluate_pretrained
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.plans import Plan, make_plan
from implicit_diffusion.evaluation.stored import Stored, from_state
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.manifest import MANIFEST
from implicit_diffusion.files.states import STATE_FILE, has_state, load_state
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory, progress, records
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.surroundings import describe

PLANNED = "plan"  # the folder
REPEATS = 16  # trajectories from each start
KEPT = 256  # starts whose first sample is stored, for a picture and for a surrogate
PICTURED = 64  # of them
FILES = (
    "plan.json",
    "guidance.json",
    f"{PLANNED}/{STATE_FILE}",
    f"{PLANNED}/{MANIFEST}",
    "figures/plan.png",
    "figures/pretrained.png",
    CHOICE,
    *COPIES,
)


def planned(
    spec: PlanSpec,
    setup: Setup,
    directory: RunDirectory,
    fingerprints: Mapping[str, Any],
    pretrained: Evaluation | None = None,
) -> tuple[Plan, Evaluation]:
    """The plan of a run, and the trajectories that it is made of; what is new is written, drawn and printed.

    Of several rewards, R is in deviations in both (`weighing`), whatever weights the trajectories have been
    drawn or stored with.

    Args:
        spec: of the plan.
        setup: of the run.
        directory: of the run.
        fingerprints: of what the run reads, by `inputs`, taken before anything was loaded.
        pretrained: the trajectories, where they have been drawn and shown before, as in a sweep.

    Raises:
        InvalidInputError: the reward, or one of several, does not vary over the samples.
    """
    known = None
    if directory.has_state:
        with suppress(InvalidInputError):  # damaged: the reason is printed where they are drawn again
            known = read_rewards(directory)
    drawn = pretrained or known or pretrained_samples(setup, spec.starts, directory, fingerprints)
    betas = None if spec.bounded else ()
    asked = spec.asked if spec.bounded else None
    try:
        with part("planning"):
            samples = weighed_samples(setup, drawn)
            plan = make_plan(samples, betas, asked=asked, conditional=setup.given_start)
    except InvalidInputError:
        if not directory.has_state:
            _abandon(directory)
        raise
    if drawn is known:
        return plan, samples

    @main_only
    def conclude() -> None:
        plot(plan, samples, directory.figure("plan"))
        if drawn is pretrained:
            storage(setup, spec.starts, directory, fingerprints).write(samples)
        else:
            show(plan, labels(setup.spec.reward))
        if spec.alone:
            _show_files(setup, samples, directory)
        # the last file: with it, the plan is complete
        records.write(directory.path / "plan.json", plan_as_json(plan, setup.spec.reward))

    conclude()
    return plan, samples


def plan_as_json(plan: Plan, rewards: Sequence[str]) -> dict[str, Any]:
    """The plan as plan.json holds it: of several rewards with their names and weights."""
    content = plan.to_json()
    pairs = zip(labels(rewards), weighted(rewards))
    named = [{"name": label, "weight": weight} for label, (_, weight) in pairs]
    return content | (
        {"rewards": [name | each for name, each in zip(named, content["rewards"], strict=True)]} if plan.rewards else {}
    )


@part("planning")
def pretrained_samples(
    setup: Setup, starts: int, directory: RunDirectory, fingerprints: Mapping[str, Any]
) -> Evaluation:
    """Trajectories of the pretrained chain, several from each start: those in the folder, and the missing ones.

    Args:
        setup: of the run.
        starts: number of initial noises.
        directory: of the run. Its plan.json says that a plan is complete, and is removed where something is drawn.
        fingerprints: as in `planned`.
    """
    stored, state = storage(setup, starts, directory, fingerprints), None
    total = REPEATS * starts
    try:
        state = stored.read()
    except InvalidInputError as error:
        print(f"plan      drawn again, not reused from {stored.folder}: {error}")
    if state is not None and stored.is_whole(state):
        print(f"plan      reused: {stored.folder} holds the {total} trajectories of this model, chain and reward")
        return from_state(state, setup.chain.device)
    if state is not None:
        print(f"plan      continued: {stored.folder} holds {state['reward'].numel()} of {total} trajectories")
    _forget_plan(directory)
    return draw(setup, stored)


@main_only
def _forget_plan(directory: RunDirectory) -> None:
    with writing(directory.path):
        (directory.path / "plan.json").unlink(missing_ok=True)


def draw(setup: Setup, stored: Stored) -> Evaluation:
    """Draw the trajectories that the folder lacks."""
    with progress(REPEATS * stored.starts, "planning") as bar:
        return evaluate_pretrained(
            setup.chain,
            setup.reward,
            setup.spec.noise.stream(PLAN),
            name=name_in_cache(setup.spec.reward),
            starts=stored.starts,
            repeats=REPEATS,
            progress=bar.advance,
            skip=bar.skip,
            stored=stored,
        )


@main_only
def _abandon(directory: RunDirectory) -> None:
    """Leave nothing of a plan that cannot be made."""
    for name in (*FILES, "config.json", "provenance.json"):
        (directory.path / name).unlink(missing_ok=True)
    for folder in (PLANNED, "figures"):
        with suppress(OSError):  # not there, or something else is in it
            (directory.path / folder).rmdir()


@main_only
def read_rewards(directory: RunDirectory) -> Evaluation | None:
    """The rewards that a run was planned with, on the CPU and without samples; None where there are none.

    Raises:
        InvalidInputError: they are damaged.
    """
    if not has_state(directory.path / PLANNED):
        return None
    state = load_state(directory.path / PLANNED)
    none = torch.zeros_like(state["reward"])
    return Evaluation(state["reward"], none, none, none[..., None][..., :0], state["rewards"])


def storage(setup: Setup, starts: int, directory: RunDirectory, fingerprints: Mapping[str, Any]) -> Stored:
    """What keeps the trajectories in the folder of the run; arguments as in `pretrained_samples`."""
    depends_on = what_it_depends_on(setup, starts, fingerprints)
    return Stored(directory.path / PLANNED, depends_on, starts, KEPT)


def _show_files(setup: Setup, samples: Evaluation, directory: RunDirectory) -> None:
    """Draw pretrained samples of the chain, and print where the plan is."""
    from implicit_diffusion.commands.shared.drawing import finish_figure, image_grid, sheet

    print(f"plan      {directory.path / 'plan.json'}")
    print(f"figures   {directory.figure('plan')}")
    decoded = setup.decoded(samples)
    images = samples.samples[:PICTURED, 0] if decoded is None else decoded[0]
    if images.ndim == 4:
        figure = sheet(5.0, 5.0)
        image_grid(figure.subplots(), images, -1.0, 1.0)
        finish_figure(figure, directory.figure("pretrained"))
        print(f"          {directory.figure('pretrained')}, drawn by the chain that would be trained")


def what_it_depends_on(setup: Setup, starts: int, fingerprints: Mapping[str, Any]) -> dict[str, str]:
    """All that decides the bits of pretrained trajectories and their rewards, by name.

    What is trained, and how, is not part of it: neither β nor adapters, which are off in the pretrained network.
    """
    spec, conditions = setup.spec, setup.conditioning
    prompts = "\n".join(prompt.as_json() for prompt in conditions.trained_prompts)
    options = {
        "--model": None if "model" in fingerprints else spec.network.model,
        "--reference": None if "reference" in fingerprints else spec.network.reference,
        "--reward": " ".join(labels(spec.reward)),
        "--scheduler": setup.sampler,
        "--num-steps": setup.chain.num_steps,
        "--eta": setup.eta,
        "--no-clip": spec.chain.no_clip or None,
        "--guidance": conditions.guidance if conditions.drawn is not None else None,
        "--null-class": conditions.null if conditions.drawn is not None and not prompts else None,
        "--prompts": f"sha256 {hashlib.sha256(prompts.encode()).hexdigest()}" if prompts else None,
        "--precision": spec.network.precision,
        "--seed": spec.noise.seed,
        "--starts": starts,
        "dtype": setup.chain.dtype,
        "code": f"sha256 {code_digest()}",
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    files = {name: entry for name, entry in fingerprints.items() if name != INIT_LORA}
    return given | _files(with_imports(spec, files)) | describe(setup.chain.device)


def _files(fingerprints: Mapping[str, Any]) -> dict[str, str]:
    """The digests of files, by names that do not depend on the place of the folder."""
    digests: dict[str, str] = {}
    for name, entry in fingerprints.items():
        if name == "prompts":  # their text is compared
            continue
        if "version" in entry:
            digests[name] = entry["version"]
            continue
        files = dict(entry["files"])
        if "folder" not in entry and files:
            base = os.path.commonpath([Path(file).parent for file in files])
            files = {os.path.relpath(file, base): digest for file, digest in files.items()}
        digests |= {f"{name} {file}": f"sha256 {digest}" for file, digest in files.items()}
    return digests
