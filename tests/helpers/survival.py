"""Runs in real processes that are ended at a chosen moment, continued, and compared with runs that nothing ended."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.helpers import energy_models

ROOT = Path(__file__).parents[2]
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
STATES = {"checkpoint", "plan", "judged", "kept", "seconds.json", "provenance.json"}
OVER_SECONDS = {"cost.png", "curves.png", "comparison.png"}  # what is on an axis of these figures
SECONDS = re.compile(
    r"\d+(\.\d+)? (<small>)?(s|seconds|min|h)\b|<section><h2>Where the time went.*?</section>|data:image/[^\"]*",
    re.DOTALL,
)


class Ended(NamedTuple):
    """How a process ended: exit status, negative for a signal; what it printed, and the last line of its errors."""

    status: int
    out: str
    err: str

    @property
    def line(self):
        return (self.err.strip().splitlines() or [""])[-1]


class Commands:
    """Runs command lines in forks of one process, in one folder.

    Args:
        root: the folder.
        modules: that the process imports.
    """

    def __init__(self, root, modules):
        self.root, self.said = root, 0
        own = {"IMPLICIT_DIFFUSION_CACHE": str(root / "cache"), "XDG_STATE_HOME": str(root / "state")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.zygote", *modules],
            cwd=ROOT,
            env={**os.environ, **own, "OMP_NUM_THREADS": "1", "IMPLICIT_DIFFUSION_TRACEBACK": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def start(self, words, **trap):
        """Start a command line; returns what `end` needs. `trap` are arguments of `moments.Trap`."""
        self.said += 1
        said = self.root / f"said-{self.said}"
        trap = {"out": str(self.root / out_of(words)), **trap}
        return self._ask(words=words, folder=str(self.root), said=str(said), trap=trap), said

    def end(self, started):
        """How it ended, once it has."""
        child, said = started
        status = self._ask(wait=child)
        texts = []
        for end in ("out", "err"):
            file = Path(f"{said}.{end}")
            texts.append(file.read_text())
            file.unlink()
        return Ended(status, *texts)

    def wait_for_stop(self, started):
        """Return once the process has been stopped by SIGSTOP."""
        assert self._ask(stop=started[0])

    def run(self, words, **trap):
        """Run a command line to its end."""
        return self.end(self.start(words, **trap))

    def _ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def out_of(words):
    return words[words.index("--out") + 1] if "--out" in words else words[1]


CHAIN = "--model tiny --reward mine.py:reward --num-steps 2 --batch 2 --starts 4 --device cpu"
TUNED = f"{CHAIN} --updates 4 --lr 1e-3"
ENERGY = "--data plane.npy --steps 4 --particles 16 --judge-steps 4 --width 8"
LINES = {
    "queue": f"finetune {TUNED} --kl-weight 2.5",
    "nested": f"finetune {TUNED} --kl-weight 2.5 --loop nested --ema 0.9 --accumulate 2",
    "lora": f"finetune {TUNED} --kl-weight 2.5 --lora-rank 2",
    "adapt": f"finetune {TUNED} --target-kl 0.05",
    "kept": f"finetune {TUNED} --kl-weight 2.5 --target-kl 1e-6 --target-kl-mode stop",
    "plan": f"finetune --plan {CHAIN}",
    "sweep": f"sweep --kl-weights 1 2 {TUNED}",
    "pretrain": "pretrain --data images --steps 4 --batch 2 --chains 2 --samples 4 --channels 8 8 --device cpu",
    "ebm": f"ebm {ENERGY}",
    "compare": f"ebm --compare {ENERGY} --seeds 1".replace("plane.npy", "eight-gaussians"),
    "tilt": "tilt --model energy --reward mine.py:reward --kl-weights 1 --steps 3 --particles 16 --seeds 2",
    "hexagon": "hexagon --steps 10 --particles 16 --seeds 1 --grid 1",
    "recovery": "recovery --steps 500 --particles 16 --seeds 1",
    "theory": "theory --parts rates --steps 100 --copies 2 --particles 8",
    "methods": "compare --problems gaussian --methods adjoint score --num-steps 2 --depth 2 --batch 4 --batches 2 "
    "--updates 2 --points 1 --held-out 8 --widest 3 --seeds 1",
}  # one tiny run of every command that trains
LIGHT = ["implicit_diffusion.cli", "tyro", "rich.progress", "matplotlib.figure", "matplotlib.backends.backend_agg"]
LIGHT += [f"implicit_diffusion.commands.{name}" for name in ("resuming", "ebm.command", "ebm.figures", "ebm.report")]
LIGHT += ["torch._dynamo", "sklearn.covariance", "PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin"]
LIGHT += ["PIL.PpmImagePlugin", "filelock", "typeguard"]
HEAVY = [f"implicit_diffusion.commands.{name}.command" for name in ("finetune", "pretrain", "sweep", "hexagon", "tilt")]
HEAVY += [f"implicit_diffusion.commands.{name}" for name in ("finetune.report.report", "ebm.compare")]
HEAVY += [
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.training_utils",
    "peft",
]


class Lab(Commands):
    """Runs of `LINES`, and one of each that nothing ends, made when it is first asked for."""

    def __init__(self, root, modules=()):
        super().__init__(root, [*LIGHT, *modules])
        self.whole = {}

    def words(self, name, out):
        return [*LINES[name].split(), "--out", out]

    def reference(self, name):
        """What the run leaves, and the names of its moments in the order of their first occurrence."""
        if name not in self.whole:
            log = self.root / "moments"
            ended = self.run(self.words(name, f"{name}-whole"), log=str(log))
            assert ended.status == 0, ended.err
            out = self.root / f"{name}-whole"
            self.whole[name] = contents(out, out), list(dict.fromkeys(log.read_text().splitlines()))
            log.unlink()
        return self.whole[name]

    def spread(self, name, count, shift=0.0):
        """That many moments of the run, evenly from begin to end; `shift`, from 0 to 1, is within their distance."""
        _, moments = self.reference(name)
        return [moments[int((i + shift) * len(moments) / count)] for i in range(count)]

    def endure(self, name, stops, out):
        """End a run at each moment in turn, and continue it as its messages say, until it is what the reference is.

        Where it comes to its end before all moments are met, the others have another run.

        Args:
            name: of the line.
            stops: pairs of what happens, and the moment: the first whose name holds this.
            out: how the names of its folders begin.

        Returns:
            the stops that ended nothing, though nothing had ended the run before.
        """
        left, passed, runs = list(stops), [], 0
        while left or not runs:
            runs += 1
            met = self._continued(name, left, f"{out}-{runs}")
            passed += [] if met else left[:1]
            left = left[max(met, 1) :]
        return passed

    def _continued(self, name, stops, out):
        """The number of stops that ended the run before it came to its end."""
        words, met, place = self.words(name, out), 0, self.root / out
        for does, of in [*stops, (None, "")]:
            ended = self.run(words, does=does, at=1, of=of)
            refused = any(phrase in ended.line for phrase in ("holds a run", "not empty: a run that"))
            if ended.status == 2 and refused and words[0] != "resume":
                words = ["resume", out]  # what the refusal of the same command says
                ended = self.run(words, does=does, at=1, of=of)
            if ended.status == 0 or (ended.status == 2 and words[0] == "resume" and "it is finished" in ended.line):
                break
            about = f"{name} after {stops[:met]}, {does} at {of!r}: {words}, status {ended.status}: {ended.err[-2000:]}"
            assert does is not None and ended.status == STATUS.get(does, 2), about
            assert "Traceback" not in ended.err, about
            lost = (self.root / f"{out}.away").exists()
            if does != "SIGKILL":
                assert ended.line.startswith("interrupted" if does in STATUS else "error: "), about
                begun = (place / "config.json").exists() and not (place / "summary.json").exists() and not lost
                assert advice(ended) or not begun, about
            if lost:  # and found
                shutil.rmtree(place, ignore_errors=True)
                (self.root / f"{out}.away").rename(place)
            found = lost and (place / "config.json").exists() and name not in ("sweep", "compare")
            words = ["resume", out] if found or advice(ended) == "resume" else self.words(name, out)
            met += 1
        wrong = self.different(name, out)
        assert not wrong, f"{name} after {stops[:met]}: {wrong} differ"
        return met

    def different(self, name, out):
        """The names of what a run and the reference do not have in common."""
        ours, (theirs, _) = contents(self.root / out, self.root / out), self.reference(name)
        return sorted(file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file))


def advice(ended):
    """What the last line says to do: "repeat" the command (a run of a sweep may be named too), "resume", or nothing."""
    if "the same command" in ended.line:
        return "repeat"
    return "resume" if "`implicit-diffusion resume " in ended.line else None


def prepare(root):
    """What the lines name: a model with a tiny network, an energy model, images, points and a reward."""
    draws = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(6):
        Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / f"images/{i}.png")
    np.save(root / "plane.npy", draws.normal(size=(40, 2)))
    (root / "mine.py").write_text("from tests.helpers.moments import reward\n")
    energy_models.bent().save(root / "energy")


def contents(folder, out):
    """All that a run leaves, by name, without wall-clock seconds and the name of its folder."""
    out = str(out)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        times = folder.name.startswith("methods") and path.suffix == ".html"  # columns of them, in its table
        if path.is_dir() or times or (STATES | OVER_SECONDS) & set(name.parts):
            continue
        if path.suffix == ".jsonl":
            found[str(name)] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[str(name)] = _timeless(json.loads(path.read_text().replace(out, "OUT")))
        elif path.suffix in (".md", ".html"):
            found[str(name)] = SECONDS.sub("", path.read_text().replace(out, "OUT"))
        else:
            found[str(name)] = path.read_bytes()
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in ("seconds", "begun")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
