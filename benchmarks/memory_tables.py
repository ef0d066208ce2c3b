"""Predict what fine-tuning large pipelines needs: `python benchmarks/memory_tables.py` prints the tables of the docs.

The networks, decoders and text encoders are built from their published configs, which are written out below, on the
meta device: nothing is downloaded, and no weight is in memory. What is printed is predicted as `finetune` predicts it
(`finetune.problem.needs`), and has not been measured. In bfloat16 activations are taken as half of those in float32,
which is the least that they can be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.finetune.problem.needs import activation_bytes, weight_bytes
from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations
from implicit_diffusion.loops.memory import in_units
from implicit_diffusion.noise import Noise

RANK, MOMENTS, BATCH, STEPS = 16, 2, 1, 10
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


def _called(u: nn.Module, n: int) -> Tensor:
    result: Tensor = u(torch.zeros(n), torch.zeros(n))
    return result


def row(name: str, pipeline: Pipeline) -> str:
    """One line of the table, of the nested loop with LoRA, in bfloat16 and with gradient checkpointing."""
    with torch.device("meta"):
        network = pipeline.build()
        frozen = weight_bytes(network, torch.bfloat16)
        add_lora(network, RANK, Noise(0))
        adapters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        checkpoint_activations(network)
        u = Called(network, pipeline.inputs)
        calls = (functools.partial(_called, part) for part in (u, WithoutAdapter(u)))
        saved = activation_bytes(list(calls)) // 2
        encoders = [weight_bytes(encoder) for encoder in pipeline.encoders()]
        decoder = weight_bytes(autoencoder(pipeline.channels))
    trained = (2 + MOMENTS) * 4 * adapters
    states = 4 * pipeline.channels * 128**2 * (STEPS + 1) * BATCH
    training = frozen + trained + decoder + states + saved * BATCH
    before = 5 * 4 * (frozen // 2) + decoder + states
    parts = [
        2 * frozen,
        frozen,
        trained,
        saved,
        decoder,
        max(encoders),
        sum(encoders),
        max(training, *encoders),
        before,
    ]
    return f"| {name} | " + " | ".join(map(in_units, [*parts, 4 * pipeline.embedding * PROMPTS])) + " |"


COLUMNS = ("pipeline", "network, float32", "network, bf16", "adapters, Adam", "activations per sample", "decoder")
COLUMNS += ("largest encoder", "all encoders", "device, LoRA", "all weights trained, without activations")
COLUMNS += (f"{PROMPTS:,} prompts, on disk",)


def main() -> None:
    """Print the table."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for name, pipeline in PIPELINES.items():
        print(row(name, pipeline), flush=True)


if __name__ == "__main__":
    main()
