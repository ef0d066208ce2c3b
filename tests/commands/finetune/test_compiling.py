"""Networks are compiled for the sizes of a loop's steady state, kept where that is faster, and the same function."""

import warnings

import pytest
import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import compiling, setup
from implicit_diffusion.commands.finetune.problem.compiling import CHOICE, compile_networks
from implicit_diffusion.commands.finetune.problem.precision import networks_of
from implicit_diffusion.commands.finetune.specs import setup_spec, training_spec
from implicit_diffusion.commands.finetune.training import make_loop
from implicit_diffusion.compiled import CompiledAt
from implicit_diffusion.runs import RunDirectory
from tests.helpers import tiny

STEPS, BATCH = 4, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.labelled(tmp_path_factory.mktemp("place"))


def loop_of(place, **options):
    model, reward = str(place / "classes"), f"{place}/rewards.py:label"
    given = {"num_steps": STEPS, "batch": BATCH, "stride": 1, "model": model, "reward": reward, "kl_weight": 1.0}
    config = Config(**given | options)
    return make_loop(training_spec(config), setup.build(setup_spec(config)), 1.0)


@pytest.fixture
def graphs(monkeypatch):
    """The numbers of samples of every graph that is made, with a compiler that only traces."""
    sizes, compiler = [], torch.compile

    def backend(graph, inputs):
        sizes.append(max(len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[-1] > 3))
        return graph.forward

    monkeypatch.setattr("torch.compile", lambda f, **options: compiler(f, **options | {"backend": backend}))
    torch._dynamo.reset()
    yield sizes
    torch._dynamo.reset()


@pytest.fixture
def timed(monkeypatch):
    """Seconds that calls of the clock shall measure, in turn."""
    seconds = []
    monkeypatch.setattr(compiling, "_seconds", lambda work: work() or seconds.pop(0))
    return seconds


def weights(loop):
    return torch.cat([p.detach().flatten() for p in loop.update.parameters])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [{(6, False), (6, True)}, {(8, True)}]),  # the last row keeps u_0
        ({"stride": 2}, [{(4, False), (4, True)}, {(4, True)}]),
        ({"loop": "nested", "stride": None}, [{(2, False), (2, True)}, {(2, True)}]),
        ({"guidance": 3.0, "null_class": 0, "lora_rank": 2}, [{(12, False), (12, True), (16, True)}]),
        ({"estimator": "score"}, [{(6, False), (6, True)}, {(8, True)}]),
    ],
    ids=["queue", "stride 2", "nested", "guided, LoRA", "score function"],
)
def test_a_run_makes_three_graphs_and_the_same_weights(place, options, calls, graphs, timed, tmp_path):
    """While it fills, when it is full, and while it drains; other calls run as they are."""
    plain, loop = loop_of(place, **options), loop_of(place, **options)
    before = weights(loop)
    timed += [1.0, 0.5]
    note = compile_networks(loop, RunDirectory(tmp_path), resumed=False)
    assert "0.5 s an iteration, 1 s without" in note
    assert torch.equal(weights(loop), before) and all(p.grad is None for p in loop.update.parameters)
    made = [network.compiled for network in networks_of(loop.chain)]
    assert all(isinstance(each, CompiledAt) for each in made) and [each.calls for each in made] == calls
    for each in (plain, loop):
        for _ in each.steps(12) if hasattr(each, "steps") else (each.step() for _ in range(3)):
            pass
    assert sorted(graphs) == sorted(n for own in calls for n, _ in own)
    torch.testing.assert_close(weights(loop), weights(plain), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(loop), before)


@pytest.fixture
def pretending(monkeypatch):
    """A compiler that leaves functions as they are."""
    compiled = []
    monkeypatch.setattr("torch.compile", lambda f, **options: compiled.append(f) or f)
    return compiled


def test_the_faster_one_is_kept_and_a_resumed_run_keeps_it(place, pretending, timed, tmp_path, capsys):
    for eager, fast, said in (
        (1.0, 0.25, "compiled in "),
        (0.25, 1.0, "not used, since slower: 1 s an iteration, 0.25 s"),
    ):
        directory = RunDirectory(tmp_path / f"{eager}")
        directory.path.mkdir()
        loop = loop_of(place)
        timed += [eager, fast]
        note = compile_networks(loop, directory, resumed=False)
        assert note.startswith(said) and not timed
        printed = capsys.readouterr().out
        assert "compile   the networks for 6 and 8 samples a call" in printed and f"compile   {note}\n" in printed
        again = loop_of(place)
        assert compile_networks(again, directory, resumed=True) == note  # without a look at the clock
        for each in (loop, again):
            kept = [network.compiled is not None for network in networks_of(each.chain)]
            assert kept == [fast < eager] * 2
        assert (directory.path / CHOICE).is_file()


def test_what_cannot_be_compiled_runs_as_it_is(place, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.compile", lambda f, **options: lambda *a, **k: 1 / 0)
    loop = loop_of(place)
    with pytest.warns(UserWarning, match="not compiled, runs eagerly: ZeroDivisionError"):
        note = compile_networks(loop, RunDirectory(tmp_path), resumed=False)
    assert note == "not compiled: ZeroDivisionError: division by zero"
    assert all(network.compiled is None for network in networks_of(loop.chain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_networks(loop_of(place), RunDirectory(tmp_path), resumed=True) == note
    loop.step()
