"""Rewards in real processes of their own: the numbers of this process, and a clear end of whatever goes wrong."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, RewardError
from implicit_diffusion.objectives import Reward, Scorer
from implicit_diffusion.particles import Particles
from implicit_diffusion.reward_values import takes_condition
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.scorers import closing, versions
from implicit_diffusion.scorers import scorer as scorers
from tests.helpers.together import together
from tests.scorers.cases import loop_with, theta, trained

NUMPY = """
import os, random, subprocess, sys, time
from pathlib import Path
import numpy as np
import beside_it

calls = 0

def total(x: np.ndarray):
    return beside_it.total(x)

def points(x: np.ndarray, scale=1.0):
    return (scale * x[:, 0]).tolist()

def dies(x: np.ndarray):
    global calls
    calls += 1
    if calls == 3:
        print("about to die", file=sys.stderr)
        os._exit(7)
    return points(x)

def dies_where_asked(x: np.ndarray):
    if Path(__file__).with_name("die").exists():
        print("the service is gone")
        os.kill(os.getpid(), 9)
    return points(x)

def hangs(x: np.ndarray):
    print("waiting")
    time.sleep(60)

def prints(x: np.ndarray):
    print('{"returned": [0.0], "bytes": 0}')
    sys.stdout.write("no end of line")
    os.write(1, b"{}")
    subprocess.run(["echo", "from a program"])
    assert sys.stdin.read() == ""
    return points(x)

def any_of(x: np.ndarray, function):
    return globals()[function](x)

def short(x: np.ndarray): return [1.0]
def nan(x: np.ndarray): return np.full(len(x), np.nan)
def words(x: np.ndarray): return ["good"] * len(x)
def thing(x: np.ndarray): return object()
def makes(x: np.ndarray): return points
def nothing(x: np.ndarray): pass

def raises(x: np.ndarray):
    values = {}
    return values["colour"]

def leaves(x: np.ndarray): sys.exit("no licence")
def imports(x: np.ndarray): import not_installed
def echo(x: np.ndarray): return x[:, 2, 255, 255].astype(float)
def loud(x: np.ndarray):
    print("x" * 10**6)
    return points(x)

def draws(x: np.ndarray):
    return np.random.rand(len(x)) + random.random()

def prompted(x: np.ndarray, prompts):
    return [float(len(prompt)) for prompt in prompts]

def labelled(x: np.ndarray, condition):
    return condition["label"].numpy() + 0.5

class Scaled:
    def __init__(self, weight=1.0): self.weight = weight
    def __call__(self, x: np.ndarray): return {"reward": self.weight * x[:, 0], "info": object()}

def factory(a, b=2):
    return lambda x: (a + b) * np.ones(len(x))
"""
FORMS = """
from __future__ import annotations

def pictures(images: list[PIL.Image.Image]):
    return [float(sum(image.tobytes())) for image in images]

def arrays(images: np.ndarray):
    return images.astype("float64").sum((1, 2, 3))

def eight_bits(images: NDArray[np.uint8]):
    return images.reshape(len(images), -1).max(1)
"""
TORCH = """
import torch
from torch import nn

def draws(x: torch.Tensor):
    return torch.rand(len(x))

class Judge(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(p))
    def forward(self, images):
        assert self.training is torch.is_grad_enabled() is False
        return self.layers(images).sum(1, keepdim=True), {"more": object()}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "beside_it.py").write_text("def total(x): return x.sum(tuple(range(1, x.ndim)))")
    (folder / "mine.py").write_text(NUMPY)
    (folder / "forms.py").write_text(FORMS)
    (folder / "with_torch.py").write_text(TORCH)
    return folder


@pytest.fixture
def scorer(folder):
    """Makes scorers, which are closed at the end of the test."""
    with closing():
        yield lambda function, arguments="", file="mine.py", **options: Scorer(
            folder / file, function, arguments, **options
        )


@pytest.fixture(scope="module")
def called(folder):
    """Any function of mine.py, by name, in one process for all of these tests."""
    with Scorer(folder / "mine.py", "any_of") as reward:
        yield lambda function: lambda x: reward(x.numpy(), function)


