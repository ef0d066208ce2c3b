"""Frozen copies do not move, and eval mode is given back part by part."""

import functools
import inspect
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as by_parametrization
from torch.nn.utils import prune

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.frozen import copied, eval_mode, frozen_copy, parametrizations, train_once

X = torch.linspace(-1, 1, 12).view(4, 3)


def test_frozen_copy_stays_while_the_original_trains():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    frozen = frozen_copy(module)
    x = torch.randn(4, 3)
    before = frozen(x)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(frozen(x), before)
    assert not frozen.training
    assert module.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_functions_cannot_be_frozen():
    with pytest.raises(InvalidInputError, match=r"must be a torch\.nn\.Module, got function"):
        inspect.unwrap(frozen_copy)(lambda x, t: x)  # beneath the run-time type checks of the tests


def test_eval_mode_restores_each_part_even_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout()))
    module[1].eval()
    modes = [part.training for part in module.modules()]
    with pytest.raises(RuntimeError, match="inside"), eval_mode(module, torch.relu, None):
        assert not any(part.training for part in module.modules())
        raise RuntimeError("inside")
    assert [part.training for part in module.modules()] == modes


def linear(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = linear(), linear(1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class Scaled(nn.Module):
    """With a tensor that is computed, and a hook that is a method."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
        self.scales = [self.layer.weight.norm()]
        self.register_forward_pre_hook(self.refresh)

    @staticmethod
    def refresh(module, inputs):
        module.scales = [module.layer.weight.norm()]

    def forward(self, x):
        return self.layer(x) / self.scales[0]


class Counting(nn.Module):
    """With a hook that is a bound method, and counts."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = linear(), 0
        self.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.calls += 1

    def forward(self, x):
        return self.layer(x)


def hooked(wrap, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch calls them deprecated
        return nn.Sequential(wrap(linear(), *arguments), nn.Tanh())


MODULES = {
    "weight_norm": lambda: hooked(nn.utils.weight_norm),
    "spectral_norm": lambda: hooked(nn.utils.spectral_norm),
    "pruned": lambda: nn.Sequential(prune.l1_unstructured(linear(), "weight", 0.5)),
    "parametrized weight_norm": lambda: hooked(by_parametrization.weight_norm),
    "parametrized spectral_norm": lambda: hooked(by_parametrization.spectral_norm),
    "orthogonal": lambda: hooked(by_parametrization.orthogonal),
    "tied": Tied,
    "a tensor that is computed": Scaled,
    "a hook that is a method": Counting,
    "DataParallel": lambda: nn.DataParallel(linear()),
    "compiled": lambda: torch.compile(nn.Sequential(linear()), backend="eager"),
    "compiled in place": lambda: nn.Sequential(linear()),
}


@pytest.mark.parametrize("name", MODULES)
def test_copies_are_of_the_moment_and_share_nothing(name):
    module = MODULES[name]()
    if name == "compiled in place":
        module.compile(backend="eager")
    module(X)  # hooks leave what they computed
    with eval_mode(module):
        before = module(X).detach()
    frozen = frozen_copy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1 + p)
    module(X), train_once(parametrizations(module))
    assert torch.equal(frozen(X), before) and not torch.allclose(module(X), before)
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert own.isdisjoint(t.data_ptr() for t in (*frozen.parameters(), *frozen.buffers()))
    assert len(list(frozen.parameters())) == len(list(module.parameters()))


def test_quantised_modules_are_copied():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear}, torch.qint8)
    assert torch.equal(frozen_copy(module)(X), module(X))


def test_the_hook_of_spectral_norm_follows_the_weights_as_the_parametrization_does():
    """‖W/σ‖ = 1 with σ by power iteration, though the modules are in evaluation mode whenever they are called."""
    for wrap in (nn.utils.spectral_norm, by_parametrization.spectral_norm):
        module = hooked(wrap).eval()
        (original,) = (p for name, p in module.named_parameters() if "bias" not in name)
        for _ in range(100):
            with torch.no_grad():
                original.mul_(1.1).add_(0.1 * torch.eye(3))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                train_once(parametrizations(module))
        module(X)
        assert torch.linalg.matrix_norm(module[0].weight.detach(), 2) == pytest.approx(1, abs=1e-3)


def closing_hook():
    module = nn.Sequential(linear())
    module[0].register_forward_hook(lambda layer, inputs, output: output + module[0].bias)
    return module


def replaced_forward():
    module = nn.Sequential(linear())
    original = module[0].forward
    module[0].forward = functools.partial(lambda factor, x: factor * original(x), 2.0)
    return module


def uncopyable():
    module = nn.Sequential(linear(), nn.Tanh())
    module[1].lock = threading.Lock()
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (closing_hook, r"layer 0 \(Linear\): it holds the function closing_hook.*closes over the original"),
        (replaced_forward, r"layer 0 \(Linear\): it holds the function"),
        (uncopyable, r"layer 1 \(Tanh\): TypeError: cannot pickle.*reference=\.\.\. of a Chain"),
        (lambda: nn.Sequential(nn.Tanh(), nn.LazyLinear(3)), "1.weight of Sequential belongs to a lazy layer"),
    ],
)
def test_what_cannot_be_copied_is_named(make, message):
    with pytest.raises(InvalidInputError, match=message):
        copied(make())
