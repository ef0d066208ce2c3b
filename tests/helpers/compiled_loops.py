"""Compiled loops beside eager ones, in a process without the tests' type checks, which no compiler can trace.

python -m tests.helpers.compiled_loops NAME...      # of gibbs_loops.BUILDS, or "plain": the optimizer's step along
"""

import sys

import torch

from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.samplers import ULA
from tests.helpers.gibbs_loops import build, wave
from tests.helpers.oracles_gibbs import Banana


def plain(compiled=False):
    potential = Banana()
    x = potential.draw(64, torch.Generator().manual_seed(0))
    sgd = torch.optim.SGD(potential.parameters(), lr=0.01, momentum=0.5)  # Adam's count is in single precision there
    return Single(potential, ULA(0.2), Reward(wave), sgd, particles=x, noise=Noise(0), iterations=2, compiled=compiled)


def main(names):
    for name in names:
        make = plain if name == "plain" else lambda compiled=False, name=name: build(name, lr=0.01, compiled=compiled)
        eager, compiled = make(), make(compiled=True)
        for _ in range(5):
            a, b = eager.step(), compiled.step()
        if compiled.compiled.reason is not None:
            sys.exit(f"{name} was not compiled: {compiled.compiled.reason}")
        torch.testing.assert_close(compiled.weighted_state.x, eager.weighted_state.x, rtol=1e-8, atol=1e-8)
        for p, q in zip(compiled.model.parameters(), eager.model.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
        for key, value in a.items():
            torch.testing.assert_close(torch.as_tensor(b[key]), torch.as_tensor(value), rtol=1e-8, atol=1e-8)
        print(name, "agrees", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
