"""A Gaussian tilted by a network: exact while the network is zero, and never after without saying so."""

import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import Tilted, check_potential, conv, energy_of, mlp

F64 = torch.float64
EVENTS = {"mlp": (3,), "conv": (2, 5, 7)}


def build(kind, seed=0, dtype=F64):
    event = EVENTS[kind]
    network = mlp(3, Noise(seed), width=8, depth=2) if kind == "mlp" else conv(event, Noise(seed), width=4)
    return Tilted(network.to(dtype), event)


def tilt(potential, seed=1):
    """Give the last layer weights: the network is zero no longer."""
    last = potential.network[-1].weight
    last.data = Noise(seed).normal(tuple(last.shape), dtype=last.dtype) / math.sqrt(last.shape[1])
    return potential


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_start_is_a_standard_gaussian(kind, dtype):
    potential, d = build(kind, dtype=dtype), math.prod(EVENTS[kind])
    x = potential.sample(50_000 // d, Noise(0), 4)
    assert x.shape == (50_000 // d, *EVENTS[kind]) and x.dtype == dtype and not x.requires_grad
    assert torch.equal(x, potential.sample(len(x), Noise(0), 4))
    assert not torch.equal(x, potential.sample(len(x), Noise(0), 5))
    count = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(count)
    assert abs(x.square().mean() - 1) < 4 * math.sqrt(2 / count)
    assert potential.log_z == pytest.approx(d / 2 * math.log(2 * math.pi), rel=1e-14)
    value = potential(x)
    torch.testing.assert_close(value, x.flatten(1).square().sum(1) / 2, rtol=0, atol=0)
    assert value.shape == (len(x),) and potential.network(x).shape == (len(x), 1)
    torch.testing.assert_close(energy_of(potential, x[:9]).grad, x[:9])
    check_potential(potential, x)


@pytest.mark.parametrize("kind", EVENTS)
def test_a_network_that_is_not_zero_has_neither_draws_nor_log_z(kind):
    potential = tilt(build(kind))
    assert not hasattr(potential, "log_z") and getattr(potential, "log_z", 0.25) == 0.25
    with pytest.raises(AttributeError):
        _ = potential.log_z
    with pytest.raises(InvalidInputError, match=r"exact draws exist only while the network is zero.*annealed"):
        potential.sample(5, Noise(0))
    x = Noise(2).normal((6, *EVENTS[kind]), dtype=F64)
    expected = x.flatten(1).square().sum(1) / 2 + potential.network(x)[:, 0]
    torch.testing.assert_close(potential(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", EVENTS)
def test_a_smaller_temperature_is_a_share_of_the_same_network(kind):
    potential = tilt(build(kind))
    x = Noise(2).normal((6, *EVENTS[kind]), dtype=F64)
    start, half, end = (potential.tempered(t) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(start(x), x.flatten(1).square().sum(1) / 2, rtol=0, atol=0)
    assert start.log_z == pytest.approx(math.prod(EVENTS[kind]) / 2 * math.log(2 * math.pi))
    assert start.sample(3, Noise(0)).dtype == F64  # exact draws, though the network is not zero
    assert torch.equal(end(x), potential(x))
    assert not hasattr(half, "log_z")
    torch.testing.assert_close(half(x), (start(x) + end(x)) / 2, rtol=1e-13, atol=1e-13)
    assert {id(p) for p in half.parameters()} == {id(p) for p in potential.parameters()}


@pytest.mark.parametrize("kind", EVENTS)
def test_the_network_is_a_function_of_the_noise_alone(kind):
    state = torch.get_rng_state()
    first = build(kind)
    torch.rand(3)  # the global generator moves, on purpose
    moved = torch.get_rng_state()
    again, other = build(kind), build(kind, seed=1)
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)
    a, b, c = (list(potential.state_dict().values()) for potential in (first, again, other))
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a[:-1], c[:-1]))


@pytest.mark.parametrize("kind", EVENTS)
def test_unit_inputs_give_hidden_units_of_order_one(kind):
    """Weights of variance 1/fan_in, biases of zero, and a last layer of zeros without a bias."""
    wide = (
        Tilted(mlp(64, Noise(0), width=256), (64,)) if kind == "mlp" else Tilted(conv((1, 8, 8), Noise(0)), (1, 8, 8))
    )
    *hidden, last = [part for part in wide.network if isinstance(part, nn.Linear | nn.Conv2d)]
    for layer in hidden:
        fan_in, count = layer.weight[0].numel(), layer.weight.numel()
        assert abs(layer.weight.square().mean() * fan_in - 1) < 4 * math.sqrt(2 / count)
        assert not layer.bias.any()
    assert last.bias is None and not last.weight.any()


@pytest.mark.parametrize("event", [(1, 1, 1), (3, 2, 9), (1, 8, 8), (2, 5, 6)])
def test_conv_takes_images_of_any_size(event):
    assert conv(event, Noise(0), width=2)(torch.zeros(4, *event)).shape == (4, 1)


@pytest.mark.parametrize("event", [(2,), (8, 8), (1, 1, 8, 8)])
def test_conv_refuses_what_is_no_image(event):
    with pytest.raises(InvalidInputError, match=r"conv needs images \(channels, height, width\), got events"):
        conv(event, Noise(0))
