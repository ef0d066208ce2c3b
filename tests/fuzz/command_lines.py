"""Random command lines, each in a process of its own: `python -m tests.fuzz.command_lines SEED COUNT`.

Options and their types are read off the commands' configurations, so that a new option is tried without a word here.
Every line begins as a valid, tiny run; a few options are then set at random, to values of their type and to values that
no option expects. What a line may do is written in `verdict`. Prints one JSON object per line that did something else.
"""

import dataclasses
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path

LIMIT = 90.0  # seconds, after which a line is told to stop; a run that does is as good as one that ends
GRACE = 60.0  # seconds that it may take to stop
MEMORY = 8 << 30  # bytes of address space
WRITTEN = 64 << 20  # bytes of one file

INTEGERS = ["0", "1", "2", "3", "5", "8", "16", "-1", "-3", "1000000000000", "9" * 30]
SMALL = ["0", "1", "2", "3", "-1"]  # of options that lengthen a run
FLOATS = ["0", "1", "0.5", "1e-3", "1e-12", "2", "30", "1e6", "1e300", "-1", "nan", "inf", "-inf", "1e999"]
STRANGE = [
    "",
    " ",
    "x",
    "None",
    "-",
    "nan",
    "😀",
    chr(0xDCFF),
    "x" * 300,
    "x" * 5000,
    "a b",
    "<b>",
    "a\nb",
    "../x",
    "~",
    "1,2",
]
PLACES = [
    "",
    ".",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/proc/nowhere",
    "x" * 300,
    chr(0xDCFF),
    "file.txt",
    "file.txt/below",
]
COSTLY = {"compile", "compare"}  # these take minutes, and have tests of their own
LENGTHS = {"steps", "updates", "num_steps", "seeds", "judge_steps", "accumulate", "leapfrogs", "chains"}
SIZES = {"starts", "samples", "particles", "batch", "num", "width", "channels"}


def options_of(config: type) -> dict[str, object]:
    """Options by name with their types, those of nested configurations among them."""
    hints = typing.get_type_hints(config)
    found = {}
    for item in dataclasses.fields(config):
        kind = hints[item.name]
        found |= options_of(kind) if dataclasses.is_dataclass(kind) else {item.name: kind}
    return found


def values(kind: object, name: str, draws: random.Random, files: list[str]) -> list[str]:
    """Words for an option of this type; none for a flag."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if draws.random() < 0.05:
        return [draws.choice(STRANGE) for _ in range(draws.choice((0, 1, 2)))]
    if origin in (typing.Union, types.UnionType):
        return values(draws.choice([a for a in arguments if a is not type(None)]), name, draws, files)
    if origin is typing.Literal:
        return [str(draws.choice(arguments))]
    if origin is tuple:
        return [word for _ in range(draws.choice((0, 1, 2, 2, 3))) for word in values(arguments[0], name, draws, files)]
    if kind is bool:
        return []
    if kind is int:
        small = name in LENGTHS or (name in SIZES and draws.random() < 0.5)
        return [draws.choice(SMALL if small else INTEGERS)]
    if kind is float:
        return [draws.choice(FLOATS)]
    if kind is Path:
        return [draws.choice(PLACES + files)]
    return [
        draws.choice(STRANGE + PLACES + files + ["cpu", "meta", "cuda:7", "digits", "moons", "brightness", "digit-3"])
    ]


def configurations() -> dict[str, type]:
    """The configuration of every command."""
    from implicit_diffusion.commands.registry import CONFIGURATIONS

    return dict(CONFIGURATIONS)


def bases() -> dict[str, list[str]]:
    """A valid line of every command, run where `prepare` has made what it names."""
    chain = "--model tiny --reward brightness --num-steps 3 --batch 2 --updates 2 --starts 4 --device cpu --out out"
    lines = {
        "finetune": chain,
        "sweep": f"--kl-weights 1 2 {chain}",
        "sample": "--model tiny --num 2 --num-steps 2 --out grid.png --device cpu",
        "pretrain": "--data images --steps 2 --batch 2 --chains 2 --samples 4 --channels 8 8 --out out --device cpu",
        "ebm": "--data moons --steps 3 --particles 16 --judge-steps 4 --width 8 --out out",
        "score": "--model energy/model --data plane.npy",
        "tilt": "--model energy/model --kl-weights 1 --steps 2 --particles 16 --seeds 1 --out out",
        "hexagon": "--steps 3 --particles 16 --seeds 1 --out out",
        "recovery": "--steps 501 --particles 16 --seeds 1 --out out",
        "resume": "run",
        "report": "run",
    }
    return {command: line.split() for command, line in lines.items()}


def prepare(root: Path) -> None:
    """A tiny model, a finished run, an energy model, images and arrays."""
    import numpy as np
    from PIL import Image

    from implicit_diffusion.cli import main
    from tests.helpers import tiny, toy_model

    draws = np.random.default_rng(0)
    toy_model.folder(root / "tiny", tiny.scheduler())
    (root / "images").mkdir()
    for i in range(6):
        Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / f"images/{i}.png")
    np.save(root / "plane.npy", draws.normal(size=(40, 2)))
    np.save(root / "line.npy", draws.normal(size=40))
    (root / "file.txt").write_text("a cat\na dog\n")
    (root / "rewards.py").write_text(
        "def first(x):\n    return x.flatten(1)[:, 0]\n\ndef fails(x):\n    raise RuntimeError('no')\n"
        "def nan(x):\n    return x.flatten(1).mean(1) * float('nan')\n\nnumber = 3\n\n"
        "class Class:\n    def __init__(self, weight=1):\n        self.weight = weight\n\n"
        "    def __call__(self, x):\n        return {'reward': self.weight * x.flatten(1).mean(1, keepdim=True)}\n"
    )
    lines = bases()
    for command, out in (("finetune", "run"), ("ebm", "energy")):
        assert main([command, *(out if word == "out" else word for word in lines[command])]) == 0


def lines(seed: int, count: int) -> Iterator[list[str]]:
    """Command lines, drawn from the seed."""
    draws = random.Random(seed)
    configs = configurations()
    valid = bases()
    files = ["tiny", "images", "plane.npy", "line.npy", "rewards.py", "file.txt", "energy/model", "run", "run/model"]
    files += [f"rewards.py:{name}" for name in ("first", "fails", "nan", "number", "missing", "Class")]
    files += [f"rewards.py:Class{arguments}" for arguments in ("(weight=2)", "(3)", "('')", "(width=2)", "(x)", "(")]
    names = [name for name in valid if name in configs]
    cheap = {"hexagon": 1, "recovery": 1, "sweep": 2, "pretrain": 2}  # these take longest
    weights = [cheap.get(name, 4) for name in names]
    for _ in range(count):
        (command,) = draws.choices(names, weights)
        kinds = options_of(configs[command])
        line = list(valid[command])
        for name in draws.choices(sorted(kinds.keys() - COSTLY), k=draws.choice((1, 1, 2, 2, 3))):
            line = _set(line, name, values(kinds[name], name, draws, files))
        if draws.random() < 0.05:
            line.insert(draws.randrange(len(line) + 1), draws.choice(STRANGE))
        yield [command, *line]


def _set(line: list[str], name: str, words: list[str]) -> list[str]:
    """The line with one option set anew, or added."""
    flag = f"--{name.replace('_', '-')}"
    if name == "run":  # a positional argument
        return words or line
    if flag in line:
        begin = line.index(flag)
        end = next((i for i in range(begin + 1, len(line)) if line[i].startswith("--")), len(line))
        line = line[:begin] + line[end:]
    return [*line, flag, *words]


def attempt(line: list[str], root: Path) -> tuple[int, str, str]:
    """Exit status (negative for a signal), output and error output of a line, in a forked process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status = _forked(line, root, out.fileno(), err.fileno())
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return status, *texts


