"""The queue's timetable: its grid, what follows from it, and drains that waste no trajectory."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import TruncatedBackprop
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.loops.timetable import Timetable, coming, injects
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.oracles import affine_chain

GRID = """
iteration     0   1      2      3      4
trajectory 0  →0  →1 ←1  ←0
trajectory 1      →0     →1 ←1  ←0
trajectory 2             →0     →1 ←1  ←0
trajectory 3                    →0     →1 ←1
trajectory 4                           →0
rows pulled       1      1 0    1 0    1 0
update        –   ✓      ✓      ✓      ✓
"""
STRIDES = """
iteration     0      1          2
trajectory 0  →0 →1  →2 (2) ←1
trajectory 1         →0 →1      →2 (2) ←1
trajectory 2                    →0 →1
rows pulled          2 1        2 1
update        –      ✓          ✓
"""
EVERY = [
    Timetable(n, stride, range(n - depth, n), frozenset(silent))
    for n in range(1, 7)
    for stride in range(1, n + 1)
    for depth in range(1, n + 1)
    for silent in ((), (n - 1,), (0,), (n // 2,))
    if not set(range(n - depth, n)) <= set(silent)
]


def test_the_grid():
    assert Timetable(2, 1, range(2)).grid(5) == GRID.strip("\n")
    assert Timetable(3, 2, range(1, 3), frozenset({2})).grid() == STRIDES.strip("\n")


def test_a_trajectory_moves_over_every_row_once_and_in_order():
    for table in EVERY:
        forward = [row for stage in range(table.length) for row in table.forward(stage)]
        backward = [row for stage in range(table.length) for row in table.backward(stage)]
        assert forward == list(range(table.num_steps)) and backward == list(table.rows)[::-1]
        assert not table.forward(table.length) and not table.backward(table.length)
        stages = range(table.length)
        assert all(len(table.forward(stage)) <= table.stride >= len(table.backward(stage)) for stage in stages)
        first = min(stage for stage in stages if table.backward(stage))
        assert table.forward(first)[-1] == table.num_steps - 1  # it turns round where it arrives
        assert table.back == range(first, table.length)
        assert table.moving == {stage for stage in table.back if set(table.backward(stage)) - table.silent}


def test_states_are_counted_as_a_walk_through_the_rows_holds_them():
    for table in EVERY:
        held, counts = {0}, []
        for stage in range(table.length):
            for row in table.forward(stage):
                held |= {row + 1}
                held -= {row} - set(table.rows)
            counts.append(len(held - {table.num_steps}))  # x_N is gone when λ_N is made of it
            held -= set(table.backward(stage))
        assert [table.states(stage) for stage in range(table.length)] == counts
        assert table.states_in_flight == sum(counts)
        if len(table.rows) == table.num_steps:
            assert table.states_in_flight == table.flight * (table.num_steps + 1) - 1


def drained(table, updates):
    """Trajectories, and what is left in flight, of a run that makes so many updates."""
    slots, made, injected = [], 0, 0
    while made < updates:
        if injects(updates - made, [(table, stage) for stage in slots], table):
            slots.append(0)
            injected += 1
        made += any(stage in table.moving for stage in slots)
        slots = [stage + 1 for stage in slots if stage + 1 < table.length]
    return injected, slots


def test_a_run_ends_when_what_is_in_flight_has_given_all_its_gradients():
    for table in EVERY:
        if table.num_steps < 3:
            continue
        alone = len(table.moving)
        for updates in range(4 * table.length, 5 * table.length):
            injected, slots = drained(table, updates)
            assert not coming((table, stage) for stage in slots)
            assert injected * alone >= updates  # no update without a gradient


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("pretrained_rows", [(), (5,), (0,), (0, 5), (0, 1), (2,)])
def test_a_drain_wastes_no_trajectory_and_begins_none_in_vain(stride, pretrained_rows):
    """The last updates need one iteration each, also where the rows that are pulled back last bring no gradient."""
    chain, reward = affine_chain(6, 2, pretrained_rows=pretrained_rows)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    loop = Queue(chain, Reward(reward), sgd, batch=2, noise=Noise(0), stride=stride)
    phases = [metrics.get("phase") for metrics in loop.steps(20)]
    first = phases.index("draining")
    assert set(phases[first:]) == {"draining"}  # nothing is injected after the drain has begun
    left = [(slot.timetable, slot.stage) for slot in loop.slots]
    assert not coming(left)
    fill = min(loop.timetable.moving)
    assert loop.iteration == 20 + fill and loop.update.updates == 20


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_truncated_trajectories_are_not_wasted_either(random, stride):
    chain, reward = affine_chain(6, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    estimator = TruncatedBackprop(4, random=random)
    loop = Queue(chain, Reward(reward), sgd, batch=2, noise=Noise(0), stride=stride, estimator=estimator)
    for total in (15, 30):
        assert list(loop.run(total)) and not loop.slots
        assert loop.update.updates == total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, range(0)), "num_steps must be an integer ≥ 1"),
        ((3, 0, range(3)), r"stride must lie in 1\.\.3"),
        ((3, 4, range(3)), r"stride must lie in 1\.\.3"),
        ((3, 1, [1, 2]), "rows must be of type range"),
        *(((3, 1, rows), "rows must be the last of 3") for rows in (range(2), range(3, 3), range(-1, 3), range(1, 4))),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_a_timetable_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        Timetable(*arguments)


@pytest.mark.parametrize("total", [9, 10, 11, 12, 13, 20])
def test_trajectories_of_random_depth_leave_no_iteration_idle(total):
    """Where the next one would bring too many updates whenever it set out, it sets out at once: none but it is cut."""
    chain, reward = affine_chain(6, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    estimator = TruncatedBackprop(4, random=True)
    loop = Queue(chain, Reward(reward), sgd, batch=2, noise=Noise(3), estimator=estimator)
    assert len(list(loop.run(total))) == total
    assert loop.iteration == total + 5  # the stages on the way forward, except the one that turns round
    cut = [slot for slot in loop.slots if coming([(slot.timetable, slot.stage)])]
    assert len(cut) <= 1


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_staleness_is_what_the_timetable_says(stride, depth):
    chain, reward = affine_chain(6, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    loop = Queue(chain, Reward(reward), sgd, batch=2, noise=Noise(0), stride=stride, estimator=TruncatedBackprop(depth))
    for _ in range(3 * 6):
        metrics = loop.step()
    ages = loop.timetable.back
    assert metrics["staleness_max"] == max(ages) and metrics["staleness_mean"] == sum(ages) / len(ages)


def test_memory_shrinks_with_the_rows_that_are_pulled():
    """States: of N − 1 slots on their way forward, the last K at most, and of those on their way back."""
    chain, reward = affine_chain(6, 2)
    predicted = {}
    for depth in (1, 3, 6):
        adam = torch.optim.Adam(chain.denoiser.parameters())
        estimator = TruncatedBackprop(depth)
        loop = Queue(chain, Reward(reward) + PathKL(), adam, batch=5, noise=Noise(0), estimator=estimator)
        predicted[depth] = predict_memory(loop)
        forward = sum(max(1, k - (6 - depth) + 1) for k in range(1, 6))
        states = forward + depth * (depth + 1) // 2
        assert predicted[depth].states == 5 * 2 * 8 * (states + depth)
    assert predicted[1].activations * 6 == predicted[3].activations * 2 == predicted[6].activations
    nested = Nested(
        chain,
        Reward(reward) + PathKL(),
        torch.optim.Adam(chain.denoiser.parameters()),
        batch=5,
        noise=Noise(0),
        estimator=TruncatedBackprop(3),
    )
    assert predict_memory(nested).states == 5 * 2 * 8 * (3 + 1)
