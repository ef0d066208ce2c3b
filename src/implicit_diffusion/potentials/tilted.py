"""A Gaussian tilted by a network: the energy-based model whose beginning is known exactly.

    V(x; θ) = ‖x‖²/2 + f(x; θ),        π_θ(x) ∝ N(x; 0, I) e^{−f(x; θ)}

With f = 0 at the start (a last layer of zeros) π_θ0 is N(0, I): X_0 is drawn exactly and log Z_θ0 = (d/2) log 2π, which
is what weighted particles need. The Gaussian also confines the particles far from the data, where f is not trained; f
must not fall faster than ‖x‖²/2 grows. Data are standardised first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_type, shown
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import ShownModule, brief


class Tilted(ShownModule):
    """V(x) = ‖x‖²/2 + f(x).

    While f is zero, `log_z` is log ∫ e^{−V} and `sample` draws from π_θ. Neither is known for a network that is not
    zero: loops then need particles from elsewhere (e.g. `annealed`), and report by how much log Z grows.

    Args:
        network: f, from (n, *event) to (n,) or (n, 1); `mlp` and `conv` build networks whose last layer is zero.
        event_shape: of x.

    Raises:
        InvalidInputError: a network that is not a module; an event shape that does not hold positive sizes.
    """

    def __init__(self, network: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        check_type("network", network, nn.Module, "mlp and conv build one")
        check_type("event_shape", event_shape, Iterable, "it holds the sizes of one x, e.g. (2,)")
        if isinstance(event_shape, str | bytes) or getattr(event_shape, "ndim", 1) == 0:
            raise InvalidInputError(f"event_shape must hold the sizes of one x, e.g. (2,), got {shown(event_shape)}")
        self.network, self.event_shape = network, tuple(check_integer("event_shape", size) for size in event_shape)
        if not self.event_shape:
            raise InvalidInputError("event_shape must hold at least one size, e.g. (2,)")

    def _words(self) -> Iterable[str]:
        return brief(self.network), f"event_shape={self.event_shape}"

    def forward(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """V(x).

        Raises:
            InvalidInputError: a network whose values do not have the shape (n,) or (n, 1).
        """
        f = self.network(x)
        if f.numel() != len(x):
            raise InvalidInputError(
                f"network of Tilted must return shape (n,) or (n, 1), got {tuple(f.shape)} for {len(x)} particles"
            )
        return x.flatten(1).square().sum(1) / 2 + f.reshape(len(x))

    @property
    def log_z(self) -> float:
        """(d/2) log 2π.

        Raises:
            AttributeError: f is not zero, so that log Z is not known.
        """
        if not self._is_gaussian(self._draw(8, Noise(0))):
            raise AttributeError("log Z is known only while the network is zero")
        return math.prod(self.event_shape) / 2 * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, n: int, noise: Noise, *key: int) -> Float[Tensor, "n *event"]:
        """Exact draws from π_θ while f is zero, with shape (n, *event); the same key gives the same draws.

        Args:
            n: how many.
            noise: source of the random numbers.
            key: which draw of this noise.

        Raises:
            InvalidInputError: f is not zero.
        """
        check_type("noise", noise, Noise, "use Noise(0), for example")
        x = self._draw(check_integer("n", n), noise, *key)
        if not self._is_gaussian(x):
            raise InvalidInputError(
                "exact draws exist only while the network is zero; reach this potential by `annealed`, and pass the "
                "particles themselves"
            )
        return x

    def tempered(self, t: float) -> Tilted:
        """‖x‖²/2 + t f(x) with the same network: a path from N(0, I) at t = 0 to this potential at t = 1."""
        t = check_number("t", t)
        return Tilted(Scaled(self.network, t), self.event_shape)

    def _draw(self, n: int, noise: Noise, *key: int) -> Tensor:
        first = next(self.parameters())
        return noise.normal((n, *self.event_shape), *key, device=first.device, dtype=first.dtype)

    @torch.no_grad()
    def _is_gaussian(self, x: Tensor) -> bool:
        with eval_mode(self.network):
            return not self.network(x).any()


class Scaled(nn.Module):
    """t f(x), a network times a number.

    Args:
        network: f, which is shared.
        factor: t.
    """

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, "n *one"]:
        return self.factor * self.network(x)


def mlp(dimension: int, noise: Noise, *, width: int = 128, depth: int = 3) -> nn.Sequential:
    """A smooth perceptron from (n, dimension) to (n, 1): `depth` hidden layers with SiLU and a last layer of zeros.

    It is smooth because ∇f moves the particles: a kink in f is a jump in their drift.

    Args:
        dimension: of x.
        noise: of the initial weights.
        width: of the hidden layers.
        depth: number of hidden layers.

    Raises:
        InvalidInputError: sizes that are not positive integers.
    """
    check_type("noise", noise, Noise, "use Noise(0), for example")
    for name, size in (("dimension", dimension), ("width", width), ("depth", depth)):
        check_integer(name, size)
    generator, sizes = noise.generator(0), itertools.chain([dimension], itertools.repeat(width, depth))
    hidden = [
        part
        for into, out in itertools.pairwise(sizes)
        for part in (_drawn(nn.Linear, into, out, generator=generator), nn.SiLU())
    ]
    return nn.Sequential(*hidden, zero_linear(width))


def conv(event_shape: Sequence[int], noise: Noise, *, width: int = 32) -> nn.Sequential:
    """A smooth convolutional network from images (n, C, H, W) to (n, 1), with a last layer of zeros.

    Three convolutions, the last two of which halve height and width, then one hidden layer over all that is left.

    Args:
        event_shape: (channels, height, width).
        noise: of the initial weights.
        width: channels of the first convolution.

    Raises:
        InvalidInputError: an event that is not an image (channels, height, width).
    """
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_integer("width", width)
    check_type("event_shape", event_shape, Sequence, "it holds (channels, height, width)")
    if len([check_integer("event_shape", size) for size in event_shape]) != 3:
        raise InvalidInputError(f"conv needs images (channels, height, width), got events {tuple(event_shape)}")
    generator, (channels, height, across) = noise.generator(0), event_shape
    cells = -(-height // 4) * -(-across // 4)
    return nn.Sequential(
        _drawn(nn.Conv2d, channels, width, 3, padding=1, generator=generator),
        nn.SiLU(),
        _drawn(nn.Conv2d, width, 2 * width, 3, stride=2, padding=1, generator=generator),
        nn.SiLU(),
        _drawn(nn.Conv2d, 2 * width, 4 * width, 3, stride=2, padding=1, generator=generator),
        nn.SiLU(),
        nn.Flatten(),
        _drawn(nn.Linear, 4 * width * cells, 4 * width, generator=generator),
        nn.SiLU(),
        zero_linear(4 * width),
    )


def zero_linear(width: int) -> nn.Linear:
    """A linear layer (n, width) → (n, 1) of zeros, without a bias: a constant in V says nothing about π."""
    last = nn.utils.skip_init(nn.Linear, width, 1, bias=False)
    nn.init.zeros_(last.weight)
    return last


def _drawn(kind: type[nn.Module], *sizes: int, generator: torch.Generator, **options: int) -> nn.Module:
    """A layer whose weights have variance 1/fan_in and whose biases are zero: unit inputs give unit outputs."""
    layer = nn.utils.skip_init(kind, *sizes, **options)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)
    nn.init.zeros_(bias)
    return layer