def x_of(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def in_this_process(function, file):
    """The same function of the same file, here."""
    scope = {"PIL": __import__("PIL.Image"), "np": np, "NDArray": np.typing.NDArray, "__name__": "here"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return scope[function]


@pytest.mark.parametrize("function", ["pictures", "arrays", "eight_bits"])
def test_forms_are_the_numbers_of_this_process(function, scorer, folder):
    here, there = in_this_process(function, folder / "forms.py"), scorer(function, file="forms.py")
    for dtype in (torch.float32, torch.float64):
        particles = Particles(x_of(5, 1, 8, 8, dtype=dtype))
        ours, theirs = (Reward(each).of(particles) for each in (here, there))
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert Reward(there).given_as == Reward(here).given_as is not None


@pytest.mark.slow
def test_a_network_is_called_with_tensors_and_in_eval_mode(scorer, folder):
    there = Reward(scorer("Judge", "(p=0.3)", file="with_torch.py"))
    for dtype in (torch.float32, torch.float64):
        x = x_of(5, 1, 8, 8, dtype=dtype)
        assert torch.equal(there.of(Particles(x)), x.flatten(1).sum(1))
    x = x_of(5, 3, dtype=torch.bfloat16)
    assert torch.equal(there.function(x)[0], x.sum(1, keepdim=True))
    assert there.given_as is None


def test_functions_classes_factories_and_conditions(scorer):
    particles = Particles(x_of(4, 2))
    first = particles.x[:, 0]
    assert torch.equal(Reward(scorer("points")).of(particles), first)
    assert torch.equal(Reward(scorer("points", "(scale=2.0)")).of(particles), 2 * first)
    assert torch.equal(Reward(scorer("Scaled", "(weight=3.0)")).of(particles), 3 * first)
    assert scorer("factory", "(1, b=4)")(np.zeros((2, 1))).tolist() == [5.0, 5.0]
    assert torch.allclose(Reward(scorer("total")).of(particles), particles.x.sum(1))
    prompted = scorer("prompted")
    assert takes_condition(prompted) and not takes_condition(scorer("points"))
    assert prompted(np.zeros((2, 1)), ["a", "abc"]) == [1.0, 3.0]


@pytest.mark.slow
def test_conditions_of_the_library(scorer):
    """Tensors by name, as the denoiser receives them; they need torch there."""
    labelled = Particles(x_of(4, 2), condition={"label": torch.arange(4)})
    assert Reward(scorer("labelled")).of(labelled).tolist() == [0.5, 1.5, 2.5, 3.5]


def test_what_is_printed_does_not_reach_the_protocol(called, capfd):
    particles = Particles(x_of(3, 2))
    for _ in range(3):
        assert torch.equal(Reward(called("prints")).of(particles), particles.x[:, 0])
    assert torch.equal(Reward(called("loud")).of(particles), particles.x[:, 0])


def test_a_huge_batch(called):
    x = x_of(40, 3, 256, 256)  # 31 MB, far more than a pipe holds
    assert torch.equal(Reward(called("echo")).of(Particles(x)), x[:, 2, 255, 255])


def test_a_process_that_dies_is_started_again(scorer, capsys):
    reward, particles = Reward(scorer("dies")), Particles(x_of(3, 2))
    for _ in range(6):  # it dies on every third call
        assert torch.equal(reward.of(particles), particles.x[:, 0])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward ")]
    assert len(lines) == 2
    assert "mine.py:dies: its process ended with status 7; it printed last: about to die; started again" in lines[0]


def test_a_process_that_dies_again_and_again(scorer, folder, capsys):
    reward, particles = Reward(scorer("dies_where_asked")), Particles(x_of(3, 2))
    reward.of(particles)
    (folder / "die").touch()
    try:
        with pytest.raises(RewardError, match=r"was ended by SIGKILL; it printed last: the service is gone .*3 times"):
            reward.of(particles)
    finally:
        (folder / "die").unlink()
    assert torch.equal(reward.of(particles), particles.x[:, 0])  # it may be asked again


def test_a_process_that_hangs(scorer, monkeypatch):
    monkeypatch.setattr(scorers, "STARTS", 1)
    hanging = scorer("hangs")
    hanging.timeout, start = 0.5, time.monotonic()
    with pytest.raises(RewardError, match=r"does not answer within 0\.5 s .*printed last: waiting"):
        hanging(np.zeros((1, 1)))
    assert time.monotonic() - start < 20


RESULTS = {
    "short": r"shape \(3,\) for input \(3, 2\), got list of 1 \(float\)",
    "words": r"got list of 3 \(str\)",
    "thing": r"got object; return",
    "makes": "call a function that makes a reward",
    "nothing": "got None; end it with return",
}


@pytest.mark.parametrize("function", RESULTS)
def test_what_is_no_reward_is_said_as_in_this_process(function, called):
    with pytest.raises(InvalidInputError, match=RESULTS[function]):
        Reward(called(function)).of(Particles(x_of(3, 2)))


def test_nan(called):
    with pytest.raises(NonFiniteError, match="the reward of 3 of 3 samples"):
        Reward(called("nan")).finite_values(Particles(x_of(3, 2)))


def line_of(text):
    return next(n for n, line in enumerate(NUMPY.splitlines(), 1) if text in line)


def test_what_the_reward_raises_is_one_line_with_its_place(called, folder):
    x, place = torch.zeros(1, 1), re.escape(f"`reward` {folder / 'mine.py'}")
    with pytest.raises(RewardError, match=f"^{place}:{line_of('colour')}: KeyError: 'colour'$"):
        called("raises")(x)
    with pytest.raises(RewardError, match=f"^{place}:{line_of('licence')}: SystemExit: no licence$"):
        called("leaves")(x)
    with pytest.raises(RewardError, match=r"No module named 'not_installed'; install it with: .* -m pip install not_i"):
        called("imports")(x)


LOADING = {
    r"my.py:2: SyntaxError": "import sys\ndef f(x) return x",
    r"my.py:1: ZeroDivisionError: division by zero$": "y = 1 / 0",
    r"my.py:2: ModuleNotFoundError: .*install it with": "\nimport not_installed",
    r"my.py has no function 'f'; it has g$": "def g(x): return x",
    r"f must make a function of images, got f$": "class f: pass",
    r"its process ended with status 3; it printed last: good bye": "import os\nprint('good bye')\nos._exit(3)",
}


@pytest.mark.parametrize("message", LOADING)
def test_a_file_that_does_not_load(message, tmp_path):
    (tmp_path / "my.py").write_text(LOADING[message])
    before = processes()
    with pytest.raises(InvalidInputError, match=message):
        Scorer(tmp_path / "my.py", "f")
    assert processes() == before


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_pythons_that_cannot_be_used(folder, tmp_path):
    file = folder / "mine.py"
    with pytest.raises(InvalidInputError, match="there is no program /nowhere/python; give the python of an environ"):
        Scorer(file, "points", python="/nowhere/python")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(InvalidInputError, match=f"got the folder {tmp_path}; use {tmp_path}/bin/python"):
        Scorer(file, "points", python=tmp_path)
    with pytest.raises(InvalidInputError, match="its process ended with status 0"):
        Scorer(file, "points", python="/bin/true")
    bare = script(tmp_path / "bare", f'exec {sys.executable} -S "$@"')  # without site-packages
    with pytest.raises(InvalidInputError, match=r"bare has no numpy.*bare -m pip install numpy safetensors"):
        Scorer(file, "points", python=bare)
    with pytest.raises(InvalidInputError, match="cannot be used as a python"):
        versions(Path("/bin/false"))
    assert versions(Path(sys.executable)).startswith(f"{sys.version_info[0]}.{sys.version_info[1]}, numpy ")


WRONG = {
    "there is no file /nowhere.py": {"file": "/nowhere.py"},
    "file must be a path": {"file": 3},
    "function must be of type str, got int": {"function": 3},
    "arguments must be of type str, got dict": {"arguments": {"scale": 2}},
    "timeout must": {"timeout": 0},
    "python must be a path": {"python": None},
}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message, folder):
    with pytest.raises(InvalidInputError, match=message):
        Scorer(**({"file": folder / "mine.py", "function": "points"} | WRONG[message]))


def test_a_python_without_torch(folder, tmp_path):
    """Arrays work; a function of tensors is refused with the way out."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    python = script(tmp_path / "python", f'PYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} "$@"')
    x = x_of(2, 3)
    (tmp_path / "tensors.py").write_text("def f(x): return x.sum(1)")
    with Scorer(folder / "mine.py", "points", python=python) as points:
        assert torch.equal(Reward(points).of(Particles(x)), x[:, 0])
    with (
        Scorer(tmp_path / "tensors.py", "f", python=python) as tensors,
        pytest.raises(InvalidInputError, match=r"has no torch; annotate its first argument as np\.ndarray or"),
    ):
        Reward(tensors).of(Particles(x))


@pytest.mark.parametrize("file", ["mine.py", pytest.param("with_torch.py", marks=pytest.mark.slow)])
def test_draws_follow_from_the_global_generator_of_the_run(file, scorer):
    reward, particles = Reward(scorer("draws", file=file)), Particles(x_of(4, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = reward.of(particles), reward.of(particles)
        torch.manual_seed(0)
        again = Reward(scorer("draws", file=file)).of(particles)
    assert torch.equal(first, again) and not torch.equal(first, second)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_run_whose_scorer_dies_continues_bit_for_bit(scorer, folder, tmp_path):
    """As one in this process that nothing has stopped."""
    here = loop_with(lambda x: x[:, 0].clone())
    fit(here, 12)
    dying = loop_with(scorer("dies_where_asked"))
    moments = []

    def watch(state):
        moments.append(theta(state.loop))
        if state.updates == 7:
            (folder / "die").touch()

    try:
        with pytest.raises(RewardError, match=r"after update 7: .*SIGKILL"):
            fit(dying, 12, callbacks=[watch], directory=tmp_path, checkpoint_every=0.0)
    finally:
        (folder / "die").unlink()
    assert same(theta(dying), moments[-1]) and len(moments) == 7  # θ has not moved
    resumed = loop_with(scorer("dies_where_asked"))
    state = fit(resumed, 12, directory=tmp_path)
    assert state.updates == 12 and same(theta(resumed), theta(here))


@pytest.mark.slow
def test_each_of_several_processes_scores_its_own_samples(folder):
    one, all_of_them = trained(str(folder / "mine.py"))
    each = together(2, "tests.scorers.cases:trained", str(folder / "mine.py"))
    for ours, part in each:
        assert 2 * part == all_of_them == 32
        assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(ours, one, strict=True))


def processes():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def descriptors():
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_nothing_is_left_after_close(folder, scorer, monkeypatch):
    Scorer(folder / "mine.py", "points").close()
    before, open_before = processes(), descriptors()
    with Scorer(folder / "mine.py", "points") as reward:
        assert len(processes() - before) == 1
        reward(np.zeros((1, 1)))
    reward.close()
    with pytest.raises(InvalidInputError, match="the scorer is closed"):
        reward(np.zeros((1, 1)))
    monkeypatch.setattr(scorers, "STARTS", 1)
    hanging = scorer("hangs")
    hanging.timeout = 0.1
    with pytest.raises(RewardError):
        hanging(np.zeros((1, 1)))
    unnamed = Scorer(folder / "mine.py", "points")
    del unnamed
    assert processes() == before and descriptors() == open_before


RUN = """
import sys
import numpy as np
from implicit_diffusion.objectives import Scorer
scorer = Scorer(sys.argv[1], sys.argv[2])
print(scorer._process._process.pid, flush=True)
scorer(np.zeros((1, 1)))
sys.stdin.read()
"""


@pytest.mark.parametrize(("function", "grace"), [("points", 3), pytest.param("hangs", 15, marks=pytest.mark.slow)])
def test_it_ends_with_the_run_also_where_that_is_killed(function, grace, folder):
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder / "mine.py"), function], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = psutil.Process(int(run.stdout.readline()))
    time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    deadline = time.monotonic() + grace
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE  # whoever adopts it has to reap it


def test_an_interrupt_is_not_the_scorers(scorer):
    """It leads its own session; where a launcher sends the signal to all processes, it ignores it."""
    reward = scorer("points")
    process = psutil.Process(reward._process._process.pid)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    process.send_signal(signal.SIGINT)
    assert reward(np.ones((1, 1))) == [1.0] and psutil.Process(reward._process._process.pid) == process


def test_an_interrupted_call_does_not_answer_the_next(scorer, monkeypatch):
    reward = scorer("points")
    with monkeypatch.context() as patched:
        patched.setattr(type(reward._process), "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reward(np.zeros((1, 1)))
    assert reward(np.ones((1, 1))) == [1.0]
