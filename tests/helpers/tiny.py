"""Tiny diffusers pipelines with random weights, as complete as those on the hub."""

import json
import string

import torch

SEED = 0
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 80,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


PLAIN = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
}  # changes of `unet` without attention


def seeded(build, *arguments, **options):
    """A module whose initial weights do not depend on what was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return build(*arguments, **options).eval()


def tokenizer(folder):
    """CLIP's tokenizer with letters for a vocabulary."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def unet(**changes):
    """A U-Net of images, one channel of 8 by 8, unconditional unless it is told how many classes."""
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return seeded(UNet2DModel, **config | changes)


def autoencoder(channels=4, **changes):
    """From 2·2 latents per 4 pixels: twice as many pixels as latents, each way."""
    from diffusers import AutoencoderKL

    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": channels,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "sample_size": 16,
    }
    return seeded(AutoencoderKL, **config | changes)


def scheduler(**changes):
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, **changes)


def class_conditional(folder, classes=3, **changes):
    """A class-conditional DDPMPipeline."""
    from diffusers import DDPMPipeline

    network = unet(num_class_embeds=classes, **changes)
    DDPMPipeline(unet=network, scheduler=scheduler()).save_pretrained(folder)
    return folder


def labelled(folder):
    """A folder with a class-conditional pipeline, classes/, and a reward that looks at labels, rewards.py:label."""
    class_conditional(folder / "classes")
    (folder / "rewards.py").write_text("def label(x, labels): return x.flatten(1).mean(1) * (labels + 1)")
    return folder


def stable_diffusion(folder, **changes):
    """A StableDiffusionPipeline without safety checker; changes of its U-Net, or a whole `vae` or `text_encoder`."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = {
        "vae": changes.pop("vae", None) or autoencoder(),
        "text_encoder": changes.pop("text_encoder", None) or seeded(CLIPTextModel, CLIPTextConfig(**TEXT)),
        "tokenizer": tokenizer(folder / "words"),
        "scheduler": scheduler(),
    }
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    network = seeded(UNet2DConditionModel, **config | changes)
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(unet=network, **parts, **others).save_pretrained(folder / "model")
    return folder / "model"


def stable_diffusion_3(folder):
    """A StableDiffusion3Pipeline with its three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=2)
    words = tokenizer(folder / "words")
    encoders = [seeded(CLIPTextModelWithProjection, CLIPTextConfig(**TEXT)) for _ in range(2)]
    network = seeded(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=words,
        text_encoder_3=seeded(T5EncoderModel, config),
        tokenizer_3=T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=12),
    ).save_pretrained(folder / "model")
    return folder / "model"


def dit(folder, classes=3):
    """A DiTPipeline whose network predicts a variance as well, as the published ones do."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    network = seeded(
        DiTTransformer2DModel,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=classes,
        norm_elementwise_affine=False,
    )
    labels = {i: f"class {i}" for i in range(classes)}
    DiTPipeline(transformer=network, vae=autoencoder(), scheduler=scheduler(), id2label=labels).save_pretrained(folder)
    return folder
