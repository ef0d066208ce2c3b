"""Random command lines, what each may do, and whether a run that is interrupted and resumed is the uninterrupted one.

Options and their types are read off the commands' configurations, so that a new option is tried without a word here.
Every line begins as a valid, tiny run; up to two options are then set to values of their type, or to values that no
option expects. Lines run in forks of this process, which has imported everything.
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from implicit_diffusion.commands.command_line.options import Option, options_of
from implicit_diffusion.commands.registry import COMMANDS

LIMIT = 120.0  # seconds, after which a line is told to stop; a run that does is as good as one that ends
GRACE = 60.0  # seconds that it may take to stop
MEMORY = 8 << 30  # bytes of address space
WRITTEN = 64 << 20  # bytes of one file

INTEGERS = ["0", "1", "2", "3", "5", "8", "16", "-1", "-3", "1000000000000", "9" * 30]
SMALL = ["0", "1", "2", "3", "-1"]  # of options that lengthen a run
FLOATS = ["0.5", "1e-3", "1", "0.1", "2", "0", "1e-12", "30", "1e6", "1e300", "-1", "nan", "inf", "-inf", "1e999"]
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
    "1,2",
]
PLACES = [
    "",
    ".",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "x" * 300,
    chr(0xDCFF),
    "file.txt",
    "file.txt/below",
]
FILES = ["tiny", "images", "plane.npy", "line.npy", "rewards.py", "file.txt", "energy/model", "run", "run/model"]
REWARDS = [f"rewards.py:{name}" for name in ("first", "fails", "nan", "number", "missing", "Class", "Class(weight=2)")]
REWARDS += ["rewards.py:Class(x)", "rewards.py:Class(", "brightness", "darkness", "digit-3"]
WORDS = ["cpu", "meta", "cuda:7", "digits", "moons"]
COSTLY = {"compile", "compare", "long_chains"}  # these take minutes, and have tests of their own
LENGTHS = {"steps", "updates", "num_steps", "seeds", "judge_steps", "accumulate", "leapfrogs", "chains", "sample_steps"}
LENGTHS |= {"batches", "points", "held_out", "widest"}
SIZES = {"starts", "samples", "particles", "batch", "num", "width", "channels", "copies"}
LONG = {
    "hexagon",
    "recovery",
    "theory",
}  # their shortest runs take seconds: an option is set to what is refused, or makes it shorter

BASES = {
    "finetune": "--model tiny --reward brightness --kl-weight 1 --num-steps 2 --batch 2 --updates 2 --starts 4 "
    "--device cpu --out out",
    "sweep": "--kl-weights 1 --model tiny --reward brightness --num-steps 2 --batch 2 --updates 1 --starts 4 "
    "--device cpu --out out",
    "sample": "--model tiny --num 2 --num-steps 2 --out grid.png --device cpu",
    "pretrain": "--data images --steps 2 --batch 2 --samples 2 --channels 4 4 --out out --device cpu",
    "ebm": "--data plane.npy --steps 3 --particles 16 --judge-steps 4 --width 4 --out out",
    "score": "--model energy/model --data plane.npy",
    "tilt": "--model energy/model --kl-weights 1 --steps 2 --particles 16 --seeds 1 --out out",
    "hexagon": "--steps 10 --particles 16 --seeds 1 --out out",
    "recovery": "--steps 500 --particles 16 --seeds 1 --out out",
    "compare": "--problems gaussian --methods adjoint --num-steps 2 --depth 2 --batch 4 --batches 0 --updates 1 "
    "--points 1 --held-out 8 --widest 3 --seeds 1 --out out",
    "theory": "--parts rates --steps 100 --copies 2 --particles 8 --out out",
    "resume": "run",
    "report": "run",
}
OFTEN = {"finetune": 8, "ebm": 9, "pretrain": 6, "sample": 2, "score": 2}  # how often a command is tried


class Line(NamedTuple):
    """A command line, and how a second run of it ends early: a signal, or none at all, at a file that it writes."""

    words: list[str]
    ending: str
    write: int


def words_of(option: Option) -> st.SearchStrategy[list[str]]:
    """Words for an option, of its type or of none."""
    kinds = typing.get_args(option.type) if typing.get_origin(option.type) is tuple else (option.type,)
    one = word_of(kinds[0], option.field)
    if option.type is bool:
        usual = st.just([])
    elif len(kinds) > 1 and kinds[1] is not ...:
        usual = st.lists(one, min_size=len(kinds), max_size=len(kinds))
    else:
        usual = st.lists(one, min_size=1, max_size=3 if option.many else 1)
    strange = st.lists(st.sampled_from(STRANGE), max_size=2)
    return st.integers(0, 15).flatmap(lambda number: strange if number == 15 else usual)


def word_of(kind: Any, name: str) -> st.SearchStrategy[str]:
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from([str(word) for word in typing.get_args(kind)])
    if kind is int:
        return st.sampled_from(
            SMALL if name in LENGTHS else INTEGERS[1:7] * 2 + INTEGERS if name in SIZES else INTEGERS
        )
    if kind is float:
        return st.sampled_from(FLOATS[:5] * 2 + FLOATS)
    if name == "reward":
        return st.sampled_from(REWARDS)
    return st.sampled_from(PLACES + FILES if kind is Path else STRANGE + PLACES + FILES + WORDS)


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """A valid line of a command with up to two options set anew."""
    command = draw(st.sampled_from([name for name in BASES for _ in range(OFTEN.get(name, 1))]))
    line = BASES[command].split()
    options = {option.field: option for option in options_of(COMMANDS[command].config) if option.field not in COSTLY}
    least = 1 if command in LONG else 0
    chosen = draw(st.lists(st.sampled_from(sorted(options)), min_size=least, max_size=2, unique=True))
    for name in chosen:
        line = with_option(line, options[name], draw(words_of(options[name])))
    if draw(st.integers(0, 24)) == 24:
        line.insert(draw(st.integers(0, len(line))), draw(st.sampled_from(STRANGE)))
    if command in LONG:  # never at its full length
        line = with_option(line, options["steps"], [draw(st.sampled_from(["0", "9", "-1", "x"]))])
    ending = draw(st.sampled_from(["SIGTERM", "SIGINT", "SIGKILL"]))
    return Line([command, *line], ending, draw(st.integers(1, 12)))


def with_option(line: list[str], option: Option, words: list[str]) -> list[str]:
    """The line with one option set anew, or added."""
    flag = f"--{option.field.replace('_', '-')}"
    if option.positional:
        return words or line
    if flag in line:
        begin = line.index(flag)
        end = next((i for i in range(begin + 1, len(line)) if line[i].startswith("--")), len(line))
        line = line[:begin] + line[end:]
    return [*line, flag, *words]


def prepare(root: Path) -> None:
    """In the working directory: a tiny model, a finished run, an energy model, images and arrays."""
    import numpy as np
    from PIL import Image

    from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
    from implicit_diffusion.models.pretrained import save_pipeline
    from tests.helpers import tiny

    draws = np.random.default_rng(0)
    network = tiny.unet(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    save_pipeline(root / "tiny", DiffusersDenoiser(network), tiny.scheduler(), "a test")
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
    for command, out in (("finetune", "run"), ("ebm", "energy")):
        status, _, said = attempt([command, *(out if word == "out" else word for word in BASES[command].split())], root)
        assert status == 0, said


def attempt(line: list[str], root: Path, ending: tuple[str, int] | None = None) -> tuple[int, str, str]:
    """Exit status (negative for a signal), output and error output of a line, in a forked process.

    Args:
        line: the words.
        root: to run it in.
        ending: a signal to itself, and the number of the file at whose renaming it is sent; None for none.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status = _forked(line, root, out.fileno(), err.fileno(), ending)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return status, *texts


