"""A diffusers folder with a tiny untrained network of colour images: no digits, whose quality would be judged."""

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.models.pretrained import save_pipeline
from tests.helpers import tiny


def folder(path, scheduler):
    unet = tiny.unet(in_channels=3, out_channels=3, **tiny.PLAIN)
    return str(save_pipeline(path, DiffusersDenoiser(unet), scheduler, "a test"))
