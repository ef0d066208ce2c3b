"""From a spec to a setup: model, adapters, conditions, chain and reward, each checked before any long work.

    load → adapters → device → embeddings and guidance → u_θ, u_0 → chain → reward of its states

What is quick to refuse comes first: text encoders read prompts only when model, table and reference are known to fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.finetune.estimators import BLACK_BOX, Chosen, check_chain, chosen, no_gradient
from implicit_diffusion.commands.finetune.precision import check_precision, compiled
from implicit_diffusion.commands.finetune.specs import ChainSpec, NetworkSpec, SetupSpec
from implicit_diffusion.commands.rewards.names import blamed, load_reward
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.rewards.weights import labels, names_of
from implicit_diffusion.commands.shared.conditioning import Conditioning, conditioning
from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations
from implicit_diffusion.denoisers.sharded import shard
from implicit_diffusion.errors import InvalidInputError, NoGradientError, RewardError
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.frozen import frozen_copy
from implicit_diffusion.function_checks import FunctionWarning
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.pretrained import Pretrained, as_pipeline, load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward, WeightedRewards
from implicit_diffusion.objectives.weighted_rewards import named
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import TRIAL, Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import default_sampler, pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.table import ChainTable

PLAN, DURING, AFTER, ADAPTER, SHOWN, ESTIMATOR = 1, 2, 3, 4, 5, 6  # streams of noise apart from training's
IN_REPORT = 20  # starts whose images a report shows
MEANING = ("prediction_type", "num_train_timesteps")  # of a network's output and of its times


class Exported(NamedTuple):
    """What a pipeline is exported with.

    Args:
        scheduler: that the pipeline is saved with.
        table: of the chain that the pipeline then runs.
    """

    scheduler: Any
    table: ChainTable


@dataclass(frozen=True, repr=False)
class Setup(Shown):
    """A checkpoint, its chain and the reward: all that does not depend on β.

    Args:
        spec: that it was made from.
        pretrained: the checkpoint.
        sampler: name of the chain's sampler.
        chain: that is trained.
        reward: of the chain's states, tried on two samples. Of several, R has meaning once it is `weighing.weighed`.
        clipping: effect of switching `clip_sample` off; None where it was not on, and before `weighing.weighed`.
        exported: scheduler and table of the exported pipeline.
        conditioning: what trajectories are sampled under.
        compiled: result of the compilation; None where none was asked for.
        estimator: of the gradient.
    """

    spec: SetupSpec
    pretrained: Pretrained
    sampler: str
    chain: Chain
    reward: Reward
    clipping: ClippingEffect | None
    exported: Exported
    conditioning: Conditioning
    compiled: str | None
    estimator: Chosen

    @torch.no_grad()
    def decoded(self, *evaluations: Evaluation) -> tuple[Tensor, ...] | None:
        """Images of the first starts of each evaluation; None where samples are images already."""
        decoder = self.pretrained.decoder
        if decoder is None:
            return None
        return tuple(decoder(evaluation.samples[:IN_REPORT, 0]) for evaluation in evaluations)

    @property
    def eta(self) -> float | None:
        """Noise of DDIM; None for other samplers."""
        return self.spec.chain.eta if self.sampler == "ddim" else None

    @property
    def guidance(self) -> float | None:
        """Scale of classifier-free guidance; None for an unconditional model."""
        return self.conditioning.guidance if self.chain.condition else None


@part("loading")
def build(spec: SetupSpec) -> Setup:
    """Load everything, and try the reward on two pretrained samples.

    Raises:
        InvalidInputError: from any of the parts; see `load_pretrained`, `scheduler_for`, `table_for`, `add_lora`,
            `conditioning`, `load_reward`, `Reward.check_slope`.
    """
    device = find_device(spec.device)
    with GlobalGenerators(spec.noise, PLAN, 0, device=device):
        return _build(spec, device)


def _build(spec: SetupSpec, device: torch.device) -> Setup:
    elsewhere: dict[str, Any] = {"python": spec.reward_python, "timeout": spec.reward_timeout}
    names = names_of(spec.reward)
    functions = {label: load_reward(name, device, **elsewhere) for label, name in zip(labels(spec.reward), names)}
    precision = check_precision(spec.network.precision, device)
    pretrained = load_pretrained(spec.network.model)
    clip = False if spec.chain.no_clip or pretrained.family.latent else None
    sampler = spec.chain.sampler or default_sampler(pretrained.scheduler)
    scheduler = scheduler_for(pretrained.scheduler, sampler, clip=clip)
    table = table_for(scheduler, sampler, spec.chain.num_steps, eta=spec.chain.eta)
    exported = _exported(pretrained, scheduler, sampler, spec.chain)
    original = None if spec.network.reference is None else _original(spec.network, pretrained)
    if spec.network.lora_rank is not None:
        given = spec.network.lora_targets
        targets = given and [target.strip() for target in given.split(",")]
        add_lora(pretrained.denoiser.model, spec.network.lora_rank, spec.noise.stream(ADAPTER), targets)
    for model in filter(None, (pretrained, original)):
        _place(model, device, precision, spec.network)
    conditions = conditioning(spec.conditions, pretrained, device)
    chain = _chain(spec, table, pretrained, original, conditions, device)
    note = compiled(chain) if spec.network.compile else None
    reward, estimator = _checked(_reward(functions, conditions, pretrained), spec, chain)
    check_chain(estimator.name, chain)
    return Setup(spec, pretrained, sampler, chain, reward, None, exported, conditions, note, estimator)


def _reward(
    functions: Mapping[str, Callable[..., Any]], conditions: Conditioning, pretrained: Pretrained
) -> Reward | WeightedRewards:
    """The reward of the chain's states, which are decoded once for all functions."""

    def of_states(function: Callable[..., Any]) -> Callable[..., Any]:
        return conditions.of_states(function, pretrained.decoder)

    if len(functions) > 1:
        return WeightedRewards(functions, through=of_states)
    (function,) = functions.values()
    return Reward(of_states(function))


