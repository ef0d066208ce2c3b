"""What each stage of a fine-tuning run receives: the options of the command, split by stage.

    SetupSpec      model, conditions, chain, reward   →  setup
    PlanSpec       sizes of the plan                  →  planning
    TrainingSpec   loop, optimizer, target            →  training

Nothing but the command itself sees all options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.finetune.config import STEPS, Config
from implicit_diffusion.commands.finetune.problem.estimators import Asked
from implicit_diffusion.commands.rewards.weights import judge_labels
from implicit_diffusion.commands.shared.conditioning import ConditioningSpec
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import world_size

ETA = 1.0  # noise of DDIM by default: as much as DDPM has


@dataclass(frozen=True)
class NetworkSpec:
    """The network that is trained, and how it computes.

    Args:
        model: "digits", a folder, a hub id, or FILE.py:factory.
        reference: the model that the KL refers to; None for `model` itself.
        lora_rank: rank of the adapters; None to train all weights.
        lora_alpha: α of the adapters; None for the default.
        lora_targets: ends of the names of the layers that get adapters, separated by commas; None for the default.
        init_lora: where the adapters are that training goes on from; None to begin with new ones.
        gradient_checkpointing: whether activations are computed again for the gradient.
        precision: of the network, by autocast.
        compile: whether the network is compiled.
        shard: whether the weights are shared out over the processes.
    """

    model: str
    reference: str | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: str | None
    init_lora: Path | None
    gradient_checkpointing: bool
    precision: Literal["float32", "bf16", "fp16"]
    compile: bool
    shard: bool

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, rather than all weights."""
        return self.lora_rank is not None or self.init_lora is not None

    @property
    def targets(self) -> list[str] | None:
        """Ends of the names of the layers that get adapters; None for the default."""
        return [target.strip() for target in self.lora_targets.split(",")] if self.lora_targets else None


@dataclass(frozen=True)
class ChainSpec:
    """The chain that is trained.

    Args:
        sampler: name of the sampler, such as "ddpm"; None for the default of the checkpoint.
        num_steps: N; None for the default, or for the rows of a table that the model comes with.
        eta: noise of DDIM; other samplers do not use it.
        no_clip: whether the scheduler's `clip_sample` is switched off.
        noiseless_rows_pretrained: whether rows without noise keep the pretrained network.
        size: height and width of a sample in pixels; None for those of the model.
        frames: of a video; None for those of the model's pipeline, and for images.
    """

    sampler: str | None
    num_steps: int | None
    eta: float
    no_clip: bool
    noiseless_rows_pretrained: bool
    size: tuple[int, int] | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Flight:
    """How much there is at a time, of one process.

    Args:
        samples: that one call with gradient serves.
        events: states and adjoints of all trajectories in flight.
        parts: processes that the weights are shared out over, where they are.
        ending: samples that end together.
    """

    samples: int
    events: int
    parts: int
    ending: int


@dataclass(frozen=True)
class SetupSpec:
    """All that does not depend on β or on how the training goes.

    Args:
        network: see there.
        conditions: see there.
        chain: see there.
        reward: the rewards as they were given, each with its weight.
        judge: the names of the judges.
        reward_python: that computes those of the user's own in processes of their own; None for this process.
        reward_timeout: seconds that such a process may take for an answer.
        estimator: of the gradient, by name, or "auto".
        noise: of the run.
        device: its name, or "auto".
        flight: see there; None where it is not known how the chain will be trained.
    """

    network: NetworkSpec
    conditions: ConditioningSpec
    chain: ChainSpec
    reward: Sequence[str]
    judge: Sequence[str]
    reward_python: Path | None
    reward_timeout: float
    estimator: Asked
    noise: Noise
    device: str
    flight: Flight | None = None


@dataclass(frozen=True)
class PlanSpec:
    """The plan.

    Args:
        starts: number of initial noises.
        asked: a KL weight that the plan should have, besides its own.
        bounded: whether the penalty is a path KL, so that there are bounds.
        alone: whether the plan is all that was asked for, so that pretrained samples are shown.
    """

    starts: int
    asked: float | None
    bounded: bool
    alone: bool


@dataclass(frozen=True)
class TrainingSpec:
    """The training.

    Args:
        loop: its algorithm.
        stride: steps that a trajectory in the queue moves per iteration.
        batch: trajectories that start in each iteration.
        updates: number of optimizer steps.
        lr: learning rate of Adam at the start.
        accumulate: gradients that are averaged for one update.
        ema: decay rate of the moving average of the weights; None without an average.
        penalty: what β weighs.
        target_kl: path KL to aim at, in nats; None without a target.
        stop_at_target: whether to stop at the target, rather than adapt β.
        held_out: trajectories of the checks on held-out noise.
        keep: number of checkpoints that stay.
        judged_by: labels of the judges.
        best: whether the run ends with the best model by the first judge.
        depth: steps that the truncated estimator reaches; None for the least.
    """

    loop: Literal["queue", "nested"]
    stride: int
    batch: int
    updates: int
    lr: float
    accumulate: int
    ema: float | None
    penalty: Literal["path-kl", "drift"]
    target_kl: float | None
    stop_at_target: bool
    held_out: int
    keep: int
    judged_by: tuple[str, ...]
    best: bool
    depth: int | None


def setup_spec(config: Config) -> SetupSpec:
    """The options that the setup uses."""
    network = NetworkSpec(
        config.model,
        config.reference,
        config.lora_rank,
        config.lora_alpha,
        config.lora_targets,
        config.init_lora,
        config.gradient_checkpointing,
        config.precision,
        config.compile,
        config.shard,
    )
    conditions = ConditioningSpec(
        config.model,
        config.prompts,
        config.guidance,
        config.null_class,
        config.held_out_prompts,
        config.student_guidance,
    )
    eta = ETA if config.eta is None else config.eta
    sizes = config.size, config.frames
    chain = ChainSpec(config.scheduler, config.num_steps, eta, config.no_clip, config.penalty == "path-kl", *sizes)
    reward = config.reward, config.judge, config.reward_python, config.reward_timeout
    noise, flight = Noise(config.seed), _flight(config)
    return SetupSpec(network, conditions, chain, *reward, config.estimator, noise, config.device, flight)


def _flight(config: Config) -> Flight:
    """At the fullest moment, as in `loops.memory`; the nested loop is the queue whose stride is N."""
    batch = max(1, config.batch // world_size())
    num_steps = config.num_steps or STEPS
    stride = num_steps if config.loop == "nested" else config.stride or -(-num_steps // 10)
    stages = -(-num_steps // stride)
    return Flight(stages * batch, (stages * (num_steps + 1) - 1 + stages) * batch, world_size(), batch)


def plan_spec(config: Config) -> PlanSpec:
    """The options that the plan uses."""
    return PlanSpec(config.starts, config.kl_weight, bounded=config.penalty == "path-kl", alone=config.plan)


def training_spec(config: Config) -> TrainingSpec:
    """The options that the training uses."""
    return TrainingSpec(
        loop=config.loop,
        stride=config.stride or 1,
        batch=config.batch,
        updates=config.updates,
        lr=config.lr,
        accumulate=config.accumulate,
        ema=config.ema,
        penalty=config.penalty,
        target_kl=config.target_kl,
        stop_at_target=config.target_kl_mode == "stop",
        held_out=min(64, 8 * config.starts),
        keep=config.keep,
        judged_by=judge_labels(config.reward, config.judge),
        best=config.export == "best",
        depth=config.depth,
    )
