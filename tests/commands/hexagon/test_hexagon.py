"""The paper's first experiment: its exact numbers, and that every arm runs and reports what it says."""

import json
import math

import pytest
import torch

from implicit_diffusion import ULA, Noise, Reward, Single
from implicit_diffusion.commands.hexagon import command as hexagon
from implicit_diffusion.commands.hexagon.arms import ARMS, Arms, best_rate
from implicit_diffusion.commands.hexagon.config import NARROWEST
from implicit_diffusion.commands.shared.hexagon_problem import (
    LOGITS,
    HexagonQuadrature,
    hard_reward,
    mixture,
    smooth_reward,
)
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import fit


def test_exact_numbers():
    """Rewards per mode by quadrature agree with exact draws from the mixture, and KL with its definition."""
    exact = HexagonQuadrature()
    assert exact.per_mode.tolist() == pytest.approx([0.1887, 0.2983, 0.0045, 0.0, 0.0004, 0.0272], abs=1.5e-4)
    assert exact.reward(torch.tensor(LOGITS)) == pytest.approx(0.0725, abs=1e-4)
    assert torch.allclose(exact.per_mode, HexagonQuadrature(cells=400).per_mode, atol=3e-6)  # doubling the grid

    x = mixture(dtype=torch.float64).sample(400_000, Noise(0))
    rewards = hard_reward(x)
    error = rewards.std() / len(x) ** 0.5
    assert abs(rewards.mean() - exact.reward(torch.tensor(LOGITS))) < 4 * error

    equal, start = torch.zeros(6), torch.tensor(LOGITS)
    kl = exact.kl_of_weights(equal, start)
    p, q = mixture(equal, dtype=torch.float64), mixture(start, dtype=torch.float64)
    y = p.sample(400_000, Noise(1))
    with torch.no_grad():
        ratio = q(y) - p(y)
    assert abs(ratio.mean() - kl) < 4 * ratio.std() / len(y) ** 0.5
    assert kl == pytest.approx(HexagonQuadrature(cells=200).kl_of_weights(equal, start), rel=1e-6)
    assert sum(exact.modes(q)) == pytest.approx(1, abs=1e-9)


def test_the_rewards_are_what_the_paper_says():
    x = torch.tensor([[4.0, 3.8], [-4.0, 3.8], [0.0, 0.0]], dtype=torch.float64)
    far = math.exp(-64 / 20)
    near = math.exp(-(16 + 3.8**2) / 20)
    assert hard_reward(x).tolist() == pytest.approx([1 / 2.5, 0, near / 2.5])
    smooth = [1 / 0.7 / (1 + math.exp(-8)), far / 0.7 / (1 + math.exp(8)), near / 0.7 / 2]
    assert smooth_reward(x).tolist() == pytest.approx(smooth)


@pytest.mark.slow
def test_every_arm_runs_and_reports(tmp_path, capsys):
    out = tmp_path / "run"
    config = hexagon.Config(steps=40, particles=64, seeds=2, tune=True, grid=(0.1, 1.0), out=out)
    hexagon.run(config)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == set(ARMS)
    for name, arm in summary["arms"].items():
        assert ("reward_exact" in arm) == (name != "guidance")
        assert sum(arm["mode_probabilities"]) == pytest.approx(1, abs=1e-6)
        assert {"reward", "reward_std", "kl_from_initial", "seconds", "gradient_evaluations"} <= set(arm)
    assert summary["arms"]["untrained"]["kl_from_initial"] == pytest.approx(0, abs=1e-6)
    trained = [summary["arms"][name]["gradient_evaluations"] for name in ("implicit", "weighted", "nested", "unrolled")]
    assert max(trained) == 80 and min(trained) > 80 - 21  # equal budgets, except for what does not divide
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"particles", "curves", "modes", "lag"}
    assert json.loads((out / "config.json").read_text())["compile"] is False  # the rule, resolved
    assert "best possible 0.2983" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_tuned_that_nobody_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hexagon.Arms, "tune", lambda *a: pytest.fail("tuned"))
    summary = hexagon.run(hexagon.Config(steps=10, particles=8, seeds=1, out=tmp_path / "run"))
    assert set(summary["arms"]) == {name for name in ARMS if not name.endswith("_tuned")} and summary["grids"] == {}
    assert set(summary["tuned"]) == {"implicit", "weighted", "nested", "unrolled"}


@pytest.mark.slow
def test_a_forward_kl_leaves_the_unrolled_arm_out(tmp_path, capsys):
    config = hexagon.Config(
        steps=10, particles=16, seeds=1, forward_kl=1.0, tune=True, grid=(0.1,), out=tmp_path / "run"
    )
    summary = hexagon.run(config)
    assert not any(name.startswith("unrolled") for name in summary["arms"])
    assert "left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_gradient_of_exactly_zero_costs_no_run(tmp_path):
    """θ saturates, and groups of particles are empty: diagnostics that are 0/0 are left out, the run is kept."""
    config = hexagon.Config(steps=10, particles=2, seeds=1, tune=True, grid=(1e4,), out=tmp_path / "run")
    summary = hexagon.run(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "run" / "figures" / "curves.png").exists()
    saturated = summary["arms"]["nested_tuned"]["diagnostics"]
    assert all(map(math.isfinite, saturated.values())) and "mean_energy" in saturated


