r"""Pretrain a small diffusion model on the real handwritten digits: the model that ships with this package.

Denoising score matching (Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011; Ho et al.,
*Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, algorithm 1) on the variance-preserving path

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) xi,         t uniform in 0..T-1,    xi ~ N(0, I),

with the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, eq. 17) and the network predicting the velocity
(Salimans and Ho, arXiv 2202.00512, section 4)

    v_t = sqrt(abar_t) xi - sqrt(1 - abar_t) x.

The velocity suits short chains: x itself is recovered without a division by sqrt(abar_t), which is nearly zero at the
first step of a chain with trailing spacing. The loss is E|u_theta(x_t, t) - v_t|^2; the weights kept are their
exponential moving average. Dropout keeps the network from learning the 1437 training digits by heart.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.denoisers.pretrained import DiffusersDenoiser, save_pipeline
from implicit_diffusion.denoisers.scheduler import read_table
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.experiments import digits
from implicit_diffusion.experiments.digits_card import model_card
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.samplers.chain import Chain

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


@dataclass(frozen=True)
class Config:
    """The published setting. On one kind of processor it gives the same weights bit for bit."""

    data: str = "digits"
    out: Path = Path("runs/pretrain-digits")
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3  # after a linear warm-up over 200 steps; then cosine decay to zero
    ema_decay: float = 0.999
    dropout: float = 0.1
    channels: tuple[int, ...] = (24, 48)  # at 8x8 and 4x4 pixels; multiples of 8
    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    train_timesteps: int = 1000
    seed: int = 0
    chains: tuple[int, ...] = (10, 50)  # chain lengths at which the samples are judged
    samples: int = 2000


def run(config: Config) -> dict[str, Any]:
    """Train, judge and save: `model/` (a diffusers folder), `summary.json` and `figures/samples.png` in `config.out`.

    Returns:
        The summary: the config, the quality of the samples per chain length, the classifiers' held-out accuracy,
        the number of parameters, the losses on training and held-out digits and the seconds of the training.

    Raises:
        InvalidInputError: data other than "digits", or an `out` that exists and is not empty.
    """
    if config.data != "digits":
        raise InvalidInputError(f"data: got {config.data!r}; only 'digits' is known")
    directory = RunDirectory.create(config.out)
    directory.write_config(config)
    start = time.perf_counter()
    unet, scheduler = train(config)
    seconds = time.perf_counter() - start

    real = digits.load_digits()
    drawn = {n: sample_digits(unet, scheduler, n, config.samples, config.seed) for n in config.chains}
    summary = {
        "config": asdict(config) | {"out": str(config.out)},
        "quality": {str(n): digits.quality(x) for n, x in drawn.items()},
        "classifier_accuracy": digits.accuracy(digits.load_classifier()),
        "judge_accuracy": digits.accuracy(digits.fit_judge()),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "loss_train": denoising_loss(unet, scheduler, real.train),
        "loss_held_out": denoising_loss(unet, scheduler, real.held_out),
        "seconds": seconds,
    }
    save_pipeline(directory.model, DiffusersDenoiser(unet), scheduler, model_card(summary))
    directory.write_summary(summary)
    plot_samples({"real": real.held_out} | {f"{n} steps": x for n, x in drawn.items()}, directory.figure("samples"))
    print(f"model     {directory.model}")
    return summary


def build(config: Config) -> "tuple[UNet2DModel, DDPMScheduler]":
    """The untrained network and the scheduler: never clipping, since a clipped chain is not affine in the network."""
    from diffusers import DDPMScheduler, UNet2DModel

    levels = len(config.channels)
    unet = UNet2DModel(
        sample_size=digits.EVENT_SHAPE[-1],
        in_channels=1,
        out_channels=1,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        dropout=config.dropout,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=config.train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type="fixed_small",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return unet, scheduler


def train(config: Config) -> "tuple[UNet2DModel, DDPMScheduler]":
    """Train and return the averaged network, in eval mode, and its scheduler.

    Digits, times and noise come from an explicit generator. Weight initialisation and dropout know none, so the global
    one is seeded inside a fork, and the caller's random state is as before afterwards. Training runs on one thread:
    how many share a sum decides its rounding, and the result must not depend on that.

    Raises:
        NonFiniteError: the loss became NaN or infinite; the update is not done.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _train(config)
    finally:
        torch.set_num_threads(threads)


def _train(config: Config) -> "tuple[UNet2DModel, DDPMScheduler]":
    from diffusers.training_utils import EMAModel

    data = digits.load_digits().train
    generator = torch.Generator().manual_seed(config.seed)
    unet, scheduler = build(config)
    unet.train()
    average = EMAModel(unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, max(1, config.steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.steps - warmup)),
        ],
        [warmup],
    )
    with progress(config.steps, "pretraining") as bar:
        for step in range(1, config.steps + 1):
            x = data[torch.randint(len(data), (config.batch,), generator=generator)]
            loss = _loss(unet, scheduler, x, generator).mean()
            if not loss.isfinite():
                raise NonFiniteError(f"the loss is {loss.item()} at step {step} of {config.steps}; try a smaller lr")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.step(unet.parameters())
            bar.update({"loss": loss.detach()})
    average.copy_to(unet.parameters())
    return unet.eval(), scheduler


def _loss(unet: "UNet2DModel", scheduler: "DDPMScheduler", x: Tensor, generator: torch.Generator) -> Tensor:
    """|u(x_t, t) - target|^2 per pixel, at random times and noise, with shape (batch,)."""
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    targets = {
        "v_prediction": lambda: scheduler.get_velocity(x, noise, t),
        "epsilon": lambda: noise,
        "sample": lambda: x,
    }
    target = targets[scheduler.config.prediction_type]()
    prediction = unet(scheduler.add_noise(x, noise, t), t).sample
    return (prediction - target).square().flatten(1).mean(1)


@torch.no_grad()
def denoising_loss(unet: "UNet2DModel", scheduler: "DDPMScheduler", x: Tensor, repeats: int = 20) -> float:
    """The loss of the trained network on given digits, the same `repeats` times and noises per digit at each call.

    Much lower on training digits than on held-out ones means that the network has learnt the former by heart.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.cat([_loss(unet, scheduler, x, generator) for _ in range(repeats)]).mean().item()


def sample_digits(
    unet: "UNet2DModel", scheduler: "DDPMScheduler", num_steps: int, n: int, seed: int
) -> Float[Tensor, "n 1 8 8"]:
    """Samples (n, 1, 8, 8) of the chain that `scheduler` runs in `num_steps` steps."""
    chain = Chain(DiffusersDenoiser(unet), read_table(scheduler, num_steps), digits.EVENT_SHAPE)
    return chain.sample(Noise(seed), n)


def plot_samples(groups: dict[str, Tensor], path: Path, rows: int = 8, columns: int = 12) -> None:
    """Draw the first images of each group as one grid beside the others; black is -1, white is +1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.0), squeeze=False)
    for axis, (name, images) in zip(axes[0], groups.items(), strict=True):
        tiles = torch.full((rows, columns, 10, 10), -0.4)  # a grey frame of one pixel between the images
        shown = images[: rows * columns, 0].clamp(-1, 1)
        tiles.view(-1, 10, 10)[: len(shown), 1:9, 1:9] = shown
        axis.imshow(tiles.permute(0, 2, 1, 3).reshape(rows * 10, columns * 10).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
