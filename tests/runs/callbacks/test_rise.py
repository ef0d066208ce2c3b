"""A training that makes J worse is told, stopped, and ended with the best model that was seen."""

import math
from types import SimpleNamespace

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import most_kl
from implicit_diffusion.loops import Nested, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.rise import Rise
from implicit_diffusion.runs.callbacks.watch import Runaway
from implicit_diffusion.runs.fit import fit
from tests.files.test_manifest import flip
from tests.helpers.oracles import affine_chain, exact_terms, table
from tests.helpers.stops import interrupt_at

BETA = 0.7


def build(lr=0.02, dim=2, **update):
    chain, reward = affine_chain(3, dim)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=lr)
    loop = Nested(chain, Reward(reward) + BETA * PathKL(), Update(sgd, **update), batch=64, noise=Noise(0))
    return loop, reward


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def objective(chain, reward):
    earned, kl, _ = exact_terms(chain, reward)
    return (BETA * kl - earned).item()


def test_too_large_a_rate_stops_and_a_good_one_does_not():
    """Without a look of the run's own, at once, and with what to change."""
    for lr in (0.02, 20.0):
        (loop, reward), said = build(lr), []
        found = fit(loop, 20, callbacks=[Rise(HeldOut(reward, Noise(1), every=5, starts=500), say=said.append)])
        if lr < 1:
            assert found.stopped is None and said == [] and found.updates == 20
        else:
            assert found.updates == 1 and "above the" in found.stopped and len(said) == 1
            assert "no sampler beyond" in found.stopped and "Try a learning rate 1" in found.stopped
            assert found.advice.startswith("Try a learning rate 1") and found.stopped.endswith(found.advice)
            assert found.kept is None and objective(loop.chain, reward) > objective(loop.chain.pretrained(), reward)


def test_what_has_run_away_stops_as_well_and_is_not_trained_on(tmp_path):
    """Its state is on disk: the run was stopped for it, and nothing better is lost."""
    for _ in range(2):
        (loop, reward), directory = build(1e5), RunDirectory(tmp_path / "run")
        callbacks = [Rise(HeldOut(reward, Noise(1), starts=100), say=lambda text: None), Runaway(1.0)]
        found = fit(loop, 20, callbacks=callbacks, directory=directory)
        assert found.updates == 1 and "the path KL is" in found.stopped
        assert exact_terms(loop.chain, reward)[1] > 1060


class Scripted(HeldOut):
    """Looks with a given rise of J and its standard error, whatever the path KL is."""

    def __init__(self, rises, every=5, error=0.5):
        super().__init__(torch.sum, Noise(0), every, 100)
        self.rises, self.error, self.seen = rises, error, []
        self.reward_of_u0 = 30 + torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.noise_of_j = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)[:, None] * math.sqrt(0.99)

    def look(self, fit):
        self.seen.append(fit.updates)
        rise = self.rises(fit.updates) + 10 * self.error * self.noise_of_j
        zero = torch.zeros(100, 1, dtype=torch.float64)
        kl = getattr(fit, "kl", 0.0)
        return Evaluation(self.reward_of_u0 + BETA * kl - rise, zero + kl, zero, zero[..., None][..., :0])

    def pretrained(self, fit):
        zero = torch.zeros(100, 1, dtype=torch.float64)
        return Evaluation(self.reward_of_u0, zero, zero, zero[..., None][..., :0])


def drive(rises, updates, watch=None, kl=lambda n: 0.0, **options):
    """A run that is nothing but its looks; returns them, what was said, the reason to stop, and the last update."""
    said, looks = [], Scripted(rises, **options)
    watch = watch or Rise(looks, say=said.append)
    watch.held_out, watch.say = looks, said.append
    watch._kept.keep = lambda fit, **numbers: setattr(watch._kept, "numbers", {"updates": fit.updates, **numbers})
    loop = SimpleNamespace(objective=Reward(torch.sum) + BETA * PathKL())
    chain = SimpleNamespace(num_steps=2, event_shape=(3,), trained_rows=(0, 1), table=table(2), condition=None)
    reason, number = None, 0
    for number in range(1, updates + 1):
        seen = {"path_kl": kl(number)} if kl(number) else {}
        run = SimpleNamespace(loop=loop, chain=chain, metrics=seen, updates=number, total=updates, kl=kl(number))
        if reason := watch(run):
            break
    return looks.seen, said, reason, number, watch


def test_when_it_looks_and_what_it_says(as_users_run):
    """1, 2, 4 and every fifth update, and the last; what is clear is said once, and taken back once it is below."""
    rises = {1: 0.0, 2: 1.9, 4: 2.1, 5: 5.0, 10: 0.1, 15: -0.1, 20: 2.1}
    seen, said, reason, number, watch = drive(lambda n: rises.get(n, -3.0), 22)
    assert seen == [1, 2, 4, 5, 10, 15, 20, 22] and reason is None and number == 22
    assert [line.split(": ")[0] for line in said] == ["update 4", "update 15", "update 20", "update 22"]
    assert "is 2.1 ± 0.5 above the -30 of the pretrained model: this training makes it worse" in said[0]
    assert watch._kept.numbers["updates"] == 22  # of a fall by six standard errors; one by a fifth is none


