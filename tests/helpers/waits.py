"""Where a program waits for its device, found without one: the device is torch's "meta", which has no numbers.

    with Waits() as waits:
        loop.step()
    waits.seen        # one entry per wait: what, and the lines of ours that it came from

A wait is a number read (`item`, `float`, `bool`, `tolist`), a result whose shape depends on numbers, or a copy between
CPU and device that is not asked for as `non_blocking`; and an index by a list, or a tensor made of numbers on the
device, which torch copies there out of sight of dispatch. Copies from the device must not be `non_blocking` either:
nobody would know when they are there. Numbers that are read are 1, and everything is finite.
"""

import traceback
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "meta"
SHAPED_BY_NUMBERS = {"nonzero", "masked_select", "_unique2", "equal"}


def devices(*found):
    return {x.device.type for x in tree_leaves(found) if isinstance(x, Tensor)}


class Dispatched(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = devices(args, kwargs)
        if name == "_local_scalar_dense" and DEVICE in given:
            self.note("a number is read")
            return 1.0
        if name in SHAPED_BY_NUMBERS and DEVICE in given:
            self.note(name)
        towards = name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == DEVICE
        if name == "_to_copy" and kwargs.get("device") is not None and towards != (DEVICE in given):
            if not (towards and kwargs.get("non_blocking")):
                self.note("a copy")
        elif name == "copy_" and {DEVICE, "cpu"} <= given:
            self.note("a copy")
        return func(*args, **kwargs)


class Called(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "tolist" and DEVICE in devices(args):
            self.note("numbers are read")
            return torch.ones(args[0].shape).tolist()
        if name in ("__getitem__", "__setitem__") and DEVICE in devices(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                self.note("an index by a list")
        if name in ("tensor", "as_tensor") and DEVICE in devices(out := func(*args, **kwargs)):
            self.note("a tensor made of numbers")
            return out
        return func(*args, **kwargs)


class Waits(ExitStack):
    """Context in which waits are noted."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __enter__(self):
        super().__enter__()
        self.enter_context(Dispatched(self._note))
        self.enter_context(Called(self._note))
        return self

    def _note(self, what):
        stack = [(f.filename, f.lineno) for f in traceback.extract_stack() if "implicit_diffusion/" in f.filename]
        self.seen.append((what, [f"{file.rpartition('/')[2]}:{line}" for file, line in stack]))
