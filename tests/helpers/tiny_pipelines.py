"""One tiny pipeline with random weights per family of diffusers, with the call that it is tested with.

`FAMILIES` is the only list: the tests go through it, and `markdown` prints it for the documentation.
"""

import string
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.helpers import tiny

PROMPTS = ["a cat", "red dogs"]


@dataclass(frozen=True)
class Tiny:
    """A pipeline, and arguments of its call.

    Args:
        pipeline: of diffusers.
        call: with embeddings of one prompt where `prompts` is None.
        prompts: texts, where the pipeline has small text encoders.
        unpacked: (height, width) of the latents that the pipeline takes where its states are packed.
    """

    pipeline: Any
    call: dict = field(default_factory=dict)
    prompts: list | None = None
    unpacked: tuple | None = None


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def euler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def clip(folder, **changes):
    """A CLIP text encoder with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return tiny.seeded(CLIPTextModel, CLIPTextConfig(**tiny.TEXT | changes)), tiny.tokenizer(folder / "words")


def t5(width=32, umt5=False):
    """A T5 text encoder with its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    options = {"vocab_size": len(pieces), "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    encoder = (
        tiny.seeded(UMT5EncoderModel, UMT5Config(**options))
        if umt5
        else tiny.seeded(T5EncoderModel, T5Config(**options))
    )
    return encoder, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=12)


def stable_diffusion(folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny.stable_diffusion(folder), safety_checker=None)
    pipeline.scheduler = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    return Tiny(pipeline, {"guidance_scale": 4.5}, PROMPTS)


def stable_diffusion_3(folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny.stable_diffusion_3(folder))
    return Tiny(pipeline, {"guidance_scale": 4.5}, PROMPTS)


