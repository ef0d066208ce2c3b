"""R̂, the network in place of a reward without a gradient: the one that a surrogate brings along, and checks of any.

    R̂(x, c) = w_c · h(z) + v · z + d_c,        w_c = w + W[c],        z = (x − shift)/scale

with h a smooth network that suits the event (a perceptron for vectors, convolutions for images), and a line beside it,
which a few pairs determine. ∇R̂ is what trains θ, so that h has no kinks. A class label or the number of a prompt, c,
has a row of its own in tables that begin at zero: classes share what they have in common, and differ in how features
count. Everything after h begins at zero, and with it R̂ and ∇R̂.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_type, trying
from implicit_diffusion.frozen import check_complete, eval_mode
from implicit_diffusion.function_checks import check_own_gradient
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.tilted import mlp, zero_linear
from implicit_diffusion.reward_values import scores_of, takes_condition

LARGEST = 2**16  # numbers in an event that a perceptron reads
LEAST = 4  # pixels along a side, below which convolutions do not halve an image
WIDTH = 32  # channels of the first convolution
CHANNELS = 128  # of later ones, at most
FEATURES = 64  # of h
ROWS = 256  # of the tables: labels beyond share rows


class RewardNetwork(nn.Module):
    """R̂ of the module's text.

    Args:
        event_shape: of x.
        noise: of the initial weights.

    Raises:
        InvalidInputError: events that are neither images nor small enough for a perceptron.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, event_shape: Sequence[int], noise: Noise) -> None:
        super().__init__()
        self.features = _features(event_shape, noise)
        self.line = zero_linear(math.prod(event_shape))
        self.last = zero_linear(FEATURES)
        self.classes = nn.Embedding.from_pretrained(torch.zeros(ROWS, FEATURES + 1), freeze=False)
        each = [1, *event_shape[:1], *(1 for _ in event_shape[1:])]
        self.register_buffer("shift", torch.zeros(each))
        self.register_buffer("scale", torch.ones(each))

    def standardise(self, x: Float[Tensor, "n *event"]) -> None:
        """Set shift and scale from samples, per coordinate of vectors and per channel of images."""
        others = [dim for dim in range(x.ndim) if dim != 1]
        self.shift.copy_(x.mean(others, keepdim=True))
        deviation = (x - self.shift).square().mean(others, keepdim=True).sqrt()
        self.scale.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(
        self, x: Float[Tensor, "n *event"], condition: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, " n"]:
        """R̂; of the condition it sees the entries that hold an integer per sample."""
        z = (x - self.shift) / self.scale
        h = self.features(z)
        value = self.last(h) + self.line(z.flatten(1)) / math.sqrt(z[0].numel())
        for _, label in sorted(labels(condition).items()):
            weight, offset = self.classes(label % ROWS).split([FEATURES, 1], 1)
            value = value + (weight * h).sum(1, keepdim=True) + offset
        return value.squeeze(1)


def labels(condition: Mapping[str, Tensor] | None) -> dict[str, Int[Tensor, " n"]]:
    """The entries of a condition that hold an integer per sample: class labels, numbers of prompts."""
    given = (condition or {}).items()
    return {name: entry.long() for name, entry in given if entry.ndim == 1 and not entry.is_floating_point()}


def seen(network: Callable[..., Tensor], condition: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The entries of a condition that a network looks at: none of them where it has one argument."""
    if isinstance(network, RewardNetwork):
        return labels(condition)
    return (condition or {}) if takes_condition(network) else {}


def predicted(
    network: Callable[..., Tensor], x: Float[Tensor, "n *event"], condition: Mapping[str, Tensor] | None
) -> Float[Tensor, " n"]:
    """The network's output, one number per sample: network(x), or network(x, condition) where it has two arguments."""
    sees = isinstance(network, RewardNetwork) or takes_condition(network)
    return scores_of(network(x, condition) if sees else network(x), x)


def check_network(network: nn.Module, x: Float[Tensor, "n *event"], condition: Mapping[str, Tensor] | None) -> None:
    """Try a network of the user's own on a few samples.

    Raises:
        InvalidInputError: not a module, or one without trainable weights; something other than one number per sample,
            in the samples' dtype; no gradient in the samples or in the weights; samples that influence each other.
    """
    check_type("network", network, nn.Module, "R̂ is trained: use a torch.nn.Module from (n, *event) to (n,)")
    check_complete(network)
    weights = [p for p in network.parameters() if p.requires_grad]
    if not weights:
        raise InvalidInputError("network has no weights that require a gradient, and R̂ is trained; unfreeze some")
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), eval_mode(network):
        with trying("network", f"samples of shape {tuple(x.shape)}"):
            value = _of_samples(network, x, condition)
        if value.dtype != x.dtype:
            raise InvalidInputError(
                f"network must return the dtype of the samples, {x.dtype}, got {value.dtype}; use network.to(x.dtype)"
            )
        gradient, *moved = (
            torch.autograd.grad(value[0], [x, *weights], allow_unused=True) if value.requires_grad else [None]
        )
    if gradient is None or all(g is None for g in moved):
        of = "samples" if gradient is None else "weights"
        raise InvalidInputError(f"network is not differentiable: its result does not depend on its {of}")
    check_own_gradient("network", gradient)


def _of_samples(network: nn.Module, x: Tensor, condition: Mapping[str, Tensor] | None) -> Tensor:
    try:
        return predicted(network, x, condition)
    except InvalidInputError as error:
        raise InvalidInputError(str(error).replace("reward", "network", 1)) from error


def _features(event: Sequence[int], noise: Noise) -> nn.Sequential:
    """h, from (n, *event) to (n, FEATURES)."""
    if len(event) != 3:
        if math.prod(event) > LARGEST:
            raise InvalidInputError(
                f"network: the surrogate's own reads vectors of up to {LARGEST} numbers or images (channels, height, "
                f"width), not events of shape {tuple(event)}; pass a network of your own, from (n, *event) to (n,)"
            )
        return nn.Sequential(nn.Flatten(), mlp(math.prod(event), noise, width=FEATURES, depth=2)[:-1])
    channels, *sides = event
    generator = noise.generator(0)
    layers: list[nn.Module] = [_conv(channels, WIDTH, 1, generator), nn.SiLU()]
    width = WIDTH
    while max(sides) > LEAST:
        wider, sides = min(2 * width, CHANNELS), [-(-side // 2) for side in sides]
        layers += [_conv(width, wider, 2, generator), nn.SiLU()]
        width = wider
    head = mlp(width * math.prod(sides), noise.stream(1), width=FEATURES, depth=1)[:-1]
    return nn.Sequential(*layers, nn.Flatten(), head)


def _conv(channels: int, out: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    """A convolution whose weights have variance 1/fan_in and whose biases are zero."""
    layer = nn.utils.skip_init(nn.Conv2d, channels, out, 3, stride=stride, padding=1)
    assert layer.bias is not None
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