@pytest.mark.parametrize(
    ("rises", "stops"),
    [
        (lambda n: 5.0, 15),  # the looks after 1, 2 and 4 updates do not count
        (lambda n: 5.0 if n < 15 else -1.0, None),  # a hump
        (lambda n: 5.0 if n in (20, 25, 35, 40, 45) else -1.0, 45),  # one after the other
        (lambda n: 1.9, 50),  # not clear while there is more to come, and three errors at the end are
        (lambda n: 0.9, None),
        (lambda n: math.nan, 1),
        (lambda n: 1e9, 1),
    ],
)
def test_how_long_j_may_stand_above(rises, stops, as_users_run):
    _, said, reason, number, _ = drive(rises, 50)
    assert (number if reason else None) == stops
    assert reason is None or "Stopped: " in said[-1]


def test_the_trainings_own_path_kl_calls_for_a_look(as_users_run):
    """Beyond what could pay, but not at every update; and far beyond, the run stops at that look."""

    def most(factor, rise):
        watch = Rise(Scripted(lambda n: 0.0), pretrained=Evaluation(*gaussian(4000, 4), *[torch.zeros(4000, 4)] * 3))
        limit = most_kl(watch.pretrained, BETA)
        kl = lambda n: factor * limit if n > 32 else 0.0  # noqa: E731
        return drive(lambda n: rise, 60, watch, kl=kl, every=30)

    assert most(0.9, 0.0)[0] == [1, 2, 4, 8, 16, 30, 60]
    assert most(1.1, 0.0)[0] == [1, 2, 4, 8, 16, 30, 36, 42, 48, 54, 60]
    assert most(9.9, 5.0)[0] == [1, 2, 4, 8, 16, 30, 60]  # J is known to stand above
    looks, _, reason, number, _ = most(10.1, 5.0)
    assert looks[-1] == number == 36 and "the path KL is" in reason and "no sampler beyond" in reason


def test_a_weight_that_is_raised_does_not_make_a_run_worse_before_its_end(as_users_run):
    """β from 1 to 10 at a path KL of one nat, for a reward of two: J = −1 under the first, 8 under the last."""

    class OneNat(Scripted):
        def look(self, fit):
            found = super().look(fit)
            return Evaluation(found.reward, found.path_kl + 1.0, found.log_ratio + 1, found.samples)

    watch = Rise(OneNat(lambda n: -2.0), say=lambda text: None)
    watch._kept.keep = lambda fit, **numbers: None
    chain = SimpleNamespace(num_steps=2, event_shape=(3,), trained_rows=(0, 1), table=table(2), condition=None)
    for number in range(1, 51):
        loop = SimpleNamespace(objective=Reward(torch.sum) + min(10.0, 1.0 + (number - 1) / 2) * PathKL())
        reason = watch(SimpleNamespace(loop=loop, chain=chain, metrics={}, updates=number, total=50))
        assert (reason is None) == (number < 50)


def gaussian(*shape, std=1.4):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def test_the_path_kl_that_could_pay_is_four_times_that_of_the_optimum():
    """R = σ z: the optimum at β has a path KL of σ²/2β², and J ≤ J_before allows for 2σ²/β²."""
    samples = Evaluation(*gaussian(50_000, 4), *[torch.zeros(50_000, 4)] * 3)
    assert most_kl(samples, 1.4) == pytest.approx(2.0, rel=0.1)
    assert most_kl(samples, 2.8) == pytest.approx(0.5, rel=0.1)
    assert most_kl(Evaluation(*gaussian(4, 2), *[torch.zeros(4, 2)] * 3), 1e-3) == math.inf


def test_no_control_beyond_it_is_as_good_as_the_pretrained_one():
    """Of random controls of a linear chain, small and large, in closed form."""
    from implicit_diffusion.evaluation import evaluate

    chain, reward = affine_chain(3, 2)
    limit = most_kl(evaluate(chain, reward, Noise(2), starts=2000, repeats=4), BETA)
    generator, before, beyond, within = torch.Generator().manual_seed(0), objective(chain, reward), 0, 0
    for n in range(300):
        with torch.no_grad():
            for p, start in zip(chain.denoiser.parameters(), chain.reference.parameters()):
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(start + 0.01 * 1.02**n * noise)
        better = objective(chain, reward) <= before
        far = exact_terms(chain, reward)[1] > limit
        beyond, within = beyond + far.item(), within + better
        assert not (better and far)
    assert beyond > 50 and within > 20


