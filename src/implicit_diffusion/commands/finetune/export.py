"""What a run exports: the pipeline or the weights, adapters by themselves, and the chain; and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from implicit_diffusion.commands.finetune.problem.adapters import COMFYUI, export_adapters, loaded_by
from implicit_diffusion.commands.finetune.problem.setup import Setup
from implicit_diffusion.commands.finetune.summary import ModelSummary
from implicit_diffusion.commands.shared.models.factories import factory_of
from implicit_diffusion.denoisers.lora import merged
from implicit_diffusion.models.chain_file import TrainedChain, write_chain
from implicit_diffusion.models.own_models.files import save_own_model
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.clock import part


def model_summary(setup: Setup, *, comfyui: bool) -> ModelSummary:
    """What was trained and exported; `comfyui` says whether adapters have a file for ComfyUI."""
    family, factory = setup.pretrained.family, factory_of(setup.spec.network.model)
    adapted = setup.spec.network.adapted
    return ModelSummary(
        condition=setup.pretrained.condition,
        pipeline_class=(family.pipelines or (None,))[0],
        event_shape=list(setup.chain.event_shape),
        num_classes=setup.pretrained.num_classes,
        compiled=setup.compiled,
        adapter=loaded_by(family, own=factory is not None) if adapted else None,
        adapter_comfyui=COMFYUI if comfyui else None,
        clipping=setup.clipping,
        pipeline=setup.exported.table.name,
        pipeline_is_the_chain=setup.chain.table.agrees_with(setup.exported.table),
        video=family.frames,
        factory=factory,
    )


@part("saving")
def export(
    setup: Setup, model: nn.Module, directory: RunDirectory, card: str, comfyui: Mapping[str, Tensor] | None
) -> None:
    """Write the pipeline or the weights of the trained network, adapters merged, and the adapters by themselves.

    Args:
        setup: of the run.
        model: that was trained.
        directory: of the run.
        card: of the model.
        comfyui: see `for_comfyui`.
    """
    factory = factory_of(setup.spec.network.model)
    if factory is not None:
        save_own_model(directory.model, merged(model), factory, card)
    else:
        save_pipeline(directory.model, merged(model), setup.exported.scheduler, card, original=setup.pretrained)
    if setup.spec.network.adapted:
        export_adapters(directory.model, model, setup.pretrained.family, comfyui)
    sizes = *(setup.spec.chain.size or (None, None)), setup.spec.chain.frames
    chain = TrainedChain(setup.chain.table, setup.eta, setup.student_guidance, setup.spec.conditions.null_class, *sizes)
    write_chain(directory.model, chain)
