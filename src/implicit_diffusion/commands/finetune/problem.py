"""From a configuration to a problem: model, adapters, conditions, chain and reward, each checked before any long work.

    load → adapters → device → embeddings and guidance → u_θ, u_0 → chain → reward of its states

What is quick to refuse comes first: text encoders read prompts only when model, table and reference are known to fit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.finetune import judging
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.precision import check_precision, compiled
from implicit_diffusion.commands.rewards.names import blamed, load_reward
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.shared.conditioning import Conditioning, conditioning
from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.global_generators import Draws
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.on_chain import ChainLoop
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.pretrained import Pretrained, as_pipeline, load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, Objective, PathKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import clipped_for, default_sampler, pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.table import ChainTable

PLAN, DURING, AFTER, ADAPTER = 1, 2, 3, 4  # streams of noise apart from training's
ETA = 1.0  # of DDIM, where nothing is said: as much noise as DDPM
SHOWN = 20  # starts whose images a report shows


@dataclass(frozen=True, repr=False)
class Problem(Shown):
    """A checkpoint, its chain and the reward: all that does not depend on β."""

    pretrained: Pretrained
    kind: str
    chain: Chain
    reward: Reward
    clipping: dict[str, float] | None
    exported: tuple[Any, ChainTable]  # the scheduler of the exported pipeline, and the chain that it runs
    conditioning: Conditioning
    compiled: str | None

    @torch.no_grad()
    def decoded(self, *evaluations: Evaluation) -> tuple[Tensor, ...] | None:
        """Images of the first starts of each; None where samples are images already."""
        decoder = self.pretrained.decoder
        return None if decoder is None else tuple(decoder(found.samples[:SHOWN, 0]) for found in evaluations)


@part("loading")
def build(config: Config) -> Problem:
    """Load everything, try the reward on two pretrained samples.

    Raises:
        InvalidInputError: from any of the parts; see `load_pretrained`, `scheduler_for`, `table_for`, `add_lora`,
            `conditioning`, `load_reward`, `Reward.check`.
    """
    device = find_device(config.device)
    with Draws(Noise(config.seed), PLAN, 0, device=device):
        return _build(config, device)


def _build(config: Config, device: torch.device) -> Problem:
    loaded = load_reward(config.reward, device)
    precision = check_precision(config.precision, device)
    pretrained = load_pretrained(config.model)
    clip = False if config.no_clip or pretrained.family.latent else None
    kind = config.scheduler or default_sampler(pretrained.scheduler)
    scheduler = scheduler_for(pretrained.scheduler, kind, clip=clip)
    table = table_for(scheduler, kind, config.num_steps, eta=ddim_eta(config))
    exported = _exported(pretrained, scheduler, kind, config)
    rows: Literal["noiseless"] | tuple[()] = "noiseless" if config.penalty == "path-kl" else ()
    original = None if config.reference is None else _original(config.reference, config.model, pretrained)
    if config.lora_rank is not None:
        targets = config.lora_targets and [target.strip() for target in config.lora_targets.split(",")]
        add_lora(pretrained.denoiser.model, config.lora_rank, Noise(config.seed).stream(ADAPTER), targets)
    for model in filter(None, (pretrained, original)):
        _place(model, config, device, precision)
    given = conditioning(config, pretrained, device)
    denoiser = given.around(pretrained.denoiser)
    reference: nn.Module | None = None  # a frozen copy of the denoiser
    if original is not None:
        reference = given.around(original.denoiser).eval().requires_grad_(False)
    elif config.lora_rank is not None:
        reference = WithoutAdapter(denoiser)
    chain = Chain(
        denoiser, table, pretrained.event_shape, reference=reference, pretrained_rows=rows, condition=given.drawn
    )
    if not chain.trained_rows:
        raise InvalidInputError(
            f"no row of {table.name} has noise, so a path KL leaves nothing to train; take a --scheduler with noise "
            "(ddpm, ddim with --eta 1, euler-ancestral, flow-memoryless), or finetune with --penalty drift"
        )
    note = compiled(chain, config.compile)
    reward = Reward(given.of_states(loaded, pretrained.decoder))
    trial = judging.particles(chain)
    with blamed(config.reward, "; a reward takes samples (n, …) to (n,), by torch operations that leave them alone"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reward.check_value(trial)
            reward.check_slope(trial)
        for each in said:
            if str(each.message).startswith("reward is "):  # random, or flat
                print(f"reward    {short(config.reward)} {str(each.message).removeprefix('reward ')}")
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        reward = reward.as_checked()
        say_if_unsteady(reward, config, trial)
    clipping = None
    if config.no_clip and pretrained.scheduler.config.get("clip_sample", False):
        clipped, options = clipped_for(pretrained.scheduler, kind, noisy=bool(table.s.any()), eta=ddim_eta(config))
        clipping = judging.effect_of_clipping(chain, clipped, reward, Noise(config.seed).stream(PLAN), options)
    return Problem(pretrained, kind, chain, reward, clipping, exported, given, note)


@torch.no_grad()
def say_if_unsteady(reward: Reward, config: Config, trial: Particles) -> None:
    """Say that a reward has a state of its own: other values from the same samples and the same global generators."""
    values: list[Tensor] = []
    for _ in range(2):
        with Draws(Noise(config.seed), PLAN, 3, device=trial.x.device):
            values.append(reward.of(trial))
    if not torch.allclose(values[0], values[1]):
        print(
            f"reward    {short(config.reward)} gives other values on the same samples when called again, with the "
            "global generators as they were: it has a state of its own, which no checkpoint keeps, and a resumed run "
            "will not be the same. Let it draw from the generators of torch, NumPy or Python themselves"
        )


def ddim_eta(config: Config) -> float:
    """η of --scheduler ddim."""
    return ETA if config.eta is None else config.eta


def _exported(pretrained: Pretrained, scheduler: Any, kind: str, config: Config) -> tuple[Any, ChainTable]:
    """The scheduler that the exported pipeline is saved with, and the chain that it then runs.

    Raises:
        InvalidInputError: no pipeline of diffusers runs it.
    """
    saved, its_kind = pipeline_for(scheduler, kind)
    if pretrained.family is PIXELS:
        as_pipeline(pretrained.denoiser, saved)
    eta = ddim_eta(config) if kind == "ddim" and pretrained.family.passes_eta else 0.0
    return saved, table_for(saved, its_kind, config.num_steps, eta=eta)


def _place(pretrained: Pretrained, config: Config, device: torch.device, precision: torch.dtype | None) -> None:
    """Device, precision, checkpoints and memory format of a network."""
    if config.gradient_checkpointing:
        checkpoint_activations(pretrained.denoiser.model)
    pretrained.denoiser.precision = precision
    pretrained.denoiser.to(device)
    if pretrained.decoder is not None:
        pretrained.decoder.to(device)
    if pretrained.family.convolutional:
        torch.nn.utils.convert_conv2d_weight_memory_format(pretrained.denoiser, torch.channels_last)  # a third faster


def _original(reference: str, model: str, pretrained: Pretrained) -> Pretrained:
    """The model of --reference, which must be one that `pretrained` can have come from."""
    original = load_pretrained(reference)
    for what, ours, theirs in (
        ("samples", pretrained.event_shape, original.event_shape),
        ("network", pretrained.family.network, original.family.network),
        ("classes", pretrained.num_classes, original.num_classes),
        *((key, *(each.scheduler.config.get(key) for each in (pretrained, original))) for key in MEANING),
    ):
        if ours != theirs:
            raise InvalidInputError(
                f"--reference {reference} is no original of --model {model}: its {what} are {theirs}, not {ours}"
            )
    return original


MEANING = ("prediction_type", "num_train_timesteps")  # of a network's output and of its times


@part("loading")
def make_loop(config: Config, problem: Problem, noise: Noise) -> ChainLoop:
    """The loop that `config` asks for, before β and the clip are known; `scale` sets them."""
    penalty: Objective = PathKL() if config.penalty == "path-kl" else DriftPenalty()
    objective = problem.reward + (1.0 if config.kl_weight is None else config.kl_weight) * penalty
    trained = [p for p in problem.pretrained.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr)
    update = Update(
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates),
        ema_decay=config.ema,
        accumulate=config.accumulate,
    )
    if config.loop == "nested":
        return Nested(problem.chain, objective, update, batch=config.batch, noise=noise)
    return Queue(problem.chain, objective, update, batch=config.batch, noise=noise, stride=config.stride or 1)


def scale(loop: ChainLoop, beta: float, max_grad_norm: float) -> None:
    """Set what the plan decides: β, and the clip, since the norm of Γ is in units of the reward."""
    loop.objective = loop.objective.with_weight(PathKL, beta).with_weight(DriftPenalty, beta)
    loop.update.max_grad_norm = max_grad_norm
