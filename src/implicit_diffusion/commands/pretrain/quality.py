r"""How much samples look like the images that a model was trained on; `digits.quality` has more for the digits.

The squared maximum mean discrepancy of samples and held-out images, with the kernel k(x, y) = exp(-|x - y|^2 / 2 l^2),
l the median distance of real images (Gretton et al., *A Kernel Two-Sample Test*, JMLR 2012, eq. 3, the U-statistic):

    MMD^2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

(`objectives.MMD`). It is unbiased, hence about zero, of either sign, between two halves of the real images; its
deviation over random halves of the same size says how far from zero by chance. A sample counts as *memorised* where it
is nearer to a training image than 99 % of the held-out images are. Of a model with classes, nearest neighbours among
training images classify: how often they name the class that was asked for, and how often that of a held-out image.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.commands.pretrain.images.classes import in_turn
from implicit_diffusion.commands.pretrain.images.loading import Images, as_floats
from implicit_diffusion.commands.pretrain.summary import ImageQuality
from implicit_diffusion.digits.quality import mmd_of_halves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, gaussian_kernel
from implicit_diffusion.particles import Particles

SPLITS = 100  # into random halves
MOST = 1000  # real images on either side
NEIGHBOURS = 5
AT_ONCE = 64  # images whose distances to all training images are in memory


def in_words(quality: ImageQuality) -> str:
    """One line."""
    words = [
        f"MMD² {quality.mmd:.4f} to held-out images, {quality.mmd_of_halves:.4f} ± {quality.mmd_of_halves_std:.4f} "
        "between halves of real ones",
        f"{100 * quality.memorised:.1f} % memorised",
    ]
    if quality.as_asked is not None and quality.held_out_as_labelled is not None:
        share, real = 100 * quality.as_asked, 100 * quality.held_out_as_labelled
        words.append(
            f"{share:.0f} % of the class asked for, by neighbours that are right about {real:.0f} % of held-out ones"
        )
    return "; ".join(words)


@torch.no_grad()
def judge_images(samples: Float[Tensor, "n channels height width"], data: Images, noise: Noise) -> ImageQuality:
    """The quality of samples.

    Args:
        samples: with the classes in turn, where there are any; at least two.
        data: what was trained on and held out, at least two of either.
        noise: of the random halves.
    """
    held_out, train = (as_floats(part[:MOST]).flatten(1).double() for part in (data.held_out, data.train))
    count = min(len(held_out), len(train))
    real = torch.cat([held_out[:count], train[:count]])
    distances = torch.cdist(real, real)
    width = distances[tuple(torch.triu_indices(len(real), len(real), 1))].median().item()
    halves = mmd_of_halves((-0.5 * (distances / width) ** 2).exp(), SPLITS, noise.generator())
    x = samples.flatten(1).double().cpu()
    near, classes = neighbours(x, data)
    near_held_out, classes_held_out = neighbours(held_out, data)
    asked = as_labelled = None
    if classes is not None and classes_held_out is not None and data.held_out_labels is not None:
        asked = (classes == in_turn(len(data.classes), len(x))).double().mean().item()
        as_labelled = (classes_held_out == data.held_out_labels[: len(held_out)]).double().mean().item()
    return ImageQuality(
        samples=len(x),
        mmd=MMD(held_out, gaussian_kernel(width)).value(Particles(x)).item(),
        mmd_of_halves=halves.mean().item(),
        mmd_of_halves_std=halves.std().item(),
        memorised=(near < near_held_out.quantile(0.01)).double().mean().item(),
        nearest=near.mean().item(),
        nearest_held_out=near_held_out.mean().item(),
        as_asked=asked,
        held_out_as_labelled=as_labelled,
    )


def neighbours(x: Float[Tensor, "n d"], data: Images) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"] | None]:
    """Distances to the nearest training images, and the classes that most of the `NEIGHBOURS` nearest have."""
    train = as_floats(data.train).flatten(1)
    count = min(NEIGHBOURS, len(train))
    tops = [torch.cdist(part.to(train), train).topk(count, dim=1, largest=False) for part in x.split(AT_ONCE)]
    indices = torch.cat([each.indices for each in tops])
    # |x|² + |y|² − 2xy leaves much of a small distance to rounding: once more, for the nearest one
    nearest = torch.linalg.vector_norm(x - train[indices[:, 0]].to(x), dim=1)
    return nearest, None if data.train_labels is None else data.train_labels[indices].mode(1).values