def test_the_narrowest_modes_are_resolved():
    """KL of equal weights to θ_0, of modes that do not overlap: Σ p log p/q over the weights alone."""
    p, q = torch.zeros(6).double().softmax(0), torch.tensor(LOGITS).double().softmax(0)
    exact = HexagonQuadrature(NARROWEST)
    assert exact.coarse.kl_of_weights(torch.zeros(6), torch.tensor(LOGITS)) == pytest.approx(
        (p @ (p / q).log()).item(), rel=1e-6
    )


@pytest.mark.drawn
def test_modes_that_no_point_of_the_picture_meets_are_drawn(tmp_path):
    """At σ = 1e-3 the density underflows between the points of the grid, and has no levels of its own."""
    from implicit_diffusion.commands.hexagon.figures import _particles
    from implicit_diffusion.commands.hexagon.trace import Trace

    cloud = mixture(sigma=1e-3).sample(4, Noise(0)), torch.tensor(LOGITS)
    _particles(1e-3, [Trace("untrained", 0, mixture(), clouds=[cloud] * 3)], RunDirectory(tmp_path))
    assert (tmp_path / "figures" / "particles.png").stat().st_size > 1000


def test_of_rates_that_tie_the_smallest_is_taken():
    """Two modes by chance: the larger rate is ahead by luck of one seed in four; one that is better on all is taken."""
    assert best_rate({0.1: [0.1, 0.1, 0.1, 0.1], 1.0: [0.3, 0.3, 0.2, 0.3], 10.0: [0.3] * 4}) == 1.0
    assert best_rate({10.0: [0.2957] * 3, 100.0: [0.2982] * 3, 1000.0: [0.29829] * 3, 10000.0: [0.2983] * 3}) == 100.0
    assert best_rate({1.0: [0.24, 0.24, 0.24, 0.24], 10.0: [0.29, 0.28, 0.29, 0.29], 100.0: [0.0] * 4}) == 10.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "--steps"),
        ({"particles": 1}, "--particles"),
        ({"seeds": 0}, "--seeds"),
        ({"sigma": 0.0}, "--sigma"),
        ({"sigma": 1e-3}, "--sigma must be at least 0.05"),
        ({"step_size": -0.1}, "--step-size"),
        ({"lr": float("nan")}, "--lr"),
        ({"forward_kl": -1.0}, "--forward-kl"),
        ({"grid": ()}, "--grid"),
    ],
)
def test_bad_numbers_are_named_before_any_work(tmp_path, change, named):
    out = tmp_path / "run"
    with pytest.raises(InvalidInputError, match=named):
        hexagon.run(hexagon.Config(out=out, **change))
    assert not out.exists()


def test_the_driver_of_runs_serves_particles_and_resumes_bit_for_bit(tmp_path):
    def build():
        potential = mixture()
        adam = torch.optim.Adam([potential.logits], lr=0.05)
        options = {"particles": 50, "noise": Noise(3), "weighted": True}
        return Single(potential, ULA(0.2), Reward(hard_reward), adam, **options)

    whole = fit(build(), 30, directory=RunDirectory.create(tmp_path / "whole")).loop
    fit(
        build(),
        30,
        directory=RunDirectory.create(tmp_path / "part"),
        callbacks=[lambda f: "enough" * (f.updates == 12)],
    )
    resumed = fit(build(), 30, directory=RunDirectory(tmp_path / "part")).loop
    assert torch.equal(whole.model.logits, resumed.model.logits)
    assert torch.equal(whole.weighted_state.x, resumed.weighted_state.x)
    lines = [RunDirectory(tmp_path / name).read_metrics() for name in ("whole", "part")]
    assert [m["reward"] for m in lines[0]] == [m["reward"] for m in lines[1]]


@pytest.mark.parametrize("arm", ["implicit", "weighted", "nested", "unrolled", "guidance", "transfer"])
def test_seeds_that_step_together_are_the_seeds_one_by_one(arm):
    """In the single precision of the command, after steps in which rounding has not grown."""
    setting = hexagon.Config(steps=20, particles=32, seeds=2, compile=False).setting()
    together, alone = Arms(setting), Arms(setting)
    for arms in (together, alone):
        arms.optimal = {0: torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 1.0]), 1: torch.zeros(6)}
    both, singles = together.run(arm, [0, 1]), [alone.run(arm, [seed])[0] for seed in (0, 1)]
    for trace, single in zip(both, singles, strict=True):
        assert trace.seed == single.seed
        assert trace.tail == pytest.approx(single.tail, rel=1e-4)
        assert len(trace.points) == len(single.points)
        for point, expected in zip(trace.points, single.points, strict=True):
            assert point | {"seconds": 0} == pytest.approx(expected | {"seconds": 0}, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(torch.stack(trace.path), torch.stack(single.path), rtol=1e-4, atol=1e-5)
        assert trace.diagnostics == pytest.approx(single.diagnostics, rel=1e-2, abs=1e-3)
