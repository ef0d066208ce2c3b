"""From a spec to a setup: model, adapters, conditions, chain and reward, each checked before any long work.

    load → adapters → embeddings and guidance → device → u_θ, u_0 → chain → reward of its states

What is quick to refuse comes first: text encoders read prompts only when model, table and reference are known to fit.
The encoders have left the device when the network comes to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.finetune.problem import functions
from implicit_diffusion.commands.finetune.problem.adapters import add_adapters
from implicit_diffusion.commands.finetune.problem.estimators import Chosen, check_chain
from implicit_diffusion.commands.finetune.problem.fitting import check_fit
from implicit_diffusion.commands.finetune.problem.opened import open_chain, original_of
from implicit_diffusion.commands.finetune.problem.precision import check_precision, slower_than_float32
from implicit_diffusion.commands.finetune.problem.sampler import Exported
from implicit_diffusion.commands.finetune.specs import NetworkSpec, SetupSpec
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.commands.shared.models.by_name import weights_of
from implicit_diffusion.commands.shared.models.factories import factory_of
from implicit_diffusion.commands.shared.pictures import filmstrips
from implicit_diffusion.denoisers.lora import WithoutAdapter, checkpoint_activations
from implicit_diffusion.denoisers.sharded import shard
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.frozen import frozen_copy
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.models.own_models.opened import OwnModel, check_adapted
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.objectives import Reward, WeightedRewards
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.table import ChainTable

PLAN, DURING, AFTER, ADAPTER, SHOWN, ESTIMATOR = 1, 2, 3, 4, 5, 6  # streams of noise apart from training's
IN_REPORT = 20  # starts whose images a report shows


@dataclass(frozen=True, repr=False)
class Setup(Shown):
    """A checkpoint, its chain and the reward: all that does not depend on β.

    Args:
        spec: that it was made from.
        pretrained: the checkpoint, or a model of the user's own.
        sampler: name of the chain's sampler; None for a table that the model comes with.
        chain: that is trained.
        reward: of the chain's states, tried on two samples. Of several, R has meaning once it is `weighing.weighed`.
        judged: the reward with its judges; None without a judge.
        clipping: effect of switching `clip_sample` off; None where it was not on, and before `weighing.weighed`.
        exported: scheduler and table of the exported model.
        conditioning: what trajectories are sampled under.
        compiled: result of the compilation; None where none was asked for, and before `compiling.compile_networks`.
        estimator: of the gradient.
        frozen: the pretrained network under guidance of a scale.
        weights: fingerprints of weights that factories have returned, for `runs.provenance`.
    """

    spec: SetupSpec
    pretrained: Pretrained
    sampler: str | None
    chain: Chain
    reward: Reward
    judged: WeightedRewards | None
    clipping: ClippingEffect | None
    exported: Exported
    conditioning: Conditioning
    compiled: str | None
    estimator: Chosen
    weights: dict[str, Any]
    frozen: Callable[[float], nn.Module]

    @property
    def untrained(self) -> Chain | None:
        """The chain that training begins with; None where that is the pretrained one."""
        given = self.conditioning
        if given.student_guidance == given.guidance:
            return None
        return self.chain.replace(denoiser=self.frozen(given.student_guidance))

    def under(self, guidance: float, student_guidance: float) -> Chain:
        """The chain to be trained under other scales of guidance."""
        denoiser = self.conditioning.around(self.pretrained.denoiser, student_guidance)
        return self.chain.replace(denoiser=denoiser, reference=self.frozen(guidance))

    @property
    def measured(self) -> Reward:
        """What evaluations measure: the reward, and beside it the judges, which have no part in R."""
        if self.judged is None:
            return self.reward
        raised = self.reward.coefficients if isinstance(self.reward, WeightedRewards) else (1.0,)
        return self.judged.with_coefficients((*raised, *[0.0] * len(self.spec.judge)))

    @torch.no_grad()
    def decoded(self, *evaluations: Evaluation) -> tuple[Tensor, ...] | None:
        """Images of the first starts of each evaluation; None where samples are images already."""
        decoder = self.pretrained.decoder
        if decoder is None:
            return None
        return tuple(filmstrips(decoder(evaluation.samples[:IN_REPORT, 0])) for evaluation in evaluations)

    @property
    def given_start(self) -> bool:
        """Whether the reward's deviation is that between samples of one start, which differ by noise alone: under
        prompts or labels, if the chain has noise.
        """
        return self.chain.condition is not None and bool(self.chain.table.s.any())

    @property
    def eta(self) -> float | None:
        """Noise of DDIM; None for other samplers."""
        return self.spec.chain.eta if self.sampler == "ddim" else None

    @property
    def guidance(self) -> float | None:
        """Scale of classifier-free guidance of the pretrained chain; None for a model without one."""
        return self.conditioning.guidance if self.chain.condition and self.pretrained.family.guided else None

    @property
    def student_guidance(self) -> float | None:
        """Scale of classifier-free guidance of the trained chain; None for an unconditional model."""
        return self.conditioning.student_guidance if self.guidance is not None else None


@part("loading")
def build(spec: SetupSpec) -> Setup:
    """Load everything, and try the reward on two pretrained samples.

    Raises:
        InvalidInputError: from any of the parts; see `open_chain`, `add_adapters`, `conditioning`,
            `load_reward`, `Reward.check_slope`.
    """
    device = find_device(spec.device)
    with GlobalGenerators(spec.noise, PLAN, 0, device=device):
        return _build(spec, device)


def _build(spec: SetupSpec, device: torch.device) -> Setup:
    loaded = functions.load(spec, device)
    precision = check_precision(spec.network.precision, device)
    network = spec.network
    if spec.flight is not None and factory_of(network.model) is None:  # by headers of weights
        check_fit(spec, spec.flight, device)
    opened = open_chain(spec)
    pretrained = opened.pretrained
    original = None if network.reference is None else original_of(spec, pretrained)
    weights = weights_of({"model": pretrained, "reference": original})
    if network.adapted:
        add_adapters(pretrained.denoiser.model, network, spec.noise.stream(ADAPTER), pretrained.family)
        if isinstance(pretrained, OwnModel):
            check_adapted(pretrained)
    conditions = opened.conditions(device)
    for model in filter(None, (pretrained, original)):
        _place(model, device, precision, network)
    frozen = _frozen(network, pretrained, original, conditions)
    chain = _chain(spec, opened.table, pretrained, frozen(conditions.guidance), conditions, device)
    if (slow := slower_than_float32(chain)) is not None:
        print(f"precision {slow}")

    def of_states(function: Callable[..., Any]) -> Callable[..., Any]:
        return conditions.of_states(function, pretrained.decoder)

    def generators() -> GlobalGenerators:
        return GlobalGenerators(spec.noise, PLAN, 3, device=device)

    tried = functions.tried(loaded, of_states, spec, chain, generators)
    check_chain(tried.estimator.name, chain)
    return Setup(
        spec,
        pretrained,
        opened.sampler,
        chain,
        tried.reward,
        tried.judged,
        None,
        opened.exported,
        conditions,
        None,
        tried.estimator,
        weights,
        frozen,
    )


def _frozen(
    spec: NetworkSpec, pretrained: Pretrained, original: Pretrained | None, conditions: Conditioning
) -> Callable[[float], nn.Module]:
    """u_0 by the scale of its guidance; all of them share their weights."""
    if original is None and spec.adapted:
        return lambda guidance: WithoutAdapter(conditions.around(pretrained.denoiser, guidance))
    network = frozen_copy(pretrained.denoiser) if original is None else original.denoiser.requires_grad_(False)
    return lambda guidance: conditions.around(network, guidance).eval()


def _chain(
    spec: SetupSpec,
    table: ChainTable,
    pretrained: Pretrained,
    reference: nn.Module,
    conditions: Conditioning,
    device: torch.device,
) -> Chain:
    """The chain of u_θ and u_0, whose weights are shared out where that is asked for.

    Raises:
        InvalidInputError: no row is left to train.
    """
    denoiser = conditions.around(pretrained.denoiser, conditions.student_guidance)
    if spec.network.shard:
        for each in (denoiser, reference) if not spec.network.adapted else (denoiser,):
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
