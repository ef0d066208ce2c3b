"""Denoisers u(x, t; θ) and the tables that make samplers of them."""

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.denoisers.ornstein_uhlenbeck import ou_probability_flow, ou_reverse_sde
from implicit_diffusion.denoisers.pretrained import (
    DiffusersDenoiser,
    Pretrained,
    load_pretrained,
    save_pipeline,
    scheduler_for,
)
from implicit_diffusion.denoisers.scheduler import read_table
from implicit_diffusion.denoisers.table import ChainTable
from implicit_diffusion.frozen import eval_mode, frozen_copy

__all__ = [
    "ChainTable",
    "DiffusersDenoiser",
    "GaussianDenoiser",
    "Pretrained",
    "eval_mode",
    "frozen_copy",
    "load_pretrained",
    "ou_probability_flow",
    "ou_reverse_sde",
    "read_table",
    "save_pipeline",
    "scheduler_for",
]
