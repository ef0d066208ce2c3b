"""A state that a loop cannot continue from is refused before anything changes."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_flatten

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Nested, NestedParticles, Queue, Single, Unrolled, Update, optimizers
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers import MALA, ULA
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Banana
from tests.helpers.score_function import WithBaseline

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3
REWARD, KL, NOISE = Reward(lambda x: x.sum(1)), PathKL(), Noise(0)


def chain(kind=Queue, objective=REWARD + KL, noise=NOISE, batch=4, steps=3, dim=2, adam=torch.optim.Adam, **options):
    sampler, _ = affine_chain(steps, dim)
    schedule, update = options.pop("schedule", None), options.pop("update", {})
    optimizer = adam(sampler.denoiser.parameters())
    made = Update(optimizer, schedule=schedule and schedule(optimizer, gamma=0.9), **update)
    return kind(sampler, objective, made, batch=batch, noise=noise, **options)


def particles(kind=Single, kernel=ULA, x=X, **options):
    v = Banana()
    adam = torch.optim.Adam(v.parameters())
    return kind(v, kernel(0.1), Reward(lambda x: x.sin().sum(1)), adam, particles=x, noise=Noise(0), **options)


EXPONENTIAL = torch.optim.lr_scheduler.ExponentialLR
OTHERS = {
    r"terms was \['reward', 'path_kl'\], is \['path_kl', 'reward'\]": (chain, {"objective": KL + REWARD}),
    r"terms was .*is \['reward'\]": (chain, {"objective": REWARD}),
    "seed was 0, is 1": (chain, {"noise": Noise(1)}),
    r"stream was \[\], is \[1\]": (chain, {"noise": Noise(0).stream(1)}),
    "batch was 4, is 8": (chain, {"batch": 8}),
    "stride was 1, is 2": (chain, {"stride": 2}),
    "loop was Queue, is Nested": (chain, {"kind": Nested}),
    "average was False, is True": (chain, {"update": {"ema_decay": 0.9}}),
    "schedule was None, is ExponentialLR": (chain, {"schedule": EXPONENTIAL}),
    "optimizer was Adam, is SGD": (chain, {"adam": torch.optim.SGD}),
    r"steps was 3, is 4; gain in the model had shape \(3, 2\), has \(4, 2\)": (chain, {"steps": 4}),
    r"particles was \[12, 2\], is \[6, 2\]": (particles, {"x": X[:6]}),
    "weighted was False, is True": (particles, {"weighted": True}),
    "lag was False, is True": (particles, {"lag": True}),
    "order was paper, is x-first": (particles, {"order": "x-first"}),
    "kernel was ULA, is MALA": (particles, {"kernel": MALA}),
    "is NestedParticles": (particles, {"kind": NestedParticles, "inner_steps": 2}),
    "is Unrolled": (particles, {"kind": Unrolled, "unrolled_steps": 2}),
}


@pytest.mark.parametrize("message", OTHERS)
def test_the_state_of_another_loop_is_refused_and_nothing_changes(message):
    build, changes = OTHERS[message]
    saved, other = build(), build(**changes)
    for _ in range(4):
        saved.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InvalidInputError, match=f"another loop: .*{message}.*the same arguments"):
        other.load_state_dict(saved.state_dict())
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before["model"][name])
    assert other.iteration == other.update.updates == 0


class Fussy(WithBaseline):
    """An estimator that refuses a state when half of it is read."""

    def load_state_dict(self, state):
        self.seen = state["seen"]
        if self.seen > 2:
            raise KeyError("baseline")
        super().load_state_dict(state)


def without(state, *names):
    """The state with one part less, deep inside."""
    state = copy.deepcopy(state)
    part = state
    for name in names[:-1]:
        part = part[name]
    del part[names[-1]]
    return state


@pytest.mark.parametrize(
    ("build", "damaged"),
    [
        (lambda: chain(estimator=Fussy()), lambda state: state),
        (lambda: chain(kind=Nested, estimator=Fussy()), lambda state: state),
        (chain, lambda state: without(state, "slots", 1, "carry")),
        (chain, lambda state: without(state, "update", "optimizer", "param_groups")),
        (lambda: chain(schedule=EXPONENTIAL), lambda state: without(state, "update", "gradients")),
        (particles, lambda state: without(state, "weighted_state", "momentum")),
    ],
)
def test_a_state_that_cannot_be_read_to_its_end_changes_nothing(build, damaged):
    """Whatever raises, and wherever: the loop then continues as if nothing had been loaded."""
    saved, loop, other = build(), build(), build()
    for _ in range(2):
        loop.step()
        other.step()
    for _ in range(6):
        saved.step()
    with pytest.raises((KeyError, TypeError)):
        loop.load_state_dict(damaged(saved.state_dict()))
    loop.step()
    other.step()
    ours, theirs = (tree_flatten(each.state_dict()) for each in (loop, other))
    assert ours[1] == theirs[1]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours[0], theirs[0]))


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        (NestedParticles, {"inner_steps": 1}, {"inner_steps": 2}),
        (Unrolled, {"unrolled_steps": 1}, {"unrolled_steps": 2}),
    ],
)
def test_other_numbers_of_sampler_steps(kind, one, other):
    with pytest.raises(InvalidInputError, match="_steps was 1, is 2"):
        particles(kind, **other).load_state_dict(particles(kind, **one).state_dict())


def test_a_state_that_tells_less_is_taken_to_agree():
    saved, other = chain(), chain()
    saved.step()
    other.load_state_dict({k: v for k, v in saved.state_dict().items() if k not in ("terms", "stream", "batch")})
    assert other.iteration == 1


def test_gradients_that_wait_continue_in_the_layout_of_their_parameters():
    """A norm adds in the order of memory: what a checkpoint lays out otherwise rounds otherwise."""
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    weight.grad = torch.randn_like(weight)
    parts = [part.contiguous() for part in optimizers.parts_of_gradients([weight])]
    before, weight.grad = weight.grad, None
    optimizers.load_gradients([weight], parts)
    assert weight.grad.stride() == weight.stride() == before.stride() and torch.equal(weight.grad, before)