def kick(at, by):
    def callback(state):
        if state.updates == at:
            state.model.shift.data.add_(by)
            state.loop.model.shift.data.copy_(state.model.shift.data)

    return callback


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_run_ends_with_the_best_model_that_was_seen(on_disk, ema, tmp_path):
    """Interrupted and gone on with, it is the same to the last bit; what has stopped does not train on."""

    def run(name, *others):
        loop, reward = build(0.05, ema_decay=ema)
        rise = Rise(HeldOut(reward, Noise(1), every=4, starts=200), say=lambda text: None)
        directory = RunDirectory(tmp_path / name) if on_disk else None
        callbacks = [kick(14, 4.0), lambda s: seen.update({s.updates: weights(s.model)}), *others, rise]
        found = fit(loop, 40, callbacks=callbacks, directory=directory)
        assert torch.equal(rise.held_out.look(found).reward, rise.held_out.evaluate(found).reward)
        return found, reward

    seen = {}
    whole, reward = run("whole")
    assert whole.updates in (16, 24) and "The model is that of update 12" in whole.stopped
    assert whole.kept["updates"] == 12 and torch.equal(weights(whole.model), seen[12])
    chain = whole.chain
    assert objective(chain, reward) < objective(chain.pretrained(), reward) - 3 * whole.kept["fall_se"]
    if on_disk:
        assert (tmp_path / "whole" / "kept" / "better" / "state.safetensors").is_file()
        run("parts", interrupt_at(9)), run("parts", interrupt_at(13))
        assert run("parts", interrupt_at(whole.updates))[0].stopped == "interrupted"
        for _ in range(2):
            again = run("parts")[0]
            assert torch.equal(weights(again.model), seen[12]) and again.stopped == whole.stopped
            assert (again.updates, again.kept) == (whole.updates, whole.kept)
        flip(tmp_path / "parts" / "kept" / "better" / "state.safetensors", -1, 0)
        with pytest.raises(InvalidInputError, match=r"kept/better/state.safetensors is damaged.*the model to end with"):
            run("parts")


def test_what_cannot_be_watched_is_refused(as_users_run):
    with pytest.raises(InvalidInputError, match="at least 2 starts"):
        Rise(HeldOut(torch.sum, Noise(0), starts=1))
    chain, reward = affine_chain(3, 2, noise=False)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    loop = Nested(chain, Reward(reward) + 0.0 * PathKL(), sgd, batch=8, noise=Noise(0))
    loop.objective = loop.objective.with_weight(PathKL, 1.0)
    rise = Rise(HeldOut(reward, Noise(1), starts=8))
    state = SimpleNamespace(loop=loop, chain=chain, metrics={}, updates=1, total=3, kept=None)
    with pytest.raises(InvalidInputError, match="a trained row of the chain has no noise"):
        rise(state)


@pytest.mark.parametrize("above", [True, False])
def test_a_resumed_watch_is_the_one_that_was(above):
    first, second = (Rise(HeldOut(torch.sum, Noise(0))) for _ in range(2))
    first.above, first._count, first._looked, first._kept.numbers = above, 2, 7, {"updates": 5, "path_kl": 0.1}
    second.load_state_dict(first.state_dict())
    assert second == first and second.above is above
    second.load_state_dict({"above": above})  # of an earlier release
    assert second.above is above


def test_a_chain_that_begins_above_the_pretrained_one_is_measured_from_there(as_users_run):
    """By how much, how far J can fall, how large a path KL can be worth it: closed forms of affine chains."""
    loop, reward = build()
    untrained = affine_chain(3, 2)[0]
    untrained.denoiser.shift.data -= 1.5
    held_out = HeldOut(reward, Noise(1), starts=4000, untrained=untrained)
    rise, state = Rise(held_out), SimpleNamespace(loop=loop, chain=loop.chain)
    above = objective(untrained, reward) - objective(loop.chain.pretrained(), reward)
    j = held_out.begun(state).objective(BETA) - held_out.pretrained(state).objective(BETA)
    error = j.std().item() / math.sqrt(4000)
    assert rise._above(state, BETA) == pytest.approx(above, abs=4 * error) and above > 20 * error
    same = Rise(HeldOut(reward, Noise(1), starts=4000))
    assert same._above(state, BETA) == 0
    assert rise._possible(state) - same._possible(state) == pytest.approx(rise._above(state, BETA), rel=1e-9)
    samples = rise._samples(state)
    assert rise.most(state) == most_kl(samples, BETA, rise._above(state, BETA)) > same.most(state)


def test_the_cost_of_the_beginning_is_allowed_to_a_run(as_users_run):
    """10⁴ nats in the last step's path KL are a runaway, and are not where the untrained chain is as far."""
    loop, reward = build()
    untrained = affine_chain(3, 2)[0]
    state = SimpleNamespace(loop=loop, chain=loop.chain, metrics={"path_kl": 1e4}, updates=10)
    untrained.denoiser.shift.data += 400.0
    begun = HeldOut(reward, Noise(1), starts=8, untrained=untrained)
    cost = begun.begun(state).path_kl.mean().item()
    reason = Runaway(1.0).unsound(state)
    limit = float(reason.partition("beyond ")[2].split()[0])
    assert "the path KL is 1e+04 nats" in reason and cost > 1e4
    watch = Runaway(1.0, held_out=begun)
    assert watch.unsound(state) is None
    state.metrics = {"path_kl": cost + 0.9 * limit}
    assert watch.unsound(state) is None
    state.metrics = {"path_kl": cost + 1.1 * limit}
    assert "beyond" in watch.unsound(state)
