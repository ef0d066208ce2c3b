"""The global generators of torch, NumPy and Python, from which reward functions of the user may draw.

This package itself does not. Inside `GlobalGenerators` their states follow from the run's noise, so that the same seed
gives the same run regardless of earlier draws; outside they have the caller's states. A checkpoint keeps the states.
Of several processes, each has its own: a state holds those of all.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.noise import Noise

GLOBAL = 2**31 + 1  # first key of their seeds, which no trajectory and no trial of a reward has
States = tuple[Tensor, Tensor | None, Any, Any]  # of torch, of the device, of NumPy, of Python


class GlobalGenerators:
    """States of the global generators for a run, in use inside `with draws:`.

    Only code that draws for the run belongs inside: a library that draws when it is imported, or for its output, would
    shift the numbers of one run and not of another.

    Args:
        noise: of the run.
        key: a different key gives different numbers.
        device: on which rewards may draw, in addition to the CPU.
    """

    def __init__(self, noise: Noise, *key: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        words = torch.randint(2**32, (16,), generator=noise.generator(GLOBAL, *key, 1)).tolist()
        own = None if self.device.type == "cpu" else noise.generator(GLOBAL, *key, 2, device=device).get_state()
        numpy, python = (
            np.random.RandomState(words[:8]),
            random.Random(sum(w << 32 * i for i, w in enumerate(words[8:]))),
        )
        self.states: States = (noise.generator(GLOBAL, *key, 3).get_state(), own, numpy.get_state(), python.getstate())
        self.outside = self.states

    def __enter__(self) -> None:
        self.outside = self._get()
        self._set(self.states)

    def __exit__(self, *error: object) -> None:
        self.states = self._get()
        self._set(self.outside)

    def state_dict(self) -> dict[str, Any]:
        """Their states in all processes, as `save_state` keeps them; all of them call this."""
        return {"processes": processes.collected(self._state())}

    def _state(self) -> dict[str, Any]:
        cpu, own, (kind, keys, position, has_gauss, gauss), (version, words, spare) = self.states
        return {
            "torch": cpu,
            self.device.type: own,
            "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
            "python": [version, torch.tensor(words), spare],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the generator of a device of another type and a new process
        keep their present states.
        """
        if processes.rank() < len(state["processes"]):
            self._load(state["processes"][processes.rank()])

    def _load(self, state: dict[str, Any]) -> None:
        kind, keys, *rest = state["numpy"]
        version, words, spare = state["python"]
        own = state.get(self.device.type, self.states[1])
        numpy, python = (kind, keys.numpy().astype(np.uint32), *rest), (version, tuple(words.tolist()), spare)
        self.states = state["torch"], own, numpy, python

    def _get(self) -> States:
        own = None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state(*self._name)
        return torch.default_generator.get_state(), own, np.random.get_state(), random.getstate()  # noqa: NPY002

    def _set(self, states: States) -> None:
        cpu, own, numpy, python = states
        torch.default_generator.set_state(cpu)
        if own is not None:
            torch.get_device_module(self.device).set_rng_state(own, *self._name)
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)

    @property
    def _name(self) -> tuple[torch.device, ...]:
        """Arguments that name the device to its torch module; Apple's module has a single device."""
        return () if self.device.type == "mps" else (self.device,)
