"""The pretrained trajectories that a plan is made of: drawn once for a run's folder, and gone on with there.

    plan/state.safetensors   the rewards, with all that they rest on: model, reward, chain, noise, and what rounds

`finetune --plan`, the run that follows in the same folder, and whatever was interrupted before its first update share
them. Where what they rest on differs, a line says so and they are drawn again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.evaluation_cache import code_digest, evaluate_pretrained
from implicit_diffusion.commands.finetune.plan import Plan, make_plan, plot, show
from implicit_diffusion.commands.finetune.problem import PLAN, Problem, ddim_eta
from implicit_diffusion.commands.finetune.stored import Stored, evaluation
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.shared.inputs import with_imports
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.states import load_state
from implicit_diffusion.global_generators import Draws
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.surroundings import describe

PLANNED = "plan"  # the folder
REPEATS = 16  # trajectories from each start
SHOWN = 64  # starts whose first sample is stored, for a picture
PROMPTS = "prompts.txt"  # the run's own copy, which a resumed run reads
FILES = ("plan.json", f"{PLANNED}/state.safetensors", "figures/plan.png", "figures/pretrained.png", PROMPTS)


def planned(
    config: Config,
    problem: Problem,
    directory: RunDirectory,
    fingerprints: dict[str, Any],
    pretrained: Evaluation | None = None,
) -> tuple[Plan, Evaluation]:
    """The plan of a run that has begun to train or is about to, and what it is made of.

    What is new in it is written, drawn and printed.

    Args:
        config: of the run.
        problem: of that config.
        directory: of the run.
        fingerprints: of what the run is given, by `inputs`, before anything was loaded.
        pretrained: what the plan is made of, where it has been drawn and shown before.
    """
    known = read_rewards(directory) if directory.has_state else None
    samples = pretrained or known or pretrained_samples(config, problem, directory, fingerprints)
    options: dict[str, Any] = {"betas": ()} if config.penalty == "drift" else {"asked": config.kl_weight}
    try:
        plan = make_plan(samples, **options, conditional=problem.chain.condition is not None)
    except InvalidInputError:
        if samples is not known:
            _abandon(directory)
        raise
    if samples is known:
        return plan, samples
    plot(plan, samples, directory.figure("plan"))
    if samples is pretrained:
        storage(config, problem, directory, fingerprints).write(samples)
    else:
        show(plan)
    if config.plan:
        _show_files(problem, samples, directory)
    directory.write_plan(plan.summary())  # the last file: with it, the plan is whole
    return plan, samples


@part("planning")
def pretrained_samples(
    config: Config, problem: Problem, directory: RunDirectory, fingerprints: dict[str, Any]
) -> Evaluation:
    """Trajectories of the pretrained chain, several from each start: those of the folder, and what lacks of them.

    Args:
        config: of the run.
        problem: of that config.
        directory: of the run. Its plan.json stands for a plan that is whole, and goes where something is drawn.
        fingerprints: of what the run is given, by `inputs`, before anything was loaded.
    """
    stored, there = storage(config, problem, directory, fingerprints), None
    total = REPEATS * config.starts
    try:
        there = stored.read()
    except InvalidInputError as error:
        print(f"plan      drawn again, not taken from {stored.folder}: {error}")
    if there is not None and stored.is_whole(there):
        print(f"plan      reused: {stored.folder} holds the {total} trajectories of this model, chain and reward")
        return evaluation(there, problem.chain.device)
    if there is not None:
        print(f"plan      goes on: {stored.folder} holds {there['reward'].numel()} of {total} trajectories")
    with writing(directory.path):
        (directory.path / "plan.json").unlink(missing_ok=True)
    return draw(config, problem, stored)


def draw(config: Config, problem: Problem, stored: Stored) -> Evaluation:
    """Draw what the folder lacks."""
    with progress(REPEATS * config.starts, "planning") as bar:
        return evaluate_pretrained(
            problem.chain,
            problem.reward,
            Noise(config.seed).stream(PLAN),
            name=config.reward,
            starts=config.starts,
            repeats=REPEATS,
            progress=bar.advance,
            skip=bar.skip,
            stored=stored,
        )


def _abandon(directory: RunDirectory) -> None:
    """Leave nothing of a plan that there cannot be."""
    for name in (*FILES, "config.json", "provenance.json"):
        (directory.path / name).unlink(missing_ok=True)
    for folder in (PLANNED, "figures"):
        with suppress(OSError):  # not there, or something else is in it
            (directory.path / folder).rmdir()


def read_rewards(directory: RunDirectory) -> Evaluation | None:
    """What a run was planned with, on the CPU and no samples, whatever it rests on; None where nothing is there."""
    if not (directory.path / PLANNED).exists():
        return None
    reward = load_state(directory.path / PLANNED)["reward"]
    none = torch.zeros_like(reward)
    return Evaluation(reward, none, none, none[..., None][..., :0])


def storage(config: Config, problem: Problem, directory: RunDirectory, fingerprints: dict[str, Any]) -> Stored:
    """What keeps the trajectories in the folder of the run; arguments as in `pretrained_samples`."""
    draws = Draws(Noise(config.seed), PLAN, 2, device=problem.chain.device)
    return Stored(directory.path / PLANNED, rests_on(config, problem, fingerprints), config.starts, draws, SHOWN)


def _show_files(problem: Problem, samples: Evaluation, directory: RunDirectory) -> None:
    """Draw pretrained samples of the chain, and say where the plan is."""
    from implicit_diffusion.commands.shared.drawing import finish, sheet, tile

    print(f"plan      {directory.path / 'plan.json'}")
    print(f"figures   {directory.figure('plan')}")
    decoded = problem.decoded(samples)
    images = samples.samples[:SHOWN, 0] if decoded is None else decoded[0]
    if images.ndim == 4:
        figure = sheet(5.0, 5.0)
        tile(figure.subplots(), images, -1.0, 1.0)
        finish(figure, directory.figure("pretrained"))
        print(f"          {directory.figure('pretrained')}, drawn by the chain that would be trained")


def rests_on(config: Config, problem: Problem, fingerprints: dict[str, Any]) -> dict[str, str]:
    """All that decides the bits of pretrained trajectories and their rewards, by name.

    What is trained, and how, has no part in it: neither β nor adapters, which are off in the pretrained network.
    """
    given = problem.conditioning
    prompts = hashlib.sha256("\n".join(given.prompts).encode()).hexdigest() if given.prompts else None
    options = {
        "--reward": short(config.reward),
        "--scheduler": problem.kind,
        "--num-steps": config.num_steps,
        "--eta": ddim_eta(config) if problem.kind == "ddim" else None,
        "--no-clip": config.no_clip or None,
        "--guidance": given.guidance if given.drawn is not None else None,
        "--null-class": given.null if given.drawn is not None else None,
        "--prompts": prompts and f"sha256 {prompts}",
        "--precision": config.precision,
        "--compile": config.compile or None,
        "--seed": config.seed,
        "--starts": config.starts,
        "dtype": problem.chain.dtype,
        "code": f"sha256 {code_digest()}",
    }
    named = {f"--{name}": getattr(config, name) for name in ("model", "reference") if name not in fingerprints}
    set_options = {name: str(value) for name, value in (named | options).items() if value is not None}
    return set_options | _files(with_imports(config, fingerprints)) | describe(problem.chain.device)


def _files(fingerprints: dict[str, Any]) -> dict[str, str]:
    """The digests of files, by names that do not say where they lie."""
    digests: dict[str, str] = {}
    for name, entry in fingerprints.items():
        if name == "prompts":  # read by now
            continue
        files = dict(entry["files"])
        if "folder" not in entry and files:
            base = os.path.commonpath([Path(file).parent for file in files])
            files = {os.path.relpath(file, base): digest for file, digest in files.items()}
        digests |= {f"{name} {file}": f"sha256 {digest}" for file, digest in files.items()}
    return digests
