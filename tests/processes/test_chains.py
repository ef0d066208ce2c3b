"""Several processes train a chain as one does: the same noise and states, Γ, metrics, θ and evaluations.

The affine and the element-wise networks here compute a row alike in every batch, so that states are equal to the bit.
Matrix products choose their kernels by the size of the batch: there, states are equal up to rounding.
"""

import pytest
import torch

from tests.helpers.shared_runs import assert_close, assert_equal, same_run
from tests.helpers.together import together
from tests.processes import chain_cases
from tests.processes.chain_cases import LOOPS, OBJECTIVES, UPDATES

SLOW = pytest.mark.slow
F32, F64 = torch.float32, torch.float64


def processes(W, case, *args):
    return together(W, f"tests.processes.chain_cases:{case}", *args)


def some_fast(values, *fast):
    """Parameters, all slow except some."""
    return [pytest.param(value, marks=() if value in fast else SLOW) for value in values]


def check_runs(each, one, rtol=1e-12, **options):
    assert all(runs.keys() == one.keys() for runs in each)
    for loop in one:
        same_run([runs[loop] for runs in each], one[loop], rtol, **options)


@pytest.mark.parametrize("W", [pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize("objective", some_fast(OBJECTIVES, "all of them"))
def test_every_objective_is_that_of_all_samples(objective, W):
    check_runs(processes(W, "runs", objective), chain_cases.runs(objective))


@SLOW
@pytest.mark.parametrize("W", [2, 3])
def test_in_single_precision(W):
    check_runs(processes(W, "runs", "Reward", F32), chain_cases.runs("Reward", F32), 1e-5)


@SLOW
@pytest.mark.parametrize(("kind", "dtype", "rtol", "W"), [("adapters", F64, 1e-12, 3), ("whole", F32, 1e-5, 2)])
def test_networks_and_adapters_with_gradient_checkpointing(kind, dtype, rtol, W):
    one = chain_cases.network_runs(kind, dtype)
    check_runs(processes(W, "network_runs", kind, dtype), one, rtol, states=False)


@SLOW
def test_every_process_scales_half_precision_for_itself():
    each = processes(3, "half_gradient")
    ours, _ = each[0]
    _, reference = chain_cases.half_gradient()
    assert all(torch.equal(other, ours) for other, _ in each)
    assert (ours - reference).norm() < 5e-3 * reference.norm()


@pytest.mark.parametrize("W", [pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize("which", some_fast(UPDATES, "all"))
@pytest.mark.parametrize("loop", some_fast(LOOPS, "queue"))
def test_updates_clip_accumulate_and_average_the_whole_gradient(which, loop, W):
    each, one = processes(W, "updated", which, loop), chain_cases.updated(which, loop)
    for other in each[1:]:
        assert_equal(other, each[0])
    ours = each[0]
    assert_close(ours["metrics"], one["metrics"], 1e-11)
    assert ours["work"] == one["work"]
    for name in ("theta", "average"):
        if one[name] is not None:
            torch.testing.assert_close(ours[name], one[name], rtol=1e-11, atol=1e-13)


def continued(W, *args):
    """The run of W processes, which all of them have to the bit."""
    if W == 1:
        return chain_cases.continued(*args)
    first, *others = processes(W, "continued", *args)
    for other in others:
        assert_equal(other, first)
    return first


@pytest.mark.parametrize("options", [{"accumulate": 3}, pytest.param({"ema_decay": 0.9}, marks=SLOW)])
@pytest.mark.parametrize("loop", some_fast(LOOPS, "queue"))
def test_a_state_belongs_to_no_number_of_processes(loop, options):
    """2 → 1 → 3 is the run of one up to rounding; where their number stays, it is the same run to the bit.

    The first ones end while gradients are being accumulated.
    """
    whole = continued(1, None, 17, loop, options)
    first = continued(2, None, 8, loop, options)
    second = continued(1, first["state"], 5, loop, options)
    third = continued(3, second["state"], 4, loop, options)
    assert_close(first["metrics"] + second["metrics"] + third["metrics"], whole["metrics"], 1e-10)
    torch.testing.assert_close(third["theta"], whole["theta"], rtol=1e-10, atol=1e-12)
    assert third["state"].keys() == whole["state"].keys()

    uninterrupted, resumed = continued(2, None, 13, loop, options), continued(2, first["state"], 5, loop, options)
    assert_equal(resumed["metrics"], uninterrupted["metrics"][8:])
    assert_equal(resumed["state"], uninterrupted["state"])


@pytest.mark.parametrize("accumulate", some_fast([1, 2], 2))
@pytest.mark.parametrize("where", ["states", "gradient"])
@pytest.mark.parametrize("loop", some_fast(LOOPS, "queue, stride 2"))
def test_what_is_not_finite_in_one_process_stops_all_with_its_reason(where, loop, accumulate):
    one = chain_cases.broken(where, loop, accumulate)
    message, left, _ = one
    assert left and "NaN or infinity; θ was left as it was before the update" in message
    assert processes(3, "broken", where, loop, accumulate) == [one] * 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch", r"batch must be a multiple of the number of processes, 2, got 7; use 6 or 8"),
        ("theta", r"processes begin with different numbers: shift of the denoiser is not the same in all of them"),
        ("reference", r"gain of the reference is not the same in all of them; build the loop from the same noise"),
        ("noise", r"noise is not the same in all of them"),
    ],
)
def test_what_processes_cannot_begin_with_is_refused_by_name(what, message):
    answers = processes(2, "refused", what)
    assert answers == answers[:1] * 2
    assert message in answers[0]


def test_memory_is_predicted_for_each():
    one, (ours, other) = chain_cases.predicted(), processes(2, "predicted")
    assert ours == other
    assert (ours.states, ours.activations, ours.parameters) == (
        one.states // 2,
        one.activations // 2,
        one.parameters,
    )


@pytest.mark.parametrize("loop", some_fast(LOOPS, "queue"))
def test_an_update_takes_four_calls_whatever_the_number_of_rows(loop):
    """Γ, whether all is finite, the reward, and the running cost."""
    (counts, size, parameters), other = processes(2, "calls", loop)
    assert other == (counts, size, parameters)
    assert counts[-2:] == [4, 4]
    assert max(counts) == 4
    assert parameters < size < parameters + 64


def test_rewards_draw_other_numbers_in_other_processes_and_continue():
    begun = processes(2, "drawing")
    (state, theta, ours), (other_state, other_theta, theirs) = begun
    assert torch.equal(theta, other_theta)
    assert_equal(state, other_state)
    assert not set(ours.tolist()) & set(theirs.tolist())
    whole, resumed = processes(2, "drawing", None, 10), processes(2, "drawing", state, 4)
    for (final, theta, drawn), (again, after, last) in zip(whole, resumed):
        assert_equal(again, final)
        assert torch.equal(after, theta)
        assert torch.equal(last, drawn[-len(last) :])
    for W in (1, 3):
        more = processes(W, "drawing", state, 4)
        assert len({drawn.sum().item() for *_, drawn in more}) == W
        assert len(more[0][0]["generators"]["processes"]) == W


def test_outside_of_loops_every_process_computes_the_whole():
    each, one = processes(2, "adjoint_by_hand"), chain_cases.adjoint_by_hand()
    for ours in each:
        assert_equal(ours, one)


@pytest.mark.parametrize("W", [2, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("reward", ["own", "random", "conditional", "several"])
def test_evaluations_are_those_of_one_process_to_the_bit(reward, W):
    one = chain_cases.evaluated(reward)
    for ours in processes(W, "evaluated", reward):
        assert_equal(ours, one)


@pytest.mark.parametrize("kind", ["InvalidInputError", "ZeroDivisionError", "KeyboardInterrupt"])
def test_a_part_that_fails_in_one_process_fails_in_all(kind):
    first, second, third = processes(3, "fails_in_one", kind)
    assert second.endswith("in the second part")
    assert first == third == (second if kind != "ZeroDivisionError" else f"ProcessError: process 1 raised {second}")


def test_stored_evaluations_continue_with_any_number_of_processes(tmp_path):
    one, parts = chain_cases.stored(tmp_path / "one")
    assert parts == 5
    assert processes(3, "stored", tmp_path / "several", 2) == [(None, 2)] * 3  # interrupted
    for folder, left in (("one", 0), ("several", 3)):
        for ours, parts in processes(2, "stored", tmp_path / folder):
            assert_equal(ours, one)
            assert parts == left
