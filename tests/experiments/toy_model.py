"""A diffusers folder with a tiny untrained network of colour images: no digits, whose quality would be judged."""

import torch
from diffusers import UNet2DModel

from implicit_diffusion.denoisers.pretrained import DiffusersDenoiser, save_pipeline


def folder(path, scheduler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
        )
    return str(save_pipeline(path, DiffusersDenoiser(unet), scheduler, "a test"))
