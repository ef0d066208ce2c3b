"""A pipeline of any family before its weights are read: its models are on the meta device, and it can be run.

    configs, headers of the weights  →  models without memory (`parts.without_memory`)  →  the pipeline around them
                                     →  `read_pipeline`, whose text encoders answer zeros: table, arguments, shapes

So what a run needs is known before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from implicit_diffusion.denoisers.without_numbers import hollow
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.parts import saved_dtype, without_memory
from implicit_diffusion.models.pipelines.reading import ProbedPipeline, read_pipeline
from implicit_diffusion.models.prompts import assembled
from implicit_diffusion.showing import Shown, of_network
from implicit_diffusion.tables.named import default_sampler


@dataclass(frozen=True, repr=False)
class UnreadPipeline(Shown):
    """A pipeline without its weights.

    Attributes:
        pipeline: of diffusers, with models on the meta device that answer zeros on the CPU.
        part: the name of its network.
        saved: of every model, the narrowest dtype that holds all of its weights as they were saved.
    """

    pipeline: Any
    part: str
    saved: Mapping[str, torch.dtype]

    def _words(self) -> Iterable[str]:
        yield type(self.pipeline).__name__
        yield from (f"{part}={of_network(getattr(self.pipeline, part))}" for part in self.saved)

    @property
    def network(self) -> nn.Module:
        """The network that predicts."""
        network: nn.Module = getattr(self.pipeline, self.part)
        return network

    @property
    def others(self) -> dict[str, nn.Module]:
        """The other models, such as text encoders, by their names."""
        models = {part: getattr(self.pipeline, part, None) for part in self.saved if part != self.part}
        return {part: model for part, model in models.items() if model is not None}

    def read(
        self, num_steps: int, *, prompts: Sequence[str] | None = None, sampler: str | None = None, **call: Any
    ) -> ProbedPipeline:
        """The chain that the pipeline runs, with a network on the meta device.

        Args:
            num_steps: N.
            prompts: of which the longest stands for all: their embeddings are zeros, and only shapes are of use.
            sampler: as in `read_pipeline`; None for the memoryless one.
            **call: other arguments of `read_pipeline`.
        """
        longest = [max(prompts, key=len)] if prompts else None
        if isinstance(call.get("negative_prompt"), list):
            call["negative_prompt"] = [max(call["negative_prompt"], key=len)]
        sampler = sampler or default_sampler(self.pipeline.scheduler)
        return read_pipeline(self.pipeline, num_steps, prompts=longest, sampler=sampler, **call)


def unread_pipeline(checkpoint: Checkpoint) -> UnreadPipeline:
    """The pipeline of a checkpoint without its weights.

    Raises:
        InvalidInputError: a part that does not exist in diffusers or transformers, or whose config is damaged or does
            not belong to its weights.
        MissingExtraError: diffusers or transformers is not installed.
    """
    source, models, saved = str(checkpoint.folder), {}, {}
    with checkpoint.laid_out() as folder:
        for part in checkpoint.parts:
            if checkpoint.has_weights(part):
                models[part], headers = without_memory(checkpoint, folder, part, part.replace("_", " "), source)
                saved[part] = saved_dtype(headers)
    pipeline = assembled(checkpoint, models)
    for model in models.values():
        hollow(model)
    return UnreadPipeline(pipeline, checkpoint.family.part, saved)
