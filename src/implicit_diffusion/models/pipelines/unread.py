"""A pipeline of any family before its weights are read: its models are on the meta device, and it can be run.

    configs, headers of the weights  →  models without memory (`parts.without_memory`)  →  the pipeline around them
                                     →  `read_pipeline`, whose text encoders answer zeros: table, arguments, shapes

So what no table expresses is refused, and what a run needs is known, before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from implicit_diffusion.denoisers.without_numbers import hollow
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.parts import quiet, refused, saved_dtype, without_memory
from implicit_diffusion.models.pipelines.reading import ProbedPipeline, network_part, read_pipeline
from implicit_diffusion.showing import Shown, of_network


@dataclass(frozen=True, repr=False)
class UnreadPipeline(Shown):
    """A pipeline without its weights.

    Attributes:
        pipeline: of diffusers, with models on the meta device that answer zeros on the CPU.
        saved: of every model, the narrowest dtype that holds all of its weights as they were saved.
    """

    pipeline: Any
    saved: Mapping[str, torch.dtype]

    def _words(self) -> Iterable[str]:
        yield type(self.pipeline).__name__
        yield from (f"{part}={of_network(getattr(self.pipeline, part))}" for part in self.saved)

    @property
    def part(self) -> str:
        """The name of the network that predicts."""
        return network_part(self.pipeline)

    @property
    def network(self) -> nn.Module:
        """The network that predicts."""
        network: nn.Module = getattr(self.pipeline, self.part)
        return network

    @property
    def others(self) -> dict[str, nn.Module]:
        """The other models, such as text encoders, by their names."""
        return {part: getattr(self.pipeline, part) for part in self.saved if part != self.part}

    def read(self, num_steps: int, *, prompts: Sequence[str] | None = None, **options: Any) -> ProbedPipeline:
        """The chain that the pipeline runs, with a network on the meta device; arguments as in `read_pipeline`.

        Of the prompts the longest stands for all: their embeddings are zeros, and only shapes are of use.
        """
        longest = [max(prompts, key=len)] if prompts else None
        return read_pipeline(self.pipeline, num_steps, prompts=longest, **options)


def unread_pipeline(checkpoint: Checkpoint) -> UnreadPipeline:
    """The pipeline of a checkpoint without its weights.

    Raises:
        InvalidInputError: a part that does not exist in diffusers or transformers, or whose config is damaged or does
            not belong to its weights.
        MissingExtraError: diffusers or transformers is not installed.
    """
    require("diffusers", "transformers")
    import diffusers

    source, models, saved = str(checkpoint.folder), {}, {}
    pipeline_class: Any = getattr(diffusers, str(checkpoint.index.get("_class_name")), None)
    known = isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline)
    if not known:
        raise InvalidInputError(f"model: diffusers has no pipeline {checkpoint.index.get('_class_name')!r}")
    with checkpoint.laid_out() as folder, quiet():
        for part, (library, name) in checkpoint.parts.items():
            if _is_model(source, part, library, name):
                models[part], headers = without_memory(checkpoint, folder, part, part.replace("_", " "), source)
                saved[part] = saved_dtype(headers)
        try:
            pipeline = pipeline_class.from_pretrained(str(folder), local_files_only=True, **models)
        except Exception as error:  # diffusers and transformers raise many
            raise refused("pipeline", "loaded", error, checkpoint, folder, source) from error
    for model in models.values():
        hollow(model)
    return UnreadPipeline(pipeline, saved)


def _is_model(source: str, part: str, library: str, name: str) -> bool:
    """Whether a part is a network; raises `InvalidInputError` where it is neither that nor a part without code."""
    import diffusers
    import transformers

    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    named = getattr(home, name, None)
    tables = (
        diffusers.SchedulerMixin,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ImageProcessingMixin,
        transformers.ProcessorMixin,
    )
    if not isinstance(named, type) or not issubclass(named, (nn.Module, *tables)):
        raise InvalidInputError(f"model: the {part} of {source!r} is {library}.{name}, which is no part of a pipeline")
    return issubclass(named, nn.Module)
