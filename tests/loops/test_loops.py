"""One contract for both loops, and what is particular to each."""

import copy
import subprocess
import sys

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.gradients import Adjoint, FullBackprop, pull_back, terminal_adjoint
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.oracles import QuadraticReward, affine_chain, exact_terms, riccati

BETA, N = 0.5, 6
LOOPS = {
    "nested": Nested,
    "queue": Queue,
    "queue, stride 4": lambda *a, **k: Queue(*a, stride=4, **k),
    "queue, stride N": lambda *a, **k: Queue(*a, stride=N, **k),
}


def build(kind, lr=1e-2, batch=4, beta=BETA, seed=0, pretrained_rows=(5,), optimizer=torch.optim.Adam, **update):
    chain, reward = affine_chain(N, 2, pretrained_rows=pretrained_rows)
    opt = optimizer(chain.denoiser.parameters(), lr=lr)
    loop = LOOPS[kind](chain, Reward(reward) + beta * PathKL(), Update(opt, **update), batch=batch, noise=Noise(seed))
    return loop, reward


def weights(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.chain.denoiser.parameters()])


class Recorder(torch.optim.SGD):
    """Plain SGD that remembers θ before, and Γ of, every update."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.history, self.gradients = [], []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.history.append([p.detach().clone() for p in parameters])
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        super().step()


def nested_gradient(loop, index):
    for p in loop.chain.denoiser.parameters():
        p.grad = None
    Adjoint()(loop.chain, loop.objective, loop.noise, loop.batch, index)
    return [p.grad.clone() for p in loop.chain.denoiser.parameters()]


@pytest.mark.parametrize("kind", LOOPS)
def test_without_learning_every_trajectory_adds_up_to_its_nested_adjoint(kind):
    loop, _ = build(kind, lr=0.0, optimizer=Recorder)
    for _ in loop.run(9):
        pass
    assert not getattr(loop, "slots", [])  # the run drained: no trajectory was wasted
    total = [sum(gs) for gs in zip(*loop.update.optimizer.gradients)]
    single = [nested_gradient(loop, i) for i in range(loop.injected)]
    for ours, theirs in zip(total, map(sum, zip(*single))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
                lam, _ = pull_back(chain, objective, states[row], [row], lam)
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


def test_full_backprop_is_interchangeable():
    ours, _ = build("nested")
    theirs, _ = build("nested")
    theirs.estimator = FullBackprop()
    for _ in zip(ours.run(5), theirs.run(5)):
        pass
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


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
    assert [slot.row for slot in endless.slots if slot.adjoint is None] == list(range(N - 1, 0, -1))
    assert len(list(endless.drain())) == 2 * N - 2 and not endless.slots


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_yields_its_updates_and_nothing_else(kind, accumulate):
    """One dict for each update, in order; all steps are there for who asks for them."""
    loop, _ = build(kind, accumulate=accumulate)
    assert [m["updates"] for m in loop.run(7)] == list(range(1, 8)) and not list(loop.run(7))
    again, _ = build(kind, accumulate=accumulate)
    steps = list(again.steps(7))
    assert len(steps) == again.iteration == loop.iteration
    assert sum("grad_norm" in m for m in steps) == sum("lr" in m for m in steps) == 7
    assert torch.equal(weights(loop), weights(again))


@pytest.mark.parametrize("stride", [1, 4, 5])
@pytest.mark.parametrize("pretrained_rows", [(), (5,)])
def test_a_queue_tells_what_it_has_seen_in_that_step_and_nothing_twice(stride, pretrained_rows):
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
    held = [x for slot in second.slots for x in (*slot.states, slot.adjoint) if x is not None]
    held += second.values.values()
    assert held and all(x.device.type == "meta" for x in held)


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_state_continues_bit_for_bit(kind, accumulate):
    settings = {"max_grad_norm": 1.0, "ema_decay": 0.9, "accumulate": accumulate}

    def fresh():
        loop, _ = build(kind, **settings)
        loop.update.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.update.optimizer, 20)
        return loop

    whole = fresh()
    for _ in range(17):
        expected = whole.step()
    first = fresh()
    for _ in range(8):
        first.step()
    first.objective = first.objective.with_weight(PathKL, BETA)
    second = fresh()
    second.load_state_dict(first.state_dict())
    for _ in range(9):
        metrics = second.step()
    assert torch.equal(weights(whole), weights(second))
    assert metrics == expected
    ema = [torch.cat([p.flatten() for p in loop.update.ema.module.parameters()]) for loop in (whole, second)]
    assert torch.equal(*ema)


CONTINUE = """
import sys
from implicit_diffusion.files.states import load_state, save_state
from tests.loops.test_loops import build, weights
loop, _ = build(sys.argv[1], max_grad_norm=1.0, ema_decay=0.9)
loop.load_state_dict(load_state(sys.argv[2]))
for _ in range(9):
    loop.step()