def _forked(line: list[str], root: Path, out: int, err: int, ending: tuple[str, int] | None) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(root)
            os.dup2(out, 1)
            os.dup2(err, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
            code = _as_users_run(line, ending)
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)
    status = _wait(child, LIMIT)
    if status is None:
        os.kill(child, signal.SIGTERM)
        status = _wait(child, GRACE)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError(f"it neither ends within {LIMIT} s nor stops: {line}")
    return status


def _as_users_run(line: list[str], ending: tuple[str, int] | None) -> int:
    """The command, without the tests' checks of types, with a dot for every picture and few particles to judge by."""
    import warnings

    import jaxtyping
    from matplotlib.figure import Figure
    from PIL import Image

    from implicit_diffusion.cli import main
    from implicit_diffusion.commands.ebm import judging

    jaxtyping.config.update("jaxtyping_disable", True)
    warnings.resetwarnings()
    Figure.savefig = lambda figure, file, **options: Image.new("RGB", (1, 1)).save(file, options.get("format", "png"))
    judging.PARTICLES = {"vectors": 64, "images": 64}
    sys.stdout, sys.stderr = os.fdopen(1, "w", errors="backslashreplace"), os.fdopen(2, "w", errors="backslashreplace")
    if ending is not None:
        left, rename = [ending[1]], Path.replace

        def replace(path: Path, target: Any) -> Path:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(getattr(signal, ending[0]))
            return rename(path, target)

        Path.replace = replace
    try:
        return main(line)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def verdict(line: Line, root: Path, wholes: dict[tuple[str, ...], dict[str, Any]]) -> str:
    """What became of a line; `wholes` keeps what uninterrupted runs left, by their lines.

    "refused": an error of one line, and nothing was left behind.
    "ended": such an error after work had begun: a training that diverges, a reward that raises.
    "stopped": by us, after `LIMIT`.
    "done": its work, by a command that does not train.
    "resumed": a training that is the same, to the bit, when it is interrupted and resumed.

    Raises:
        AssertionError: anything else, with all that was said.
    """
    folder, words = root / "out", tuple(line.words)
    if words not in wholes:
        outcome = _uninterrupted(line, root)
        if outcome is not None:
            return outcome
        wholes[words] = left_in(folder)
        shutil.rmtree(folder)
    _resume(line, root)
    whole, again = wholes[words], left_in(folder)
    different = sorted(name for name in whole.keys() | again.keys() if whole.get(name) != again.get(name))
    assert not different, [(name, str(whole.get(name))[:400], str(again.get(name))[:400]) for name in different]
    return "resumed"


