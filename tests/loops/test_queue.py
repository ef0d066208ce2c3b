"""What is particular to the queue: its fill and drain, what its steps report, and its contributions row by row."""

import copy

import pytest
import torch

from implicit_diffusion.gradients import pull_back, terminal_adjoint
from implicit_diffusion.loops import Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.chain_loops import BETA, N, Recorder, build, weights
from tests.helpers.oracles import affine_chain


@pytest.mark.parametrize("stride", [1, 2, 4, 6])
def test_with_learning_every_contribution_is_a_replay_under_the_recorded_history(stride):
    """Replay each trajectory by itself, row by row, under the θ that it met, and sort its pulls by update."""
    chain, reward = affine_chain(N, 2, pretrained_rows=(5,))
    optimizer = Recorder(chain.denoiser.parameters(), lr=0.02)
    objective = Reward(reward) + BETA * PathKL()
    loop = Queue(chain, objective, optimizer, batch=3, noise=Noise(7), stride=stride)
    at_iteration, update_of = [], []  # θ in force during each iteration; index of its update, None where none
    ages = []
    while loop.update.updates < 20:
        at_iteration.append([p.detach().clone() for p in chain.denoiser.parameters()])
        before = loop.update.updates
        metrics = loop.step()
        update_of.append(before if loop.update.updates > before else None)
        ages.append(metrics.get("staleness_max", 0))
    assert max(ages) == 2 * -(-N // stride) - 2
    expected = [[torch.zeros_like(p) for p in theta] for theta in optimizer.history]
    flight = -(-N // stride)
    for index in range(loop.injected):
        x = chain.initial(loop.noise, 3, index)[None]
        states = []
        for row in range(N):
            when = index + row // stride
            if when >= len(at_iteration):
                break
            replay(chain, at_iteration[when])
            states.append(x)
            x = chain.transition(x, [row]).push(chain.innovation(loop.noise, 3, [index], [row])).detach()
        else:
            lam = terminal_adjoint(objective, x[0])[0][None]
            for done, row in enumerate(reversed(range(N))):
                when = index + flight - 1 + done // stride
                if when >= len(at_iteration):
                    break
                replay(chain, at_iteration[when])
                lam, *_ = pull_back(chain, objective, states[row], [row], lam)
                if update_of[when] is not None:
                    for slot, p in zip(expected[update_of[when]], chain.denoiser.parameters()):
                        slot += 0 if p.grad is None else p.grad
    for ours, theirs in zip(optimizer.gradients, expected):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def replay(chain, theta):
    for p, value in zip(chain.denoiser.parameters(), theta):
        p.data.copy_(value)
        p.grad = None


def test_queue_with_stride_n_is_the_nested_loop():
    nested, _ = build("nested", max_grad_norm=0.3, ema_decay=0.9)
    queue, _ = build("queue, stride N", max_grad_norm=0.3, ema_decay=0.9)
    for a, b in zip(nested.steps(8), queue.steps(8), strict=True):
        assert torch.allclose(a["objective"], b["objective"], rtol=1e-12)
    torch.testing.assert_close(weights(nested), weights(queue), rtol=1e-11, atol=1e-13)
    ema = [torch.cat([p.flatten() for p in loop.update.ema.module.parameters()]) for loop in (nested, queue)]
    torch.testing.assert_close(*ema, rtol=1e-11, atol=1e-13)


def test_fill_drain_and_staleness():
    loop, _ = build("queue", pretrained_rows=())
    metrics = list(loop.steps(10))
    assert loop.update.updates == 10 and loop.injected == 10 - N + 1 and not loop.slots
    assert ["grad_norm" in m for m in metrics] == [False] * (N - 1) + [True] * 10
    assert not any("objective" in m for m in metrics)  # never were all rows pulled in one step
    assert metrics[2 * N - 3]["staleness_max"] == N - 2  # the oldest trajectory was born before the first update
    endless, _ = build("queue", pretrained_rows=())
    begun = [endless.step() for _ in range(30)]
    assert [i for i, m in enumerate(begun) if "objective" not in m] == list(range(2 * N - 2))
    steady = begun[-1]
    assert steady["staleness_max"] == 2 * N - 2 and steady["staleness_mean"] == pytest.approx(1.5 * (N - 1))
    assert [slot.row for slot in endless.slots if not slot.carry] == list(range(N - 1, 0, -1))
    assert len(list(endless.drain())) == 2 * N - 2 and not endless.slots


@pytest.mark.parametrize("stride", [1, 4, 5])
@pytest.mark.parametrize("pretrained_rows", [(), (5,)])
def test_a_queue_reports_what_it_has_seen_in_that_step_and_nothing_twice(stride, pretrained_rows):
    """θ stands still, so every number is that of a batch: of the one that came home, or by row of those pulled back."""
    chain, reward = affine_chain(N, 2, pretrained_rows=pretrained_rows)
    chain = chain.replace(denoiser=copy.deepcopy(chain.denoiser), reference=chain.reference)
    chain.denoiser.shift.data += 0.3
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    queue = Queue(chain, Reward(reward) + 0.4 * PathKL(), sgd, batch=3, noise=Noise(0), stride=stride)
    flight, updates = -(-N // stride), 3 * N
    steps = list(queue.steps(updates))
    injected, least = queue.injected, flight - 1
    rewards, kls = {}, {}
    for index in range(injected):
        x = chain.initial(Noise(0), 3, index)
        rows = []
        for transition, _, state in chain.walk(x, Noise(0), index, reference=True):
            rows.append(PathKL().cost(transition).mean().item())
            x = state[0]
        rewards[index], kls[index] = reward(x).mean().item(), rows
    for i, metrics in enumerate(steps):
        home = i - least  # the trajectory that arrives in step i
        assert ("reward" in metrics) == (0 <= home < injected)
        if "reward" in metrics:
            assert metrics["reward"].item() == pytest.approx(rewards[home])
        full = i - 2 * least >= 0 and home < injected
        assert ("path_kl" in metrics) == ("objective" in metrics) == full
        if full:  # row k was pulled by the trajectory that came home as many steps ago as that takes
            own = [kls[home - (N - 1 - k) // stride][k] for k in range(N)]
            assert metrics["path_kl"].item() == pytest.approx(sum(own))
            expected = 0.4 * metrics["path_kl"] - metrics["reward"]
            assert metrics["objective"].item() == pytest.approx(expected.item())
        phase = "draining" if i >= injected else None if full else "filling"
        assert metrics.get("phase") == phase
    assert "reward" not in steps[-1] or stride == N
    assert [m["phase"] for m in steps[injected:]] == ["draining"] * (len(steps) - injected)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("pretrained_rows", [(), (5,)])
def test_runs_one_after_the_other_drain_as_well(stride, pretrained_rows):
    chain, reward = affine_chain(N, 2, pretrained_rows=pretrained_rows)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-2)
    loop = Queue(chain, Reward(reward), sgd, batch=2, noise=Noise(0), stride=stride)
    for updates in (10, 20, 29):
        assert list(loop.run(updates))
        assert loop.update.updates == updates and not loop.slots


def test_a_state_comes_to_the_device_of_the_chain():
    first, second = build("queue")[0], build("queue")[0]
    for _ in range(9):
        first.step()
    second.chain.device = torch.device("meta")
    second.load_state_dict(first.state_dict())
    held = [x for slot in second.slots for x in (*slot.states.values(), *slot.carry.values())]
    held += second.values.values()
    assert held and all(x.device.type == "meta" for x in held)