save_state(sys.argv[3], {"theta": weights(loop)})
"""


@pytest.mark.parametrize("kind", [pytest.param("nested", marks=pytest.mark.slow), "queue"])
def test_state_continues_in_a_fresh_process(kind, tmp_path):
    from implicit_diffusion.files.states import load_state, save_state

    whole, _ = build(kind, max_grad_norm=1.0, ema_decay=0.9)
    for i in range(17):
        if i == 8:
            save_state(tmp_path / "state", whole.state_dict())
        whole.step()
    subprocess.run([sys.executable, "-c", CONTINUE, kind, tmp_path / "state", tmp_path / "end"], check=True)
    assert torch.equal(weights(whole), load_state(tmp_path / "end")["theta"])


@pytest.mark.parametrize("kind", LOOPS)
def test_accumulation_averages(kind):
    """Three accumulated gradients under SGD move θ as their mean does."""
    loop, _ = build(kind, optimizer=Recorder, lr=0.0, accumulate=3)
    for _ in loop.run(4):
        pass
    plain, _ = build(kind, optimizer=Recorder, lr=0.0)
    for _ in plain.run(12):
        pass
    for k, gs in enumerate(loop.update.optimizer.gradients):
        for g, *singles in zip(gs, *plain.update.optimizer.gradients[3 * k : 3 * k + 3]):
            torch.testing.assert_close(g, sum(singles) / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["queue", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("nested", "queue, stride 4"))]
)
def test_converges_to_the_riccati_optimum(kind):
    """The exact J of the trained gains, against the optimum over all controls: within 2 % of what there is to gain."""
    loop, reward = build(kind, lr=0.05, batch=64)
    loop.update.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.update.optimizer, 400)
    j_before = (-exact_terms(loop.chain, reward)[0]).item()
    for _ in loop.run(400):
        pass
    r, kl, _ = exact_terms(loop.chain, reward)
    j_after, j_best = (-r + BETA * kl).item(), riccati(loop.chain, reward, BETA)[0]
    assert j_best <= j_after + 1e-9
    assert j_after - j_best < 0.02 * (j_before - j_best)


def test_metrics_are_those_of_the_trajectories():
    loop, reward = build("nested", lr=0.0, batch=64)
    metrics = [loop.step() for _ in range(200)]
    r, _, _ = exact_terms(loop.chain, reward)
    mean, error = mean_and_error(torch.stack([m["reward"] for m in metrics]))
    assert abs(mean - r.item()) < 4 * error
    assert metrics[0]["path_kl"] == 0 and metrics[-1]["network_evaluations"] > 0


def test_network_evaluations_are_counted():
    loop, _ = build("nested", batch=5)
    loop.step()
    assert loop.chain.evaluations == 5 * (N + 2 * N - 1)  # forward; back with u_0 on every row and u_θ on all but one


@pytest.mark.parametrize("kind", LOOPS)
def test_non_finite_values_stop_before_the_update(kind):
    loop, _ = build(kind)
    for _ in range(14):
        loop.step()
    loop.chain.denoiser.gain.data[2, 0] = float("nan")
    before = weights(loop)
    with pytest.raises(NonFiniteError, match=r"iteration 1\d: (states x_3|adjoints λ_\d) of trajectory \d+ hold NaN"):
        for _ in range(3):
            loop.step()
    torch.testing.assert_close(weights(loop), before, rtol=0, atol=0, equal_nan=True)


def test_a_reward_that_turns_nan_is_named():
    loop, _ = build("queue")
    loop.objective = Reward(lambda x: (x.sum(1) - 1e6).log()) + BETA * PathKL()
    with pytest.raises(NonFiniteError, match="the value of reward is NaN"):
        for _ in range(2 * N):
            loop.step()


class Closure(torch.optim.SGD):
    def step(self, closure): ...


BAD = {
    "batch must be": lambda c, o, f: Queue(c, f, o, batch=0, noise=Noise(0)),
    "stride must lie": lambda c, o, f: Queue(c, f, o, batch=1, noise=Noise(0), stride=7),
    "holds none": lambda c, o, f: Nested(
        c, f, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), batch=1, noise=Noise(0)
    ),
    "frozen": lambda c, o, f: Nested(
        c, f, torch.optim.SGD(c.denoiser.requires_grad_(False).parameters()), batch=1, noise=Noise(0)
    ),
    "closure": lambda c, o, f: Nested(c, f, Closure(c.denoiser.parameters()), batch=1, noise=Noise(0)),
    "one number per sample": lambda c, o, f: Nested(c, Reward(lambda x: x.mean()), o, batch=1, noise=Noise(0)),
    "max_grad_norm": lambda c, o, f: Update(o, max_grad_norm=0.0),
    "accumulate": lambda c, o, f: Update(o, accumulate=0),
    "ema_decay": lambda c, o, f: Update(o, ema_decay=1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    chain, reward = affine_chain(N, 2)
    optimizer = torch.optim.SGD(chain.denoiser.parameters())
    with pytest.raises(InvalidInputError, match=message):
        BAD[message](chain, optimizer, Reward(reward))


def test_lbfgs_is_refused():
    chain, reward = affine_chain(N, 2)
    with pytest.raises(InvalidInputError, match="closure"):
        Nested(chain, Reward(reward), torch.optim.LBFGS(chain.denoiser.parameters()), batch=1, noise=Noise(0))


def test_state_of_another_seed_is_refused():
    loop, _ = build("queue")
    other, _ = build("queue", seed=1)
    with pytest.raises(InvalidInputError, match="seed"):
        other.load_state_dict(loop.state_dict())


def test_evaluation_shares_noise_between_chains():
    loop, reward = build("nested", lr=0.05, batch=32)
    for _ in loop.run(30):
        pass
    after = evaluate(loop.chain, reward, Noise(1), starts=500)
    before = evaluate(loop.chain.pretrained(), reward, Noise(1), starts=500)
    paired, error = mean_and_error(after.reward - before.reward)
    _, single = mean_and_error(before.reward)
    assert paired > 4 * error and error < single
    assert (before.log_ratio == 0).all()


__all__ = ["QuadraticReward", "build", "weights"]
