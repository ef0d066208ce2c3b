"""The moments of a run, counted inside its process, and what happens at one of them: a signal, or a fault.

A moment is a change in the folder of the run (Python's audit events: a file opened for writing, renamed or removed, a
folder made), a part of the run that begins or ends, a step of a loop, a count of progress, and a call of the reward
below. Nothing here knows the files of a run, so that all of its moments are found, whatever it writes.
"""

import errno
import hashlib
import math
import os
import re
import signal
import sys

import numpy as np
import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
TEMPORARY = re.compile(r"\btmp\w{8}\b")  # names that differ from run to run
UNCOUNTED = "seconds.json"  # written when it is due by the clock
present = None  # the trap of this process


def hasten():
    """Write as often as can be what a run writes every few seconds or minutes, and judge with few particles."""
    from implicit_diffusion.commands.ebm import command, compare, judging
    from implicit_diffusion.commands.pretrain import training
    from implicit_diffusion.commands.tilt import training as tilt
    from implicit_diffusion.evaluation import stored
    from implicit_diffusion.runs import fit

    command.LOOKS, compare.GRID, judging.PARTICLES = 2, compare.GRID[:1], {"vectors": 64, "images": 64}
    tilt.ANNEALING = 20

    fit.fit.__kwdefaults__["checkpoint_every"] = fit.READ_EVERY = 0.0
    stored.WRITE_EVERY = stored.WRITING_SHARE = 1e-9
    training.SAVE_EVERY = training.CHECKPOINT_EVERY = 0.0


def sketch():
    """Save a dot for every picture, with a digest of all that it shows."""
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    def savefig(figure, file, **options):
        shown = PngInfo()
        shown.add_text("shows", _digest(figure))
        Image.new("RGB", (1, 1)).save(file, options["format"], pnginfo=shown)

    Figure.savefig = savefig


def _digest(figure):
    digest = hashlib.sha256()
    for axes in figure.axes:
        arrays = [line.get_xydata() for line in axes.lines] + [image.get_array() for image in axes.images]
        arrays += [path.vertices for each in axes.collections for path in each.get_paths()]
        arrays += [each.get_offsets() for each in axes.collections] + [p.get_path().vertices for p in axes.patches]
        for array in arrays:
            digest.update(np.ma.getdata(array).astype(float).tobytes())
        words = [text.get_text() for text in (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label)]
        digest.update("|".join([*words, *axes.get_legend_handles_labels()[1]]).encode())
    return digest.hexdigest()


class Trap:
    """Counts moments, and acts at one.

    Args:
        out: the folder of the run.
        does: the name of a signal or a fault; None to count only.
        at: number of the moment, from one.
        of: a moment is counted if its name holds this.
        log: file that gets the names of all moments.
    """

    def __init__(self, out, does=None, at=0, of="", log=None):
        self.out, self.does, self.at, self.of, self.log = os.path.abspath(out), does, at, of, log
        self.count, self.lasting, self.busy = 0, None, False

    def set(self):
        """Count from here on."""
        global present
        from implicit_diffusion import loops
        from implicit_diffusion.runs import clock
        from implicit_diffusion.runs.console import Progress

        present = self
        sys.addaudithook(self._audit)
        _before(clock, "_count", lambda: self.moment("part"))
        _before(Progress, "update", lambda bar, *_, **__: self.moment(f"progress of {bar.description}"))
        from implicit_diffusion.commands.pretrain.state import Pretraining

        _before(Pretraining, "descend", lambda state, loss: self.moment("step", state))
        for kind in (loops.Nested, loops.Queue, loops.Single, loops.NestedParticles):
            _before(kind, "step", lambda loop, **_: self.moment("step", loop))

    def moment(self, name, subject=None):
        """Count one, and act if it is the one; returns what `subject` becomes."""
        from implicit_diffusion.runs import clock

        if self.busy:
            return subject
        self.busy = True
        try:
            name = f"{name} in {clock._parts[-1] if clock._parts else 'no part'}"
            if self.log is not None:
                with open(self.log, "a") as file:
                    file.write(name + "\n")
            if self.of not in name:
                return subject
            self.count += 1
            if self.does is None or self.count != self.at:
                return subject
        finally:
            self.busy = False
        return self._act(subject)

    def _act(self, subject):
        does = self.does
        if hasattr(signal, does):
            signal.raise_signal(getattr(signal, does))
        elif does == "vanish":
            os.rename(self.out, self.out + ".away")
        elif does in ("full", "readonly"):
            self.lasting = does
        elif does == "memory":
            raise MemoryError
        elif does == "torch memory":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 9 bytes"
            )
        elif does == "error":
            raise RuntimeError("a colour is missing")
        elif isinstance(subject, torch.Tensor):
            return _spoiled(subject, does)
        else:
            _spoil_once(subject, does)
        return subject

    def _audit(self, event, arguments):
        if self.busy or not (event == "open" or event in CHANGES):
            return
        path = arguments[0]
        if event == "open" and not (isinstance(path, str) and isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        path = os.fspath(path)
        if not os.path.abspath(path).startswith(self.out + os.sep) or path.endswith((UNCOUNTED, UNCOUNTED + ".tmp")):
            return
        place = TEMPORARY.sub("tmp", os.path.relpath(path, self.out))
        self.moment(f"{event.removeprefix('os.')} {place}")
        if self.lasting == "readonly" or (self.lasting == "full" and event in ("open", "os.mkdir")):
            number = errno.EROFS if self.lasting == "readonly" else errno.ENOSPC
            raise OSError(number, os.strerror(number))


def _before(owner, name, call):
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        call(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _spoiled(x, does):
    """NaN or infinity in place of a value, or in its gradient alone."""
    if does == "gradient nan":
        return x + 0 * (x - x.detach()).abs().sqrt()
    return x + {"nan": math.nan, "inf": math.inf}[does]


def _spoil_once(loop, does):
    """The network, or its gradient, during the next step."""
    (what, how), model = does.split(), loop.model if hasattr(loop, "model") else loop.unet
    if what == "gradient":
        first = next(p for p in model.parameters() if p.requires_grad)
        handle = first.register_hook(
            lambda gradient: handle.remove() or gradient + {"nan": math.nan, "inf": math.inf}[how]
        )
        return

    def spoil(module, inputs, output):
        handle.remove()
        if how == "error":
            raise RuntimeError("a colour is missing")
        value = {"nan": math.nan, "inf": math.inf}[how]
        if isinstance(output, torch.Tensor):
            return output + value
        output.sample = output.sample + value
        return output

    handle = model.register_forward_hook(spoil)


def reward(x):
    """The mean over all values, (n, *event) → (n,): a moment."""
    value = x.flatten(1).mean(1)
    return value if present is None else present.moment("reward", value)