def text_unet(**changes):
    """The U-Net of SDXL."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "cross_attention_dim": 32,
    }
    return tiny.seeded(UNet2DConditionModel, **config | changes)


def stable_diffusion_xl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder, words = clip(folder)
    second = tiny.seeded(CLIPTextModelWithProjection, CLIPTextConfig(**tiny.TEXT))
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    pipeline = StableDiffusionXLPipeline(
        tiny.autoencoder(), encoder, second, words, words, text_unet(), scheduler, add_watermarker=False
    )
    return Tiny(pipeline, {"guidance_scale": 5.0}, PROMPTS)


def flux(folder):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    encoder, words = clip(folder)
    second, pieces = t5()
    network = tiny.seeded(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = tiny.autoencoder(scaling_factor=1.5, shift_factor=0.06)
    pipeline = FluxPipeline(euler(use_dynamic_shifting=True), vae, encoder, words, second, pieces, network)
    return Tiny(pipeline, {"height": 16, "width": 32, "max_sequence_length": 12}, PROMPTS)


def flux_2_klein(folder):
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    network = tiny.seeded(
        Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = tiny.seeded(
        AutoencoderKLFlux2,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=16,
    )
    pipeline = Flux2KleinPipeline(euler(use_dynamic_shifting=True), vae, None, None, network)
    call = {"prompt_embeds": normal(1, 6, 12), "negative_prompt_embeds": normal(1, 6, 12, seed=1)}
    return Tiny(pipeline, call | {"guidance_scale": 4.0, "height": 16, "width": 16}, unpacked=(4, 4))


def qwen_image(folder):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    network = tiny.seeded(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
    )
    vae = tiny.seeded(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    pipeline = QwenImagePipeline(euler(use_dynamic_shifting=True, shift_terminal=0.02), vae, None, None, network)
    call = {"prompt_embeds": normal(1, 6, 12), "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long)}
    return Tiny(pipeline, call | {"height": 16, "width": 16})


def z_image(folder):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    network = tiny.seeded(
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    pipeline = ZImagePipeline(euler(shift=3.0), tiny.autoencoder(shift_factor=0.1), None, None, network)
    call = {"prompt_embeds": [normal(8, 16)], "negative_prompt_embeds": [normal(6, 16, seed=1)], "prompt": None}
    return Tiny(pipeline, call | {"guidance_scale": 3.0, "height": 16, "width": 16})


def sana(folder):
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    vae = tiny.seeded(
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    network = tiny.seeded(
        SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    pipeline = SanaPipeline(None, None, vae, network, euler(shift=3.0))
    call = {"prompt_embeds": normal(1, 8, 8), "prompt_attention_mask": torch.ones(1, 8)}
    call |= {"negative_prompt_embeds": normal(1, 8, 8, seed=1), "negative_prompt_attention_mask": torch.ones(1, 8)}
    call |= {"negative_prompt": None, "guidance_scale": 3.0, "use_resolution_binning": False}
    return Tiny(pipeline, call | {"height": 32, "width": 64})


def pixart_sigma(folder):
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    encoder, pieces = t5(16)
    network = tiny.seeded(
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=8,
        caption_channels=16,
        norm_num_groups=1,
    )
    scheduler = tiny.scheduler()
    pipeline = PixArtSigmaPipeline(pieces, encoder, tiny.autoencoder(), network, scheduler)
    call = {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False}
    return Tiny(pipeline, call | {"max_sequence_length": 12, "height": 16, "width": 16}, PROMPTS)


def aura_flow(folder):
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    encoder, pieces = t5(umt5=True)
    network = tiny.seeded(
        AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipeline = AuraFlowPipeline(pieces, encoder, tiny.autoencoder(), network, euler(shift=1.73))
    return Tiny(pipeline, {"guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 12}, PROMPTS)


def wan(folder):
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    encoder, pieces = t5(umt5=True)
    network = tiny.seeded(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    vae = tiny.seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipeline = WanPipeline(pieces, encoder, vae, euler(shift=3.0), network)
    call = {"guidance_scale": 4.0, "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 12}
    return Tiny(pipeline, call, PROMPTS)


def ltx(folder):
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    encoder, pieces = t5()
    network = tiny.seeded(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = tiny.seeded(
        AutoencoderKLLTXVideo,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )
    pipeline = LTXPipeline(euler(use_dynamic_shifting=True), vae, encoder, pieces, network)
    call = {"guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 12}
    return Tiny(pipeline, call, PROMPTS)


FAMILIES = {
    "Stable Diffusion 1 and 2": stable_diffusion,
    "Stable Diffusion XL": stable_diffusion_xl,
    "Stable Diffusion 3": stable_diffusion_3,
    "FLUX.1": flux,
    "FLUX.2 klein": flux_2_klein,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "Sana": sana,
    "PixArt-Σ": pixart_sigma,
    "AuraFlow": aura_flow,
    "Wan": wan,
    "LTX-Video": ltx,
}


REMARKS = {
    "Stable Diffusion 1 and 2": "guidance in one call",
    "Stable Diffusion XL": "guidance in one call; σ-parameterised Euler; sizes in the condition",
    "Stable Diffusion 3": "guidance in one call",
    "FLUX.1": "packed latents; guidance embedded; shift by size",
    "FLUX.2 klein": "packed latents; guidance in two calls; statistics of latents",
    "Qwen-Image": "packed latents; without true_cfg_scale, which normalises and is no row of a table",
    "Z-Image": "lists of samples; the sign of the answer turned; time from 0 to 1",
    "Sana": "guidance in one call",
    "PixArt-Σ": "guidance in one call; half of the answer is a variance, which is not used",
    "AuraFlow": "guidance in one call",
    "Wan": "video; guidance in two calls",
    "LTX-Video": "video; packed latents; guidance in one call",
}


def markdown(made):
    """The list as the table of the documentation; `made` makes the pipeline of a name."""
    lines = ["| family | pipeline | network | remark |", "|---|---|---|---|"]
    for name in FAMILIES:
        pipeline = made(name).pipeline
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        lines.append(f"| {name} | `{type(pipeline).__name__}` | `{type(network).__name__}` | {REMARKS[name]} |")
    return "\n".join(lines)
