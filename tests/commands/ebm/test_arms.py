"""Arms of energy-based training: their costs, and divergence seen in time with the last sound model on disk."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import training as ebm_training
from implicit_diffusion.commands.ebm.arms import (
    ARMS,
    LANGEVIN,
    Refresh,
    Settings,
    make_loop,
    pulls_per_update,
    to_model,
)
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.errors import DivergenceError, InvalidInputError, NonFiniteError
from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.loops.diagnostics.divergence import diverged
from implicit_diffusion.models.energy_model import Architecture, Moves, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.watch import Watch
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.samplers import ULA

HMC3 = Moves("hmc", 0.3, 3)
SETTINGS = Settings(Architecture("mlp", (2,), 8, 2), HMC3, "weighted", 64, 10, 3e-3, 0)


@pytest.fixture(scope="module")
def data():
    return load_data("eight-gaussians", Noise(0))


@pytest.mark.parametrize("moves", [HMC3, Moves("mala", 0.1), Moves("ula", 0.05)], ids=lambda m: m.sampler)
@pytest.mark.parametrize("arm", ARMS)
def test_an_update_costs_what_it_says(arm, moves, data):
    loop = make_loop(dataclasses.replace(SETTINGS, arm=arm, moves=moves), data)
    calls = []
    loop.model.register_forward_hook(lambda module, x, y: calls.append(len(x[0])))
    for _ in range(4):
        metrics = loop.step()
    assert metrics["gradient_evaluations"] == 4 * pulls_per_update(arm, moves)
    assert len(calls) <= metrics["gradient_evaluations"]  # some forwards serve two pulls, none is hidden


def test_arms_are_what_they_say(data):
    made = {arm: make_loop(dataclasses.replace(SETTINGS, arm=arm), data) for arm in ARMS}
    assert [type(loop) for loop in made.values()] == [Single, Single, Single, NestedParticles, NestedParticles]
    assert [loop.weighted for loop in made.values()] == [True, False, False, False, False]
    assert made["cd"].begin == "data" and made["pcd"].begin == "last"
    first = [torch.cat([p.flatten() for p in loop.parameters]) for loop in made.values()]
    assert all(torch.equal(first[0], other) for other in first[1:])  # one network, and the same first particles
    assert all(torch.equal(made["hmc"].weighted_state.x, loop.weighted_state.x) for loop in made.values())
    for arm, loop in made.items():
        assert to_model(dataclasses.replace(SETTINGS, arm=arm), loop, data).moves == (
            HMC3 if arm in ("weighted", "hmc") else LANGEVIN
        )


def test_a_model_holds_particles_of_equal_weight(data):
    """Weighted particles are resampled: means are those of the weights, and no particle without weight is left."""
    loop = make_loop(dataclasses.replace(SETTINGS, particles=512), data)
    log_weights = torch.where(loop.weighted_state.x[:, 0] > 0, 1.0, -1.0)
    loop.weighted_state = loop.weighted_state._replace(log_weights=log_weights)
    model = to_model(SETTINGS, loop, data)
    share = (model.particles[:, 0] > 0).float().mean().item()
    weights = loop.particles.weights
    assert share == pytest.approx(weights[loop.weighted_state.x[:, 0] > 0].sum().item(), abs=2 / 512)
    assert torch.equal(model.shift, data.shift) and torch.equal(model.scale, data.scale)


@pytest.mark.slow
def test_refreshing_begins_anew_on_time(data):
    settings = dataclasses.replace(SETTINGS, refresh=4, updates=12)
    loop, refreshed = make_loop(settings, data), []

    def look(state):
        refreshed.append((state.updates, bool(loop.weighted_state.h == 0)))

    fit(loop, 12, callbacks=[Refresh(settings), look])
    assert [k for k, fresh in refreshed if fresh] == [4, 8]  # at the end there is nothing left to train
    annealing = 2 * 50 * HMC3.kernel().evaluations_per_step
    assert loop.cost()["gradient_evaluations"] == 12 * pulls_per_update("weighted", HMC3) + annealing
    never = make_loop(SETTINGS, data)
    fit(never, 10, callbacks=[Refresh(SETTINGS)])
    assert never.cost()["gradient_evaluations"] == 10 * pulls_per_update("weighted", HMC3)


def watched(data, **options):
    loop = make_loop(SETTINGS, data)
    return Fit(loop), Watch(data.standardised()[0], words=WORDS, **options)


def test_a_watch_lets_sound_training_pass(data):
    saved = []
    state, watch = watched(data, every=2, save=lambda fit: saved.append(fit.updates))
    for _ in range(6):
        state.loop.step()
        assert watch(state) is None
    assert saved == [2, 4, 6] and watch.bad == 0


def test_a_watch_sees_particles_that_leave(data):
    saved = []
    state, watch = watched(data, every=1, patience=2, save=lambda fit: saved.append(fit.updates))
    state.loop.step()
    few = state.loop.weighted_state.x.clone()
    few[:1] *= 1e3  # one of 64 is more than a hundredth
    state.loop.weighted_state = state.loop.weighted_state._replace(x=few)
    watch(state)
    assert watch.bad == 1 and saved == []  # once may be chance
    message = r"update 1: 1 of 64 particles .*V is not bounded below.*--lr or --step-size, or add --weight-decay"
    with pytest.raises(DivergenceError, match=message):
        watch(state)
    sound, _ = watched(data)
    assert diverged(sound.loop) is None
    x, radius = sound.loop.weighted_state.x, data.standardised()[0][:1000].norm(dim=1).max()
    out = x / x.norm(dim=1, keepdim=True) * radius
    for times in (9.99, 10.01):
        sound.loop.weighted_state = sound.loop.weighted_state._replace(x=times * out)
        said = diverged(sound.loop, data=data.standardised()[0][:1000])
        assert ("64 of 64 particles are more than ten times" in (said or "")) == (times > 10)


def test_a_watch_sees_energies_run_apart(data):
    state, watch = watched(data, every=1, patience=1)
    loop = state.loop
    loop.model.network[-1].weight.data = 300 * Noise(0).normal((1, 8))
    message = r"mean energy of the data is .* times its spread.*--lr, --weighted, or more --particles"
    with torch.no_grad():
        values = loop.model(watch.data)
    watch.data = watch.data[values.argmin()].expand(20, 2)  # data in the one low place, particles elsewhere
    with pytest.raises(DivergenceError, match=message):
        watch(state)


def test_one_bad_look_is_forgiven(data):
    state, watch = watched(data, every=1, patience=2)
    sound = state.loop.weighted_state
    for x in (1e3 * sound.x, sound.x, 1e3 * sound.x):
        state.loop.weighted_state = sound._replace(x=x)
        watch(state)
    assert watch.bad == 1
    resumed = Watch(watch.data)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.bad == 1


@pytest.mark.slow
def test_an_adapted_step_size_is_kept_with_the_model(data):
    moves = Moves("hmc", 1.5, 3)
    settings = dataclasses.replace(SETTINGS, moves=moves, adapt=True, refresh=6)
    loop = make_loop(settings, data)
    trained = ebm_training.train(settings, data, loop, None, 1)
    assert trained.model.moves == dataclasses.replace(moves, step_size=1.5 * loop.step_scale)
    assert loop.step_scale < 0.9 and trained.fit.metrics["step_size"] < 1.4
    fixed = ebm_training.train(dataclasses.replace(settings, adapt=False), data, make_loop(settings, data), None, 1)
    assert fixed.model.moves == moves and "step_size" not in fixed.fit.metrics


@pytest.mark.parametrize("options", [{"sampler": "ula"}, {"compare": True}])
def test_a_step_size_is_adapted_only_where_there_is_an_acceptance(options):
    with pytest.raises(InvalidInputError, match=r"--adapt-step has no effect: "):
        Config(adapt_step=True, **options).check()


class Unbounded(nn.Module):
    """f(x) = −θ ‖x‖²: with θ > 1/2 the Gaussian does not hold it."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta]))

    def forward(self, x):
        return -self.theta * x.square().sum(1, keepdim=True)


