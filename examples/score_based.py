"""A score-based model of your own, of latents of digits, for the command line.

    cd examples
    implicit-diffusion finetune --model score_based.py:digits --reward brightness --out run
    implicit-diffusion sample --model run/model --out digits.png

Latents are the 16 leading principal components, scaled to variance one; the decoder is linear, and the table that of
the reverse SDE. A factory must return the same weights at every call: the first one trains them, in seconds, and keeps
them.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import implicit_diffusion as idf

KEPT = Path(__file__).with_suffix(".safetensors")


class Score(torch.nn.Sequential):
    """∇log p_t(x) = −E[ε | x]/σ_t, x = α_t data + σ_t ε."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = (-torch.expm1(-2 * t[:, None])).sqrt()
        return -super().forward(torch.cat([x, t[:, None].log()], 1)) / sigma


def digits(updates: int = 2000) -> idf.DiffusionModel:
    """8 × 8 images of handwritten digits."""
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    mean, (_, values, axes) = images.mean(0), torch.linalg.svd(images - images.mean(0), full_matrices=False)
    basis = values[:16, None] * axes[:16] / len(images) ** 0.5
    latents, noise, linear, act = (images - mean) @ basis.pinverse(), idf.Noise(0), torch.nn.Linear, torch.nn.SiLU()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Score(linear(17, 256), act, linear(256, 256), act, linear(256, 16))
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for update in range(0 if KEPT.exists() else updates):
        generator = noise.generator(update)
        data = latents[torch.randint(len(latents), (256,), generator=generator)]
        t, eps = 0.05 + 2.5 * torch.rand(256, generator=generator), torch.randn(256, 16, generator=generator)
        alpha, sigma = (-t[:, None]).exp(), (-torch.expm1(-2 * t[:, None])).sqrt()
        loss = (sigma * network(alpha * data + sigma * eps, t) + eps).square().mean()
        adam.zero_grad(), loss.backward(), adam.step()
    KEPT.exists() or save_file(network.state_dict(), KEPT)
    network.load_state_dict(load_file(KEPT))
    table = idf.tables.ou_reverse_sde(40, 2.5)
    return idf.DiffusionModel(network, table, (16,), decoder=lambda z: (mean + z @ basis.to(z)).view(-1, 1, 8, 8))