def _chain(
    spec: SetupSpec,
    table: ChainTable,
    pretrained: Pretrained,
    original: Pretrained | None,
    conditions: Conditioning,
    device: torch.device,
) -> Chain:
    """The chain of u_θ and u_0, whose weights are shared out where that is asked for.

    Raises:
        InvalidInputError: no row is left to train.
    """
    denoiser = conditions.around(pretrained.denoiser)
    reference: nn.Module
    if original is not None:
        reference = conditions.around(original.denoiser).eval().requires_grad_(False)
    elif spec.network.lora_rank is not None:
        reference = WithoutAdapter(denoiser)
    else:
        reference = frozen_copy(denoiser)
    if spec.network.shard:
        for each in (denoiser, reference) if spec.network.lora_rank is None else (denoiser,):
            shard(each, device)
    rows: Literal["noiseless"] | tuple[()] = "noiseless" if spec.chain.noiseless_rows_pretrained else ()
    chain = Chain(
        denoiser, table, pretrained.event_shape, reference=reference, pretrained_rows=rows, condition=conditions.drawn
    )
    if not chain.trained_rows:
        raise InvalidInputError(
            f"no row of {table.name} has noise, so a path KL leaves nothing to train; use a --scheduler with noise "
            "(ddpm, ddim with --eta 1, euler-ancestral, flow-memoryless), or finetune with --penalty drift"
        )
    return chain


def _checked(reward: Reward, spec: SetupSpec, chain: Chain) -> tuple[Reward, Chosen]:
    """The reward, or each of several, checked on two pretrained samples; and the estimator that suits it.

    What is unusual about it is printed.
    """
    source = Noise(0)
    trial = chain.endpoint(chain.sample(source, 2, TRIAL), source, TRIAL)
    names = names_of(spec.reward)
    members = reward.members if isinstance(reward, WeightedRewards) else (reward,)
    reasons: list[str | None] = []
    for member, name in zip(members, names, strict=True):
        with named(short(name)) if len(names) > 1 else nullcontext():
            reasons.append(_check(member, name, trial, spec))
    return reward.as_checked(), chosen(spec.estimator, next(filter(None, reasons), None))


