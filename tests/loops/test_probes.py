"""Rewards that depend on their batch, or differ between two calls, are noticed wherever they are called."""

import functools
import warnings

import pytest
import torch
from torch import nn

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.frozen import eval_mode, modules_in
from implicit_diffusion.loops import Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.fit import fit
from tests.evaluation.test_chains import one_row
from tests.helpers.oracles import affine_chain


def total(x):
    return x.flatten(1).sum(1)


def centred(x):
    return total(x) - total(x).mean().detach()


def ranks(x):
    return total(x).argsort().argsort()


FORMS = {
    "a number": lambda f: f,
    "a dict": lambda f: lambda x: {"reward": f(x)},
    "a pair": lambda f: lambda x: (f(x)[:, None], {"mean": total(x)}),
    "a list": lambda f: lambda x: f(x).tolist(),
    "with an argument more": lambda f: functools.partial(lambda x, weight: f(x) * weight, weight=2),
}


@pytest.mark.parametrize("mixing", [centred, ranks])
@pytest.mark.parametrize("form", FORMS)
def test_evaluations_notice_rewards_of_their_batch(form, mixing):
    """Also one that no gradient is asked of; its mean would depend on how many are judged together."""
    with pytest.raises(InvalidInputError, match="reward mixes samples"):
        evaluate(one_row(noise=1.0), FORMS[form](mixing), Noise(0), starts=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(one_row(noise=1.0), FORMS[form](total), Noise(0), starts=8)


def test_evaluations_notice_rewards_of_the_batchs_conditions():
    chain = one_row(noise=1.0, condition=Drawn("label", torch.arange(50)))
    evaluate(chain, lambda x, given: total(x) + given["label"], Noise(0), starts=8)
    with pytest.raises(InvalidInputError, match="reward mixes samples"):
        evaluate(chain, lambda x, given: total(x) + given["label"].sum(), Noise(0), starts=8)


def test_evaluations_notice_rewards_that_differ_between_calls():
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match=r"reward is random: .*differ by up to"):
        evaluate(one_row(noise=1.0), lambda x: total(x) + torch.rand(len(x), generator=generator), Noise(0), starts=8)


def test_a_reward_that_is_checked_is_not_tried_again():
    calls = []
    reward = Reward(lambda x: calls.append(len(x)) or total(x))
    chain = one_row(noise=1.0)
    evaluate(chain, reward, Noise(0), starts=8)
    assert len(calls) == 6
    evaluate(chain, reward.as_checked(), Noise(0), starts=8)
    assert len(calls) == 6 + 1


def test_rewards_that_are_held_out_are_noticed_once():
    """A judge beside the reward: refused where it mixes; one that is random shifts no draw of the training's."""
    _, reward = affine_chain(4, 2)

    def random(x):
        return total(x) + torch.rand(len(x))

    def run(judge, draws):
        torch.manual_seed(0)  # of the trial when the loop is made, which belongs to no run
        chain, _ = affine_chain(4, 2)
        optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=0.01)

        def noisy(x):
            draws.append(100 * float(torch.rand(())))  # two draws that look alike are rare
            return reward(x) + draws[-1]

        loop = Queue(chain, Reward(noisy) + PathKL(), optimizer, batch=4, noise=Noise(0))
        draws.clear()
        return fit(loop, 6, callbacks=[HeldOut(judge, Noise(1), every=1, starts=8)])

    with pytest.raises(InvalidInputError, match="reward mixes samples"):
        run(centred, [])
    first, second, checked = [], [], Reward(random, checked=True)
    with pytest.warns(UserWarning, match="reward is random") as said:
        run(random, first)
    assert sum("reward is random" in str(each.message) for each in said) == 1 + 1  # of the reward, and of the judge
    with pytest.warns(UserWarning, match="reward is random"):
        run(checked, second)
    assert first == second


# ----------------------------------------------------------------------------------- networks that a reward holds


class Scorer:
    """What users make of a network: an object that holds it, maybe with others in a list or a dict."""

    def __init__(self, network, inside=lambda network: network):
        self.name, self.network = "a scorer", inside(network)

    def __call__(self, x):
        return self.score(x)

    def score(self, x):
        held = self.network
        held = held.network if isinstance(held, Scorer) else held
        held = held[0] if isinstance(held, list) else held["it"] if isinstance(held, dict) else held
        return held(x.float())[:, 0].to(x.dtype)


def random_network(features):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(features), nn.Linear(features, 1), nn.Dropout(0.5))


HOLDERS = {
    "an attribute": Scorer,
    "a method": lambda network: Scorer(network).score,
    "a list": lambda network: Scorer(network, lambda network: [network]),
    "a dict": lambda network: Scorer(network, lambda network: {"it": network}),
    "an attribute's attribute": lambda network: Scorer(Scorer(network)),
    "a partial's argument": lambda network: functools.partial(lambda held, x: held(x.float())[:, 0].to(x), network),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_networks_that_a_reward_holds_are_functions(holder):
    """Dropout draws nothing, batch norm mixes nothing, and each has its own mode again afterwards."""
    network = random_network(1)
    reward = HOLDERS[holder](network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(one_row(noise=1.0), reward, Noise(0), starts=8)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        right = network.eval()(found.samples.flatten(0, 1).float())[:, 0]
    assert torch.allclose(found.reward.flatten().float(), right)


def test_what_holds_no_networks_is_passed_over():
    for value in (None, total, 3.0, "net", nn.Linear, torch.ones(2), torch, {"net": nn.Linear(1, 1)}, Scorer(None)):
        assert list(modules_in(value)) == []
    network = nn.Linear(1, 1)
    with eval_mode(Scorer(network), network):
        assert not network.training
    assert network.training
