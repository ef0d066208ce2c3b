"""The global generators of torch, NumPy and Python: rewards of the user's own may draw from them.

Nothing of ours does. Inside `Draws` they follow from the run's own noise, so that the same seed gives the same run
whatever was drawn before, and outside they are the caller's, as they were. A checkpoint keeps their states.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from implicit_diffusion.noise import Noise

GLOBAL = 2**31 + 1  # first key of what seeds them: beyond every trajectory, and beside loops.on_chain.TRIAL


class Draws:
    """Global generators of a run's own: in place inside `with draws:`, the caller's again after it.

    Only what may draw for the run belongs inside: a library that draws at its import, or for its screen, would shift
    the numbers of one run and not of another.

    Args:
        noise: of the run.
        key: another one gives other numbers.
        device: beside the CPU, whose generator rewards may draw from.
    """

    def __init__(self, noise: Noise, *key: int, device: torch.device | str = "cpu") -> None:
        self.device, self.outside = torch.device(device), generators(device)
        words = torch.randint(2**32, (16,), generator=noise.generator(GLOBAL, *key, 1)).tolist()
        try:
            torch.default_generator.manual_seed(words[0] + (words[1] << 31))
            _set(self.device, noise.generator(GLOBAL, *key, 2, device=device).get_state())
            np.random.seed(words[2:8])  # noqa: NPY002
            random.seed(sum(word << 32 * i for i, word in enumerate(words[8:])))
            self.state = generators(device)
        finally:
            restore_generators(self.outside, device)

    def __enter__(self) -> None:
        self.outside = generators(self.device)
        restore_generators(self.state, self.device)

    def __exit__(self, *error: object) -> None:
        self.state = generators(self.device)
        restore_generators(self.outside, self.device)


def generators(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Their states, as `save_state` keeps them."""
    device = torch.device(device)
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, spare = random.getstate()
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_index(device))
    return {
        "torch": torch.default_generator.get_state(),
        "device": [device.type, own],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(words), spare],
    }


def restore_generators(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Put them back where `generators` was called; that of a device only where it is one of the same type."""
    device = torch.device(device)
    torch.default_generator.set_state(state["torch"])
    if state["device"][0] == device.type:
        _set(device, state["device"][1])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, spare = state["python"]
    random.setstate((version, tuple(words.tolist()), spare))


def _set(device: torch.device, state: torch.Tensor | None) -> None:
    if device.type != "cpu" and state is not None:
        torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What names the device to its module; that of Apple knows a single one."""
    return () if device.type == "mps" else (device,)
