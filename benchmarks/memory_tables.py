"""Predict what fine-tuning large pipelines needs: `python benchmarks/memory_tables.py` prints the table of the docs.

The networks, decoders and text encoders are built from their published configs, which are written out below, on the
meta device: nothing is downloaded, and no weight is in memory. What is printed, and kept in `benchmarks/results`, is
predicted as `finetune` predicts it (`loops.unread.needs`), and has not been measured. Attention is taken to keep what
fused kernels keep, and activations in bfloat16 are taken as half of those in float32, the least that they can be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from common import save
from torch import Tensor, nn

from implicit_diffusion.denoisers.lora import add_lora
from implicit_diffusion.loops.memory import in_units
from implicit_diffusion.loops.unread.needs import Call, Needs, Training, needs_of_network, weight_bytes
from implicit_diffusion.noise import Noise

RANK, BATCH, STEPS = 16, 1, 10
SIDE = 128  # of latents
PROMPTS = 10_000
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Pipeline:
    """A published pipeline at 1024 by 1024 pixels.

    Args:
        build: its network.
        inputs: of the network, for n samples.
        encoders: its text encoders.
        channels: of latents.
        embedding: numbers per prompt.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    encoders: Callable[[], list[nn.Module]]
    channels: int
    embedding: int


def clip(config: dict[str, int], *, projection: bool = True) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    built: nn.Module = (CLIPTextModelWithProjection if projection else CLIPTextModel)(
        CLIPTextConfig(**config, vocab_size=49408, projection_dim=config["hidden_size"])
    )
    return built


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5_XXL, vocab_size=32128, feed_forward_proj="gated-gelu"))


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd35(layers: int, **options: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=layers,
        caption_projection_dim=64 * layers,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        qk_norm="rms_norm",
        **options,
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)  # the defaults are those of FLUX.1


def sdxl_inputs(n: int) -> dict[str, Any]:
    added = {"text_embeds": torch.zeros(n, 1280), "time_ids": torch.zeros(n, 6)}
    return {
        "sample": torch.zeros(n, 4, 128, 128, requires_grad=True),
        "timestep": torch.zeros(n),
        "encoder_hidden_states": torch.zeros(n, 77, 2048),
        "added_cond_kwargs": added,
    }


def sd35_inputs(n: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(n, 16, 128, 128, requires_grad=True),
        "timestep": torch.zeros(n),
        "encoder_hidden_states": torch.zeros(n, 333, 4096),
        "pooled_projections": torch.zeros(n, 2048),
    }


def flux_inputs(n: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(n, 4096, 64, requires_grad=True),
        "timestep": torch.zeros(n),
        "encoder_hidden_states": torch.zeros(n, 512, 4096),
        "pooled_projections": torch.zeros(n, 768),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.ones(n),
    }


def three() -> list[nn.Module]:
    return [clip(CLIP_L), clip(CLIP_G), t5()]


PIPELINES = {
    "SDXL": Pipeline(
        sdxl, sdxl_inputs, lambda: [clip(CLIP_L, projection=False), clip(CLIP_G)], 4, 77 * 2048 + 1280
    ),
    "SD3.5 medium": Pipeline(
        functools.partial(sd35, 24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        sd35_inputs,
        three,
        16,
        333 * 4096 + 2048,
    ),
    "SD3.5 large": Pipeline(
        functools.partial(sd35, 38, pos_embed_max_size=192), sd35_inputs, three, 16, 333 * 4096 + 2048
    ),
    "FLUX.1": Pipeline(
        flux, flux_inputs, lambda: [clip(CLIP_L, projection=False), t5()], 16, 512 * 4096 + 768
    ),
}  # fmt: skip


def autoencoder(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(latent_channels=channels, **LEVELS)


class Called(nn.Module):
    """A network on inputs of its own making, as many as x has samples."""

    def __init__(self, network: nn.Module, inputs: Callable[[int], dict[str, Any]]) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u: Tensor = self.network(**self.inputs(len(x)), return_dict=False)[0]
        return u


def _called(u: nn.Module, n: int) -> object:
    return u(torch.zeros(n), torch.zeros(n))


def needs_of(pipeline: Pipeline, rank: int | None) -> Needs:
    """What the nested loop needs with adapters of that rank, or with all weights trained."""
    shape = (pipeline.channels, SIDE, SIDE)
    training = Training(
        samples=BATCH,
        events=BATCH * (STEPS + 1),
        adapt=None if rank is None else functools.partial(add_lora, rank=rank, noise=Noise(0)),
        checkpointing=True,
        half=True,
        kept=torch.float32 if rank is None else torch.bfloat16,
    )
    with torch.device("meta"):
        network = pipeline.build()
        needs = needs_of_network(network, Call(Called(network, pipeline.inputs), _called, shape), training)
        encoders = {f"encoder {i + 1}": weight_bytes(encoder) for i, encoder in enumerate(pipeline.encoders())}
        return dataclasses.replace(needs, decoder=weight_bytes(autoencoder(pipeline.channels)), encoders=encoders)


def row(pipeline: Pipeline) -> dict[str, int | None]:
    """The numbers of a pipeline, in bytes."""
    adapters, whole = needs_of(pipeline, RANK), needs_of(pipeline, None)
    assert adapters.note is None and whole.note is None, (adapters.note, whole.note)
    return {
        "network, float32": whole.network // 2,  # which counts u_0 as well
        "network, bf16": adapters.network,
        "adapters, Adam": adapters.trained,
        "activations per sample": adapters.activations,
        "states": adapters.states,
        "decoder": adapters.decoder,
        "largest encoder": adapters.encoder,
        "all encoders": sum(adapters.encoders.values()),
        "device, LoRA": adapters.device,
        "device, all weights": whole.device,
        f"{PROMPTS:,} prompts, on disk": 4 * pipeline.embedding * PROMPTS,
    }


def main() -> None:
    """Print the table, and keep it."""
    rows = {}
    for name, pipeline in PIPELINES.items():
        rows[name] = row(pipeline)
        if len(rows) == 1:
            print("| pipeline | " + " | ".join(rows[name]) + " |")
            print("|---" * (1 + len(rows[name])) + "|")
        print(f"| {name} | " + " | ".join(in_units(size or 0) for size in rows[name].values()) + " |", flush=True)
    libraries = {library: version(library) for library in ("torch", "diffusers", "transformers", "peft")}
    setting = {"rank": RANK, "batch": BATCH, "steps": STEPS, "pixels": 8 * SIDE, "checkpointing": True, "dtype": "bf16"}
    print("wrote", save("memory_tables", {"predicted": True} | libraries | {"config": setting, "bytes": rows}))


if __name__ == "__main__":
    main()
