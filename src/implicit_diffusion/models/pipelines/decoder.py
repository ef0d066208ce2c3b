"""A pipeline's own end as a decoder: from x_N to images or frames, differentiable.

The pipeline runs with stand-ins: its network answers zeros, its last step returns the x_N that is to be decoded, and
the image processor's postprocess, which would round and clip to [0, 1], returns what it is given, nominally in [−1, 1].
What is between is the pipeline's own: unpacking, scaling, shifts and statistics of latents, and the autoencoder. Text
encoders are called once; afterwards their result is used again.

Where a pipeline does its own postprocessing, the images are what its autoencoder returns.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit_diffusion.models.decoders import PIXELS_AT_ONCE
from implicit_diffusion.models.pipelines.recording import AnswerForm
from implicit_diffusion.models.pipelines.stand_ins import Enough, batch_of, run_until_enough, shadow_of, stand_in_for
from implicit_diffusion.showing import ShownModule, of_network

STEPS = 2  # with a single one, some schedulers divide by zero
PROCESSORS = {"image_processor": "postprocess", "video_processor": "postprocess_video"}
SHOWN_ONLY = ("safety_checker", "watermark")  # parts that judge or mark what is shown


class PipelineDecoder(ShownModule):
    """Images (n, colours, height, width), or frames (n, colours, frames, height, width), of latents x_N.

    Args:
        pipeline: of diffusers; its autoencoder is frozen.
        part: the network's name in it.
        call: arguments of the pipeline's call.
        prompts: of which the first is encoded; None if the call does without.
        form: how the network answers.
    """

    def __init__(
        self, pipeline: Any, part: str, call: Mapping[str, Any], prompts: list[str] | None, form: AnswerForm
    ) -> None:
        super().__init__()
        self.vae: nn.Module = pipeline.vae.eval().requires_grad_(False)
        self._pipeline, self._part, self._call, self._prompts, self._form = pipeline, part, call, prompts, form
        self._encoded: dict[tuple[int, int], Any] = {}  # by number of samples and of the call

    def _words(self) -> Iterable[str]:
        yield of_network(self.vae)
        yield f"pipeline={type(self._pipeline).__name__}"

    def forward(self, x: Float[Tensor, "n *latent"]) -> Float[Tensor, "n colours ..."]:
        """The images of x, decoded a few at a time; what happens inside is computed again in the backward pass."""
        first = self._checkpointed(x[:1])
        at_once = self.largest_piece(len(x), first[0])
        return torch.cat([first, *map(self._checkpointed, x[1:].split(at_once) if len(x) > 1 else ())])

    def largest_piece(self, count: int, image: Float[Tensor, "colours ..."]) -> int:
        """How many of `count` samples are decoded together to images such as this one: the first one is by itself."""
        return max(1, min(count - 1, PIXELS_AT_ONCE // image[0].numel()))

    def _checkpointed(self, x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):  # which would end the pipeline by an error of its own
            images: Tensor = checkpoint(self.decode, x, use_reentrant=False)
        return images

    def decode(self, x: Float[Tensor, "n *latent"]) -> Float[Tensor, "n colours ..."]:
        """The images of all x together, where autograd keeps what happens inside."""
        decoded: list[Tensor] = []
        result = self._run(x, self._end(decoded))
        return (decoded[0] if decoded else result[0]).to(x.dtype)

    def given_to_autoencoder(self, x: Float[Tensor, "n *latent"]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call of its autoencoder's `decode` by which the pipeline decodes x."""
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        vae = copy.copy(self.vae)

        def decode(*args: Any, **kwargs: Any) -> Any:
            given.append((args, kwargs))
            raise Enough

        vae.__dict__["decode"] = decode
        self._run(x, {"vae": vae})
        return given[0]

    def _run(self, x: Tensor, replaced: Mapping[str, Any]) -> Any:
        """What the pipeline returns where its last step returns x, with other parts."""
        pipeline, count = self._pipeline, len(x)
        scheduler = copy.deepcopy(pipeline.scheduler)
        steps = itertools.count(1)

        @functools.wraps(scheduler.step)
        def step(*args: Any, **kwargs: Any) -> _Stepped:
            return _Stepped(x if next(steps) == len(scheduler.timesteps) else x.detach())

        def answer(*args: Any, **kwargs: Any) -> Any:
            return self._form.filled([torch.zeros_like(self._form.like)] * (count * self._form.parts))

        scheduler.step = step
        network = stand_in_for(getattr(pipeline, self._part), answer)
        shadow = shadow_of(pipeline, {"scheduler": scheduler, self._part: network, **replaced}, x.device)
        if hasattr(pipeline, "encode_prompt"):
            shadow.__dict__["encode_prompt"] = self._encoder(count)
        options = {"num_inference_steps": STEPS, "output_type": "pt", "return_dict": False, **self._call}
        options |= batch_of(pipeline, self._call, self._prompts, count)
        try:
            return run_until_enough(shadow, options, "pipeline: its end, which decodes,")
        finally:
            del scheduler.step  # a cycle, which would keep x

    def _end(self, decoded: list[Tensor]) -> dict[str, Any]:
        """Parts of the pipeline in whose place others end it without rounding; the last resort puts images into
        `decoded`.
        """
        pipeline = self._pipeline
        replaced: dict[str, Any] = {name: None for name in SHOWN_ONLY if hasattr(pipeline, name)}
        for name, method in PROCESSORS.items():
            if hasattr(pipeline, name):
                replaced[name] = copy.copy(getattr(pipeline, name))
                setattr(replaced[name], method, lambda images, *args, **kwargs: images)
        if not replaced.keys() & PROCESSORS.keys():
            own: Any = self.vae.decode
            replaced["vae"] = copy.copy(self.vae)

            def decode(*args: Any, **kwargs: Any) -> Any:
                decoded.append(own(*args, **kwargs)[0])
                raise Enough

            replaced["vae"].__dict__["decode"] = decode
        return replaced

    def _encoder(self, count: int) -> Callable[..., Any]:
        """The pipeline's `encode_prompt`, which is really called once for every number of samples."""
        calls = itertools.count()

        @functools.wraps(self._pipeline.encode_prompt)
        def encode(*args: Any, **kwargs: Any) -> Any:
            key = (count, next(calls))
            if key not in self._encoded:
                with torch.no_grad():
                    self._encoded[key] = self._pipeline.encode_prompt(*args, **kwargs)
            return self._encoded[key]

        return encode


class _Stepped(tuple[Tensor]):
    """What a scheduler's step returns, to be read as a tuple or by name."""

    def __new__(cls, state: Tensor) -> _Stepped:
        return super().__new__(cls, (state,))

    @property
    def prev_sample(self) -> Tensor:
        """The state."""
        return self[0]
