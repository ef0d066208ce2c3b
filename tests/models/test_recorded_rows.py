"""What is read off recorded rows, on rows that are written by hand."""

from dataclasses import replace

import pytest
import torch

from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.models.pipelines.arguments import PerSample, State, Time, bound, filled, read_roles
from implicit_diffusion.models.pipelines.fitting import initial_std_of, outputs_of, roles_of, verify
from implicit_diffusion.models.pipelines.recording import PROBE_NOISE, RUN, NetworkCall, Step
from implicit_diffusion.noise import Noise
from implicit_diffusion.tables.table import ChainTable

ROWS, GUIDANCE = 3, 2.5
TABLE = ChainTable(
    a=torch.tensor([1.1, 0.9, 1.0]),
    b=torch.tensor([-0.2, 0.3, -0.1]),
    s=torch.tensor([0.5, 0.4, 0.0]),
    m=torch.tensor([0.5, 0.7, 1.0]),
    t=torch.tensor([900.0, 500.0, 100.0]),
    h=torch.ones(ROWS),
)


def numbers(key, count, row=0):
    return Noise(3).normal((count, 2, 2), key, row)


def rows(count=2, *, scale=-1.0, skip=0.0, moved=0.0, off=0.0, drift=0.0, calls=1):
    """Rows whose output is skip·x + scale·(u_− + w (u_+ − u_−)), from one call for both parts, or from two.

    `moved` of the answers' size is added to the state that the network gets, `off` to y, `drift` to w by the row.
    """
    steps = []
    for k in range(ROWS):
        x, xi = numbers(0, count, k), numbers(1, count, k)
        answers = [*numbers(2, count, k), *numbers(3, count, k)]
        without, given = torch.stack(answers[:count]), torch.stack(answers[count:])
        state = TABLE.m[k] * x + moved * numbers(4, count, k)
        words = torch.arange(2.0 * count).view(2 * count, 1)
        states, size, same = torch.cat([state] * 2), 2 * count // calls, {"t": float(TABLE.t[k]), "size": 8}
        parts = [slice(i * size, (i + 1) * size) for i in range(calls)]
        made = [NetworkCall({"sample": states[i], "words": words[i]} | same, answers[i]) for i in parts]
        output = skip * x + scale * (without + (GUIDANCE + drift * k) * (given - without))
        y = TABLE.a[k] * x + TABLE.b[k] * output + TABLE.s[k] * xi + off
        steps.append(Step(made, TABLE.t[k], x, output, y, xi, {}))
    return steps


def test_rows_have_the_numbers_that_they_were_made_of():
    steps, wide = rows(), rows(3)[0]
    (roles,) = roles_of(steps, wide)
    assert roles["sample"] == State(2, (2, 2), False) and roles["words"] == PerSample(2)
    assert isinstance(roles["t"], Time)
    for scale, skip in ((-1.0, 0.0), (1.0, 0.0), (0.25, 1.5)):
        output, (weights,) = outputs_of(rows(scale=scale, skip=skip))
        torch.testing.assert_close(output, torch.tensor([[skip, scale]] * ROWS).double(), rtol=1e-5, atol=1e-5)
        assert weights == pytest.approx((1 - GUIDANCE, GUIDANCE), rel=1e-5)  # u_− comes first
    verify(TABLE, steps, [roles])
    assert outputs_of(rows(calls=2))[1] == [pytest.approx((1 - GUIDANCE,)), pytest.approx((GUIDANCE,))]


def test_arguments_are_filled_in_for_other_states_and_prompts():
    steps, wide = rows(), rows(3)[0]
    (roles,) = roles_of(steps, wide)
    plan = bound(roles, dict(steps[0].calls[0].arguments), 2)
    x = numbers(5, 3)
    given = filled(plan, x, torch.tensor([7.0, 8.0, 9.0]), torch.tensor([1, 0, 1]), 2)
    assert torch.equal(given["sample"], torch.cat([x, x])) and given["size"] == 8
    assert given["words"][:, 0].tolist() == [1, 0, 1, 3, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moved": 1e-4}, "argument sample on row 1 differs from that on row 0, and it is neither the state"),
        ({"off": 1e-3}, "row 0 is not that of its scheduler's table: relative residual"),
        ({"drift": 1e-2}, "guidance weighs the network's answers by"),
    ],
)
def test_small_deviations_are_refused(change, message):
    steps, wide = rows(**change), rows(3, **change)[0]
    with pytest.raises(NonAffineError, match=message):
        roles = roles_of(steps, wide)
        outputs_of(steps)
        verify(TABLE, steps, roles)


def test_a_state_that_is_scaled_otherwise_than_the_table_says_is_refused():
    steps, wide = rows(), rows(3)[0]
    with pytest.raises(NonAffineError, match="on row 1 its network's argument sample is not what the row's state"):
        verify(replace(TABLE, m=torch.tensor([0.5, 0.701, 1.0])), steps, roles_of(steps, wide))


def test_outputs_that_are_not_affine_are_refused():
    steps = rows()
    bent = [Step(s.calls, s.t, s.x, s.output + 1e-3 * s.output.square(), s.y, s.xi, {}) for s in steps]
    with pytest.raises(
        NonAffineError, match="on row 0 its output is not affine in the state and the network's answers"
    ):
        outputs_of(bent)


def test_an_argument_that_another_row_changes_is_refused():
    steps = rows()
    steps[2].calls[0].arguments["words"] = steps[2].calls[0].arguments["words"] + 1
    with pytest.raises(NonAffineError, match="argument words on row 2 differs from that on row 0"):
        read_roles([step.calls[0] for step in steps], rows(3)[0].calls[0], [step.x for step in steps])


def test_the_start_is_noise_up_to_a_factor():
    drawn = torch.randn(2, 2, 2, generator=PROBE_NOISE.generator(RUN))
    assert initial_std_of(14.5 * drawn) == pytest.approx(14.5, rel=1e-6)
    with pytest.raises(NonAffineError, match="initial state is not noise"):
        initial_std_of(drawn + 0.01)
