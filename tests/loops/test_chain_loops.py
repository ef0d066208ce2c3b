"""One contract for both loops over chains."""

import subprocess
import sys

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.gradients import FullBackprop
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.chain_loops import BETA, LOOPS, N, Recorder, build, nested_gradient, weights
from tests.helpers.oracles import affine_chain, exact_terms, riccati


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


def test_full_backprop_is_interchangeable():
    ours, _ = build("nested")
    theirs, _ = build("nested")
    theirs.estimator = FullBackprop()
    for _ in zip(ours.run(5), theirs.run(5)):
        pass
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


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
from tests.helpers.chain_loops import build, weights
loop, _ = build(sys.argv[1], max_grad_norm=1.0, ema_decay=0.9)
loop.load_state_dict(load_state(sys.argv[2]))
for _ in range(9):
    loop.step()
save_state(sys.argv[3], {"theta": weights(loop)})
"""


@pytest.mark.slow
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
    loop, reward = build("nested", lr=0.0, batch=256)
    metrics = [loop.step() for _ in range(50)]
    r, _, _ = exact_terms(loop.chain, reward)
    mean, error = mean_and_error(torch.stack([m["reward"] for m in metrics]))
    assert abs(mean - r.item()) < 4 * error
    assert metrics[0]["path_kl"] == 0 and metrics[-1]["network_evaluations"] > 0


def test_network_evaluations_are_counted():
    loop, _ = build("nested", batch=5)
    loop.step()
    # forward; back with u_0 on every row and u_θ on all but one
    assert loop.cost()["network_evaluations"] == 5 * (N + 2 * N - 1)


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
