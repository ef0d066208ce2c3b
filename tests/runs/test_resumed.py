"""A run that is continued is the run that was: its stop, what its reward draws at random, its metrics."""

import json
import random

import numpy as np
import pytest
import torch

from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.targets import StopAtKL
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.runs.metrics import restore_metrics
from tests.helpers.oracles import affine_chain
from tests.helpers.stops import interrupt_at


def build(reward=None, seed=0):
    chain, usual = affine_chain(4, 2)
    optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=0.02)
    objective = Reward(reward or usual) + 0.3 * PathKL()
    return Queue(chain, objective, Update(optimizer), batch=8, noise=Noise(seed))


def weights(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.model.parameters()])


def test_a_run_that_has_stopped_does_not_train_on(tmp_path):
    """Also where Ctrl-C comes during the update that stops it: the interrupt is told, the stop is kept."""
    for name, others in {"stopped": [], "both": [interrupt_at(7)]}.items():
        directory = RunDirectory.create(tmp_path / name)
        first = build()
        whole = fit(build(), 60, callbacks=[StopAtKL(0.02, decay=0.5)])
        assert "reached the target" in whole.stopped and whole.updates < 60
        others = [interrupt_at(whole.updates)] * len(others)
        began = fit(first, 60, callbacks=[*others, StopAtKL(0.02, decay=0.5)], directory=directory)
        assert began.stopped == ("interrupted" if others else whole.stopped)
        for _ in range(2):
            resumed = build()
            found = fit(resumed, 60, callbacks=[StopAtKL(0.02, decay=0.5)], directory=directory)
            assert (found.updates, found.stopped) == (whole.updates, whole.stopped)
            assert torch.equal(weights(resumed), weights(whole.loop))
            assert found.metrics["updates"] == whole.updates and "path_kl" in found.metrics


def test_a_stop_goes_with_the_callback_that_gave_it(tmp_path):
    """Every callback can stop a run for good, and a run without it goes on."""
    directory = RunDirectory.create(tmp_path / "run")

    def enough(f):
        return "enough" if f.updates >= 5 else None

    fit(build(), 9, callbacks=[enough], directory=directory)
    assert fit(build(), 9, callbacks=[enough], directory=directory).updates == 5
    assert fit(build(), 9, directory=directory).updates == 9


DRAWS = {
    "torch": lambda: torch.randn(()).item(),
    "numpy": lambda: float(np.random.normal()),  # noqa: NPY002
    "python": lambda: random.gauss(0, 1),
}


@pytest.mark.parametrize("library", DRAWS)
def test_a_reward_that_draws_at_random_is_resumed_bit_for_bit(library, tmp_path, as_users_run):
    """Normal numbers come in pairs, of which one is kept: five draws per call leave a half one behind.

    The type checks of the tests draw from Python's own generator, to choose the item of a list that they look at.
    """

    def reward(x):
        return x.flatten(1).sum(1) * (1 + 0.1 * sum(DRAWS[library]() for _ in range(5)))

    def disturb():
        for draw in DRAWS.values():
            draw()

    whole, first, second = build(reward), build(reward), build(reward)
    before = [draw() for draw in DRAWS.values()]
    fit(whole, 12)
    fit(build(), 12)
    directory = RunDirectory.create(tmp_path / "run")
    disturb()
    assert fit(first, 12, callbacks=[interrupt_at(5)], directory=directory).updates == 5
    disturb()
    fit(second, 12, directory=directory)
    assert torch.equal(weights(whole), weights(second))
    other = build(reward, seed=1)
    fit(other, 12)
    assert not torch.equal(weights(whole), weights(other)) and len(set(before)) == 3


@pytest.mark.parametrize("library", DRAWS)
def test_the_callers_generators_are_as_they_were(library):
    def reward(x):
        return x.flatten(1).sum(1) * (1 + 0.1 * DRAWS[library]())

    loop, draw = build(reward), DRAWS[library]
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    draw(), draw(), draw()
    then = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    draw(), draw(), draw()
    fit(loop, 3)
    assert draw() == then

    def failing(f):
        draw()
        raise ZeroDivisionError

    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    draw(), draw(), draw()
    with pytest.raises(ZeroDivisionError):
        fit(build(), 3, callbacks=[failing])
    assert draw() == then


def test_generators_follow_from_noise_and_key_and_survive_the_disk(tmp_path):
    def drawn(draws):
        with draws:
            return [draw() for draw in DRAWS.values()]

    draws = GlobalGenerators(Noise(5), 1)
    first = drawn(draws)
    save_state(tmp_path / "state", draws.state_dict())
    then = drawn(draws)
    assert drawn(GlobalGenerators(Noise(5), 1)) == first
    for noise, key in ((Noise(6), 1), (Noise(5), 2), (Noise(5).stream(1), 1)):
        assert not set(drawn(GlobalGenerators(noise, key))) & set(first)
    other = GlobalGenerators(Noise(9))
    other.load_state_dict(load_state(tmp_path / "state"))
    assert drawn(other) == then


def lines(numbers):
    return "".join(json.dumps({"updates": number, "x": number / 3}) + "\n" for number in numbers)


@pytest.mark.parametrize(
    ("text", "said", "left"),
    [
        (lines([1, 2, 3, 4, 5, 6]), "", [1, 2, 3, 4, 5]),
        (lines([1, 2, 3, 4, 5]) + '{"upd', "", [1, 2, 3, 4, 5]),
        (lines([1, 5]), "it lacks 3 of 5 lines, among updates 2 to 4", [1, 5]),
        ("", "it lacks 5 of 5 lines, among updates 1 to 5", []),
        (lines([1, 2, 2, 3, 4, 5]), "it held update 2 more than once", [1, 2, 3, 4, 5]),
        (lines([2, 1, 3, 4, 5]), "it was out of order", [1, 2, 3, 4, 5]),
        (lines([1, 2, 3]) + "{]\n[4]\n", "2 of its lines cannot be read; it lacks 2 of 5 lines", [1, 2, 3]),
    ],
)
def test_metrics_that_are_wrong_are_said_and_mended(text, said, left, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    rows = restore_metrics(RunDirectory(tmp_path), 5, 5)
    assert [row["updates"] for row in rows] == left and path.read_text() == lines(left)
    printed = capsys.readouterr().out
    assert printed.startswith(f"metrics   {path}: {said}") if said else not printed


def test_resuming_looks_at_the_metrics(tmp_path, capsys):
    """The last row, which the summary speaks of, comes from the checkpoint."""
    directory = RunDirectory.create(tmp_path / "run")
    fit(build(), 6, directory=directory)
    rows = directory.read_metrics()
    path = directory.path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    found = fit(build(), 6, directory=directory)
    assert "it lacks 2 of 6 lines, among updates 5 to 6" in capsys.readouterr().out
    assert found.metrics["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-12)
    fit(build(), 8, directory=directory)
    assert not capsys.readouterr().out
    assert [row["updates"] for row in directory.read_metrics()] == [1, 2, 3, 4, 7, 8]