def _forked(line: list[str], root: Path, out: int, err: int) -> int:
    code = 1
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(root)
            os.dup2(out, 1)
            os.dup2(err, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
            from implicit_diffusion.cli import main

            try:
                code = main(line)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = _wait(child, LIMIT)
    if status is None:
        os.kill(child, signal.SIGTERM)
        status = _wait(child, GRACE)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = -signal.SIGKILL
    return status


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def verdict(status: int, out: str, err: str, root: Path) -> str | None:
    """What is wrong with how a line ended; None where nothing is.

    It ends with status 0, with 2 and one line that begins with "error:", or is stopped by
    SIGTERM with 143. It prints no traceback, leaves no NaN among headline numbers, and JSON that is JSON.
    """
    if "Traceback" in err or "Traceback" in out:
        return "traceback"
    if status not in (0, 2, 143):
        return f"status {status}"
    last = err.strip().splitlines()[-1:]
    if status == 2 and not (last and last[0].startswith("error: ")):
        return "no error line"
    if status == 2 and last[0].startswith("error: ") and not last[0].removeprefix("error: ").strip():
        return "empty error"
    for summary in root.glob("out/**/summary.json"):
        if status == 2 or "nan" in out.lower().split():
            return "a summary of a failed run" if status == 2 else "nan among the results"
        json.loads(summary.read_text(encoding="utf-8"), parse_constant=_refuse)
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in a summary")


def clear(root: Path, kept: set[str]) -> None:
    """Remove what a line left behind."""
    import shutil

    for path in root.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def main(seed: int, count: int) -> int:
    """Prepare, try, and print what went wrong; returns how many lines did."""
    os.environ["IMPLICIT_DIFFUSION_CACHE"] = "off"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    import contextlib

    import torch

    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        os.chdir(root)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare(root)
        kept = {path.name for path in root.iterdir()}
        for line in lines(seed, count):
            start = time.monotonic()
            status, out, err = attempt(line, root)
            reason = verdict(status, out, err, root)
            if "-v" in sys.argv:
                print(
                    f"{time.monotonic() - start:5.1f} s  {status}  {line}  {err.strip().splitlines()[-1:]}", flush=True
                )
            if reason:
                wrong += 1
                print(json.dumps({"reason": reason, "line": line, "status": status, "err": err[-3000:]}), flush=True)
            clear(root, kept)
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])) > 0)