def test_a_potential_unbounded_below_is_seen_long_before_infinity(data):
    """V = −‖x‖²/2: the particles leave by a tenth of their distance per step."""
    standardised, saved = data.standardised()[0], []
    potential = Tilted(Unbounded(1.0), (2,))
    sgd = torch.optim.SGD(potential.parameters(), lr=1e-9)
    x = standardised[:64]
    loop = Single(potential, ULA(0.1), ForwardKL(standardised, batch=64), sgd, particles=x, noise=Noise(0))
    watch = Watch(standardised, every=5, save=lambda state: saved.append(state.updates))
    with pytest.raises(DivergenceError, match=r"update \d+: .*(V is not bounded|particles are not where)"):
        fit(loop, 400, callbacks=[watch])
    assert loop.update.updates < 60 and saved == list(range(5, loop.update.updates - 5, 5))


@pytest.mark.parametrize("steps", [3, 20])
def test_a_model_that_ends_diverged_is_no_result(steps, tmp_path, capsys):
    """Too few updates for a look on the way, or for a second one: the last look has the last word."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((200, 2)))
    out = tmp_path / "run"
    options = ["--data", str(tmp_path / "x.npy"), "--particles", "32", "--width", "8", "--lr", "1e5"]
    assert cli.main(["ebm", "--steps", str(steps), *options, "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "a smaller --lr" in said and str(out / "model") in said
    model = load_energy_model(out / "model")
    assert model.log_z is None and all(p.abs().max() < 10 for p in model.potential.parameters())
    assert not (out / "summary.json").exists()


def test_nan_is_answered_with_options(data, tmp_path, monkeypatch):
    loop = make_loop(SETTINGS, data)

    def fail():
        raise NonFiniteError("V is NaN at 3 particles")

    monkeypatch.setattr(loop, "step", fail)
    with pytest.raises(NonFiniteError, match=r"Use a smaller --lr or --step-size.*the last sound model is in .*model"):
        ebm.train(SETTINGS, data, loop, RunDirectory(tmp_path), 1)


SIZES = {"1": ["--particles", "64", "--width", "16"], "3": ["--particles", "32", "--width", "8"]}


@pytest.mark.slow
@pytest.mark.parametrize("lr", SIZES)
def test_a_rate_far_too_large_leaves_the_last_sound_model(lr, tmp_path, monkeypatch, capsys):
    """Here no look is sound: what is left is the beginning."""
    monkeypatch.setattr(ebm, "LOOKS", 1)
    out = tmp_path / "run"
    options = ["--steps", "150", *SIZES[lr], "--lr", lr, "--out", str(out)]
    assert cli.main(["ebm", *options]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "a smaller --lr" in said[0] and str(out / "model") in said[0]
    model = load_energy_model(out / "model")
    assert model.log_z is None and all(p.isfinite().all() for p in model.potential.parameters())
    assert (model.particles.norm(dim=1) < 40).all()
    assert hasattr(model.potential, "log_z")  # the Gaussian of the beginning
    assert not (out / "summary.json").exists() and (out / "metrics.jsonl").exists()