def _check(reward: Reward, name: str, trial: Particles, spec: SetupSpec) -> str | None:
    """Check one reward; why its gradient cannot be followed, where that is to be decided."""
    why_not = None
    with blamed(name, "; a reward maps samples (n, …) to (n,), and leaves the samples alone"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reward.check_value(trial)
            if spec.estimator == "auto":
                why_not = no_gradient(reward, trial)
            elif spec.estimator not in BLACK_BOX:
                _check_slope(reward, trial, spec.estimator)
        for each in caught:
            if issubclass(each.category, FunctionWarning):
                print(f"reward    {short(name)} {str(each.message).removeprefix('reward ')}")
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        _say_if_unsteady(reward, name, trial, spec.noise)
    return why_not


def _check_slope(reward: Reward, trial: Particles, estimator: str) -> None:
    try:
        reward.check_slope(trial)
    except (NoGradientError, RewardError) as error:
        raise InvalidInputError(f"{error}; or leave out --estimator {estimator}, which needs a gradient") from error


@torch.no_grad()
def _say_if_unsteady(reward: Reward, name: str, trial: Particles, noise: Noise) -> None:
    """Print that a reward has a state of its own: other values from the same samples and the same global generators."""
    values: list[Tensor] = []
    for _ in range(2):
        with GlobalGenerators(noise, PLAN, 3, device=trial.x.device):
            values.append(reward.of(trial))
    if not torch.allclose(values[0], values[1]):
        print(
            f"reward    {short(name)} gives other values on the same samples when called again, with the global "
            "generators as they were: it has a state of its own, which no checkpoint keeps, and a resumed run will not "
            "be the same. Let it draw from the generators of torch, NumPy or Python themselves"
        )


def _exported(pretrained: Pretrained, scheduler: Any, sampler: str, chain: ChainSpec) -> Exported:
    """The scheduler that the exported pipeline is saved with, and the chain that it then runs.

    Raises:
        InvalidInputError: no pipeline of diffusers runs it.
    """
    saved, its_sampler = pipeline_for(scheduler, sampler)
    if pretrained.family is PIXELS:
        as_pipeline(pretrained.denoiser, saved)
    eta = chain.eta if sampler == "ddim" and pretrained.family.passes_eta else 0.0
    return Exported(saved, table_for(saved, its_sampler, chain.num_steps, eta=eta))


def _place(pretrained: Pretrained, device: torch.device, precision: torch.dtype | None, spec: NetworkSpec) -> None:
    """Set device, precision, checkpoints and memory format of a network. One that is shared out stays on the CPU."""
    if spec.gradient_checkpointing:
        checkpoint_activations(pretrained.denoiser.model)
    pretrained.denoiser.precision = precision
    if not spec.shard:
        pretrained.denoiser.to(device)
    if pretrained.decoder is not None:
        pretrained.decoder.to(device)
    if pretrained.family.convolutional and not spec.shard:
        torch.nn.utils.convert_conv2d_weight_memory_format(pretrained.denoiser, torch.channels_last)  # a third faster


def _original(network: NetworkSpec, pretrained: Pretrained) -> Pretrained:
    """The model of --reference, which must be one that `pretrained` can have been trained from."""
    assert network.reference is not None
    original = load_pretrained(network.reference)
    for what, ours, theirs in (
        ("samples", pretrained.event_shape, original.event_shape),
        ("network", pretrained.family.network, original.family.network),
        ("classes", pretrained.num_classes, original.num_classes),
        *((key, *(each.scheduler.config.get(key) for each in (pretrained, original))) for key in MEANING),
    ):
        if ours != theirs:
            raise InvalidInputError(
                f"--reference {network.reference} is not the original of --model {network.model}: its {what} are "
                f"{theirs}, not {ours}"
            )
    return original
