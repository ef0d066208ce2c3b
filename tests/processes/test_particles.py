"""Two and three processes that share the particles of a loop, beside one that has them all."""

import pytest
import torch

from tests.helpers import shared_particles
from tests.helpers.gibbs_loops import BUILDS
from tests.helpers.shared_particles import agree
from tests.helpers.together import together

HERE = "tests.helpers.shared_particles:"
SLOW = pytest.mark.slow
FAST = ["weighted ula", "weighted x-first mala", "ula with lag", "nested, persistent"]


@pytest.mark.parametrize(
    ("W", "names"),
    [
        (2, FAST),
        (3, FAST[:1]),
        pytest.param(2, [name for name in BUILDS if name not in FAST], marks=SLOW),
        pytest.param(3, list(BUILDS), marks=SLOW),
    ],
)
def test_several_processes_give_the_run_of_one(W, names):
    """Three processes do not divide the four data of an estimate, two do."""
    one, each = shared_particles.named(names), together(W, HERE + "named", names)
    for name in names:
        agree([results[name] for results in each], one[name])


@SLOW
def test_several_processes_in_single_precision():
    names = [name for name in BUILDS if "nested" not in name]
    one = shared_particles.named(names, 1, torch.float32)
    each = together(3, HERE + "named", names, 1, torch.float32)
    for name in names:
        agree([results[name] for results in each], one[name], 1e-5)


@pytest.mark.parametrize("W", [2, pytest.param(3, marks=SLOW)])
def test_particles_are_resampled_over_processes(W):
    """By the weights of all, and to wherever they go: some come from another process."""
    one = shared_particles.resampled()
    assert one["end"].log_z != 0
    agree(together(W, HERE + "resampled"), one)


@pytest.mark.parametrize(("W", "weighted"), [(2, True), pytest.param(3, False, marks=SLOW)])
def test_energy_networks_with_adapted_steps(W, weighted):
    one = shared_particles.energy_network(weighted)
    each = together(W, HERE + "energy_network", weighted)
    agree(each, one, 1e-11)  # matrix products of fewer rows round otherwise
    sizes = [metrics["step_size"] for metrics, _ in one["records"]]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("W", [2, pytest.param(3, marks=SLOW)])
def test_pairs_of_an_experiment_are_shared_as_any_particles(W):
    agree(together(W, HERE + "of_an_experiment"), shared_particles.of_an_experiment())


def test_a_state_is_continued_by_any_number_of_processes():
    """By two, by one, by three: as without interruption; to the bit where the number stays."""
    place = HERE + "handed_over"
    _, whole = shared_particles.handed_over(6, None, 3)
    after_two = together(2, place, 3, None, 0)
    for saved in after_two:
        assert saved[0]["weighted_state"]["x"].shape == (shared_particles.N, 2)
        assert torch.equal(saved[0]["weighted_state"]["x"], after_two[0][0]["weighted_state"]["x"])
    after_one, _ = shared_particles.handed_over(3, after_two[0][0], 0)
    for _, result in together(3, place, 0, after_one, 3):
        torch.testing.assert_close(result["end"].x, whole["end"].x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result["end"].log_weights, whole["end"].log_weights, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result["theta"], whole["theta"], rtol=1e-11, atol=1e-11)
    (_, straight), (_, again) = together(2, place, 3, None, 6)[0], together(2, place, 0, after_two[1][0], 6)[0]
    for a, b in zip((*straight["end"], straight["theta"]), (*again["end"], again["theta"]), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("where", ["reward", "potential"])
def test_nan_in_one_share_stops_all_with_its_reason(where):
    """It is one process's particle; all of them say so, and none has moved."""
    alone = shared_particles.poisoned(where)
    assert alone == (alone[0], True)
    assert ("V is NaN or infinite at 1 of 24" if where == "potential" else "the value of reward is NaN") in alone[0]
    assert together(2, HERE + "poisoned", where) == [alone] * 2


def test_iterations_within_one_step_and_compilation():
    """Several iterations make their updates on the Γ of all; what would be compiled says why it is not."""
    _, _, one = shared_particles.eager(4)
    for warned, shown, result in (each := together(2, HERE + "eager", 4)):
        assert warned == ["not compiled, runs eagerly: several processes exchange numbers within an iteration"]
        assert "not compiled" in shown
        assert [a for a, _ in result["records"]] == [a for a, _ in each[0][2]["records"]]
        for (metrics, _), (expected, _) in zip(result["records"], one["records"], strict=True):
            assert metrics == pytest.approx(expected, rel=1e-10, abs=1e-11)
        torch.testing.assert_close(result["theta"], one["theta"], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result["end"].x, one["end"].x, rtol=1e-11, atol=1e-11)


def test_what_processes_cannot_share_is_refused():
    number = "particles must be a multiple of the number of processes, 3, got 64; use 63 or 66"
    alone = "the particles of a loop are shared by several processes, and only one of them asks for all"
    for first, noise, x, *others in together(3, HERE + "refused", 64):
        assert first == number and len(others) == 2 and all(alone in message for message in others)
        assert "noise is not the same in all" in noise and "x of the particles is not the same in all" in x


@pytest.mark.parametrize("W", [2, pytest.param(3, marks=SLOW)])
def test_what_is_read_of_a_loop_is_the_whole(W):
    """Particles, diagnostics, a refresh and what follows it."""
    one = shared_particles.read()
    for each in together(W, HERE + "read"):
        assert each.keys() == one.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(each[name], value, rtol=1e-11, atol=1e-11)
            else:
                assert each[name] == pytest.approx(value, rel=1e-9) if isinstance(value, float) else each[name] == value


def test_what_an_iteration_exchanges():
    """Counted to the byte: means and alarms are single numbers; weights are one number for each particle."""
    n, theta = shared_particles.N // 2, 3
    for name, calls, numbers in (
        ("plain", 4, 2 + theta),  # mean reward, its centre, Γ; and an alarm in single precision
        ("plain weighted", 5, n + 2 + theta),
    ):
        for found in together(2, HERE + "traffic", name):
            assert found == (calls, 8 * numbers + 4)
    assert shared_particles.traffic("plain") == (0, 0)