def _uninterrupted(line: Line, root: Path) -> str | None:
    """Run a line; what became of it, and None for a training that has ended well."""
    folder = root / "out"
    status, out, err = attempt(line.words, root)
    _check_words(status, out, err, root)
    if status == 2:
        worked = any((folder / name).exists() for name in ("checkpoint", "metrics.jsonl", "plan", "plan.json"))
        assert worked or not folder.exists(), f"left behind: {sorted(folder.rglob('*'))}"
        return "ended" if worked else "refused"
    if status == 143:
        return "stopped"
    return None if folder.is_dir() else "done"


def _resume(line: Line, root: Path) -> None:
    """Interrupt a run of the line, and continue it by `resume`, or by the same line where no run has begun."""
    code = {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}[line.ending]
    status, _, err = attempt(line.words, root, (line.ending, line.write))
    assert status in (0, code), (status, err[-2000:])
    if status == 0:  # it had written fewer files
        return
    command = COMMANDS[line.words[0]]
    if command.resumable and (root / "out" / "config.json").exists():
        status, _, err = attempt(["resume", "out"], root)
        if status == 0 or "it is finished" in err:
            return
        assert "holds a finished plan" in err, err[-2000:]
    status, _, err = attempt(line.words, root)
    assert status == 0 or "is finished" in err or "finished plan" in err, err[-2000:]


def _check_words(status: int, out: str, err: str, root: Path) -> None:
    assert "Traceback" not in err and "Traceback" not in out, err[-3000:]
    assert status in (0, 2, 143), (status, err[-3000:])
    last = err.strip().splitlines()[-1:]
    if status == 2:
        assert last and last[0].startswith("error: ") and last[0].removeprefix("error: ").strip(), err[-3000:]
    for summary in root.glob("out/**/summary.json"):
        assert status != 2, "a summary of a failed run"
        json.loads(summary.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in a summary")


def left_in(folder: Path) -> dict[str, Any]:
    """What a run has left: numbers, words and weights by file, without times; only the names of other files.

    A manifest is left out: it has the time when the run began, and the checksums of what is compared.
    """
    return {_named(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if _counts(path)}


def _named(path: Path) -> str:
    """A state whose manifest was written is whole, and gets its name when its folder is written to again."""
    return path.as_posix().replace("state.safetensors.tmp", "state.safetensors")


def _counts(path: Path) -> bool:
    kinds = (".json", ".jsonl", ".md", ".png", ".html", ".safetensors", ".tmp")
    kept = path.suffix in kinds and path.name not in ("seconds.json", "provenance.json", "manifest.json")
    return kept and not {"checkpoint", "wandb"} & set(path.parts)


def _content(path: Path) -> Any:
    if path.suffix in (".json", ".jsonl"):
        return [_without_times(json.loads(text)) for text in _texts(path)]
    return path.read_bytes() if path.suffix == ".safetensors" and "model" in path.parts else "there"


def _texts(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if "seconds" not in key and key != "begun"}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def clear(root: Path, kept: set[str]) -> None:
    """Remove what a line left behind."""
    for path in root.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
