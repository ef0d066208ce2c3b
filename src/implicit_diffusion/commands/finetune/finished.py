"""The tilted law that a finished run aimed at, and the chain that its model makes: the run's problem, set up again.

    u_θ        RUN/model                      u_0    the model that the run began with, or its --reference
    rows       those of RUN/model/chain.json, which must be the ones that the run trained
    R          of config.json, of several rewards in the deviations that the run measured
    β          of summary.json, as it was at the end of the training

For a model that no run has fine-tuned, u_θ = u_0, and R and β are named. Nothing of a run's folder is executed that
`resume` would not execute (`rewards.trust`), and no file is read that the run did not read (`runs.provenance`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem.setup import Setup, build
from implicit_diffusion.commands.finetune.problem.weighing import deviations, in_deviations
from implicit_diffusion.commands.finetune.result import read_run_summary
from implicit_diffusion.commands.finetune.specs import SetupSpec, setup_spec
from implicit_diffusion.commands.rewards.trust import check_trust
from implicit_diffusion.commands.rewards.weights import names_of
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.commands.shared.models.by_name import check_weights, folder_of
from implicit_diffusion.commands.shared.models.factories import check_models, factory_of, is_factory, with_code
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import evaluate
from implicit_diffusion.files.foreign import check_folder, consistent
from implicit_diffusion.models.chain_file import TrainedChain, read_chain
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import check_inputs, check_version
from implicit_diffusion.showing import Shown

SET_UP, MEASURED = 8, 9  # streams of noise: of the setup, and of samples that measure the deviations of several rewards
STARTS, REPEATS = 64, 16  # of these samples


@dataclass(frozen=True)
class TiltSpec:
    """What is asked for; None where the run says it, or a default.

    Args:
        model: RUN/model, or any other name of a model.
        reward: the rewards with their weights; none for those of the run.
        reward_python: that computes those of the user's own.
        prompts: text file; None for the prompts of the run.
        kl_weight: β.
        num_steps: N.
        noise: of what is drawn.
        device: its name, or "auto".
        trust_reward: whether the code of the reward that a run names may run in any case.
        size: height and width of a sample in pixels.
        frames: of a video.
        trust_model: whether the code that makes the model of a run may.
    """

    model: str
    reward: tuple[str, ...]
    reward_python: Path | None
    prompts: Path | None
    kl_weight: float | None
    num_steps: int | None
    noise: Noise
    device: str
    trust_reward: bool
    trust_model: bool
    size: tuple[int, int] | None = None
    frames: int | None = None


@dataclass(frozen=True, repr=False)
class Tilt(Shown):
    """A tilted law, and a chain that proposes its trajectories.

    Args:
        setup: with the chain and the reward; the chain's reference is u_0.
        beta: β.
        trained: the β that u_θ was trained with, or 0 where its training had no path KL; None where u_θ = u_0.
    """

    setup: Setup
    beta: float
    trained: float | None


def load_tilt(spec: TiltSpec, num_steps: int) -> Tilt:
    """The tilted law of a run, or of a model that no run has fine-tuned.

    Args:
        spec: what is asked for.
        num_steps: N of a model that no run has fine-tuned, where nothing is asked for.

    Raises:
        InvalidInputError: a run that is not finished, whose reference is gone, or whose folder does not fit together;
            options that contradict it; a reward that is not to be trusted; no reward or no β where there is no run.
    """
    folder = folder_of(spec.model)
    trained = None if folder is None else read_chain(folder)
    if folder is None or trained is None:
        return _untrained(spec, num_steps)
    return _of_run(spec, folder.absolute(), trained)


def _untrained(spec: TiltSpec, num_steps: int) -> Tilt:
    """The pretrained chain, steered by its weights alone."""
    if not spec.reward or spec.kl_weight is None:
        missing = " and ".join([*["--reward"] * (not spec.reward), *["--kl-weight"] * (spec.kl_weight is None)])
        raise InvalidInputError(
            f"--exact needs {missing}: no run has fine-tuned --model {spec.model}, and only RUN/model says what its "
            "run aimed at"
        )
    config = Config(
        model=spec.model,
        reward=spec.reward,
        reward_python=spec.reward_python,
        prompts=spec.prompts,
        kl_weight=spec.kl_weight,
        num_steps=spec.num_steps or (num_steps if factory_of(spec.model) is None else None),
        no_clip=True,
        size=spec.size,
        frames=spec.frames,
        device=spec.device,
    )
    config.check()
    setup = build(_forward_only(setup_spec(config), spec.noise))
    setup = replace(setup, chain=setup.chain.pretrained())
    scheduler = setup.pretrained.scheduler
    if scheduler is not None and scheduler.config.get("clip_sample", False):
        print("clip_sample of the model's scheduler is switched off: trajectories that are clipped have no weights")
    if len(config.reward) > 1:
        noise = spec.noise.stream(MEASURED)
        samples = evaluate(setup.chain, setup.reward, noise, starts=STARTS, repeats=REPEATS)
        setup = in_deviations(setup, deviations(setup, samples))
    return Tilt(setup, spec.kl_weight, None)


def _of_run(spec: TiltSpec, folder: Path, chain: TrainedChain) -> Tilt:
    """The chain that a run has trained, and the law that it aimed at."""
    directory = _run_of(folder)
    run = directory.path
    for flag, given in (("--reward", spec.reward), ("--reward-python", spec.reward_python)):
        if given:
            raise InvalidInputError(f"{flag}: {run} says which reward its model was trained for; leave {flag} out")
    config, summary = read_options(Config, directory), read_run_summary(run)
    with consistent(run):
        config.check()
    if spec.num_steps not in (None, len(chain.table)):
        raise InvalidInputError(
            f"--num-steps {spec.num_steps} is another chain than the {len(chain.table)} steps that {folder} was "
            "trained for, and has other weights; leave --num-steps out"
        )
    if spec.size not in (None, config.size) or spec.frames not in (None, config.frames):
        raise InvalidInputError(f"--size, --frames: the chain of {run} has samples of one size; leave them out")
    beta = _beta(spec, config, summary.training.kl_weight, run)
    noiseless = chain.table.noiseless()
    if config.penalty == "drift" and noiseless:
        raise InvalidInputError(
            f"--exact: {folder} was trained with --penalty drift on all rows, and row {noiseless[-1]} of "
            f"{chain.table.name} adds no noise, so that its trajectories have no weights against those of the "
            "pretrained model; finetune with --penalty path-kl, or name the pretrained model, with --reward and "
            "--kl-weight"
        )
    original = _original(config, run)
    config = _known(spec, config, directory)
    asked = _forward_only(setup_spec(config), spec.noise)
    network = replace(
        asked.network,
        model=str(folder),
        reference=original,
        lora_rank=None,
        lora_alpha=None,
        lora_targets=None,
        init_lora=None,
        gradient_checkpointing=False,
        compile=False,
        shard=False,
    )
    setup = build(replace(asked, network=network, device=spec.device))
    if "reference weights" in setup.weights:  # u_0, which config.json names under another option
        option = "model" if config.reference is None else "reference"
        check_weights(directory, {f"{option} weights": setup.weights["reference weights"]})
    if not chain.table.agrees_with(setup.chain.table):
        raise InvalidInputError(
            f"{folder}/chain.json holds {chain.table.name}, and {run} has trained {setup.chain.table.name}: they are "
            "different chains; put the file back as it was"
        )
    with consistent(run):
        setup = in_deviations(setup, [each.deviation for each in summary.rewards])
    return Tilt(setup, beta, summary.training.kl_weight if config.penalty == "path-kl" else 0.0)


def _run_of(folder: Path) -> RunDirectory:
    """The finished run that a fine-tuned model is part of."""
    run = folder.parent
    directory = RunDirectory(run)
    if not (run / "config.json").is_file():
        raise InvalidInputError(
            f"--exact: {folder} was fine-tuned, and the run that did it is not around it: there is no "
            f"{run / 'config.json'}; name the model where its run left it, RUN/model"
        )
    check_folder(run)
    origin = directory.read_origin()
    if origin is None or origin.command != "finetune":
        raise InvalidInputError(f"--exact: {run} is not a run of `finetune`; name RUN/model of one")
    if not (run / "summary.json").is_file():
        raise InvalidInputError(
            f"{run} is not finished: it has no summary.json; {directory.resume_command} continues it"
        )
    check_version(directory, advice="draw from its model with that version")
    return directory


def _beta(spec: TiltSpec, config: Config, trained: float, run: Path) -> float:
    """β, as asked for, or as the run says."""
    if spec.kl_weight is not None:
        return spec.kl_weight
    if config.penalty == "drift" or not trained > 0:
        had = "--penalty drift, which is no KL" if config.penalty == "drift" else "--kl-weight 0"
        raise InvalidInputError(f"--exact needs a --kl-weight: {run} was trained with {had}")
    return trained


def _original(config: Config, run: Path) -> str:
    """The name of the model that the run's KL refers to.

    Raises:
        InvalidInputError: it is gone, or cannot be loaded.
    """
    name = config.reference or config.model
    if is_factory(name):
        return name  # its file is looked at where it is opened
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise InvalidInputError(
            f"--exact compares with the model that {run} was trained from, and {name} is gone; put it back"
        )
    folder_of(name)
    return name


def _known(spec: TiltSpec, config: Config, directory: RunDirectory) -> Config:
    """The options of the run, with the prompts that are asked for, once what they name is known to be what it was.

    Raises:
        InvalidInputError: the reward or the model has changed; a reward or a model's code that is not to be trusted.
    """
    if not spec.trust_reward:
        for name in names_of(config.reward):
            check_trust(name, directory.path, config.reward_python)
    named = config if config.reference is None else replace(config, model="digits")  # it is not read, nor need it exist
    check_models(named, directory.path, trusted=spec.trust_model)
    trusted = (*["reward"] * spec.trust_reward, *(with_code(named) if spec.trust_model else ()))
    check_inputs(directory, {name: of for name, of in inputs(named).items() if name.partition(" ")[0] not in trusted})
    own = config.with_own_prompts(directory.path)
    return replace(own, prompts=spec.prompts or own.prompts, held_out_prompts=None)


def _forward_only(spec: SetupSpec, noise: Noise) -> SetupSpec:
    """The spec of a setup that no gradient is taken of, and without the judges, who have no part in R."""
    return replace(spec, judge=(), estimator="score", noise=noise.stream(SET_UP))
