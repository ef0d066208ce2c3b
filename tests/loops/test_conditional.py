"""Chains under conditions and guidance: every gradient is the same one, whoever computes it and in whatever order."""

import pytest
import torch
from torch import nn

from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate, make_plan
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import table

N, DIM, CLASSES, BATCH = 5, 3, 4, 3
F64 = torch.float64


class Conditional(nn.Module):
    """u(x, t, embedding), nonlinear in all of them."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=g, dtype=F64) / 2)
        self.gain = nn.Parameter(torch.randn(N, DIM, generator=g, dtype=F64) / 2)

    def forward(self, x, t, embedding):
        return torch.tanh(x @ self.weight + embedding) * self.gain[t.long()] + 0.1 * embedding * x


def network(scale):
    rows = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1), dtype=F64)
    return ClassifierFree(Embedded(Conditional(), {"embedding": rows}), scale, null={"prompt": CLASSES - 1})


def reward(x, condition):
    """Every prompt asks for another point."""
    return -(x - condition["prompt"][:, None].to(x.dtype)).square().sum(1) / 4


PROMPTS = Drawn("prompt", torch.arange(CLASSES - 1))


def build(scale=2.5, rows=(4,), perturbed=True, condition=PROMPTS):
    chain = Chain(network(scale), table(N, scaled=True), (DIM,), pretrained_rows=rows, condition=condition)
    g = torch.Generator().manual_seed(2)
    for p in chain.denoiser.parameters():
        p.data += perturbed * 0.1 * torch.randn(p.shape, generator=g, dtype=F64)
    return chain, Reward(reward) + 0.3 * PathKL()


def gradient(chain, objective, estimator, indices=(0,)):
    for p in chain.denoiser.parameters():
        p.grad = None
    values = [estimator(chain, objective, Noise(3), BATCH, index) for index in indices]
    return torch.cat([p.grad.flatten() for p in chain.denoiser.parameters()]), values


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_adjoint_is_full_backpropagation(scale):
    chain, objective = build(scale)
    ours, values = gradient(chain, objective, Adjoint())
    theirs, same = gradient(chain, objective, FullBackprop())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for name in values[0]:
        torch.testing.assert_close(values[0][name], same[0][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_the_queue_adds_up_to_nested_adjoints(stride):
    chain, objective = build()
    optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
    collected = []

    def collect(*_):
        collected.append(torch.cat([p.grad.flatten() for p in chain.denoiser.parameters()]))

    optimizer.register_step_pre_hook(collect)
    loop = Queue(chain, objective, optimizer, batch=BATCH, noise=Noise(3), stride=stride)
    for _ in loop.run(8):
        pass
    total, _ = gradient(chain, objective, Adjoint(), range(loop.injected))
    torch.testing.assert_close(sum(collected), total, rtol=1e-11, atol=1e-12)


def test_the_gradient_depends_on_condition_and_guidance():
    """The equalities above would hold for a condition that never arrives."""
    base, _ = gradient(*build(), Adjoint())
    for other in (build(scale=1.0), build(condition=Drawn("prompt", torch.tensor([0])))):
        assert (gradient(*other, Adjoint())[0] - base).abs().max() > 0.01 * base.abs().max()


def test_a_restored_queue_sees_the_same_conditions():
    def fresh():
        chain, objective = build()
        optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-2)
        return Queue(chain, objective, optimizer, batch=BATCH, noise=Noise(3))

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(14):
        expected = whole.step()
    for _ in range(6):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        metrics = second.step()
    assert metrics == expected


def test_every_start_has_one_prompt_and_chains_share_it():
    chain, _ = build()
    seen = []

    def watching(x, condition):
        seen.append(condition["prompt"])
        return reward(x, condition)

    after = evaluate(chain, watching, Noise(1), starts=40, repeats=4, chunk=32)
    prompts = torch.cat(seen)[-160:].view(40, 4)  # after what the reward was tried on
    assert (prompts == prompts[:, :1]).all() and prompts.unique().tolist() == [0, 1, 2]
    again = evaluate(chain, reward, Noise(1), starts=40, repeats=4, chunk=32)
    assert torch.equal(after.reward, again.reward)
    before = evaluate(chain.pretrained(), reward, Noise(1), starts=40, repeats=4, chunk=32)
    assert mean_and_error(after.reward - before.reward)[1] < mean_and_error(before.reward)[1]


def test_the_plan_is_given_the_prompt():
    """Reward differs by the prompt alone: no tilt of the sampler can buy any of that variance."""
    chain, _ = build(perturbed=False)
    spread = evaluate(chain, lambda x, c: 10.0 * c["prompt"] + reward(x, c), Noise(1), starts=64, repeats=16)
    plain, given = make_plan(spread), make_plan(spread, conditional=True)
    within = spread.reward.var(1).mean().sqrt().item()
    assert plain.reward_std > 5 > given.reward_std and given.reward_std == pytest.approx(within)
    assert given.memory_of_start > 0.9
    gains = [row.reward_gain / given.reward_std for row in given.rows()]
    assert gains == sorted(gains) and gains[0] == pytest.approx(0.25, abs=0.1)


def test_training_beats_the_pretrained_chain():
    chain, objective = build(perturbed=False)
    update = Update(torch.optim.Adam(chain.denoiser.parameters(), lr=0.02))
    for _ in Queue(chain, objective, update, batch=16, noise=Noise(0)).run(60):
        pass
    after, before = (evaluate(c, reward, Noise(1), starts=200) for c in (chain, chain.pretrained()))
    gain, error = mean_and_error(before.objective(0.3) - after.objective(0.3))
    assert gain > 4 * error


def test_prediction_of_memory_passes_the_condition():
    chain, objective = build()
    loop = Nested(chain, objective, torch.optim.SGD(chain.denoiser.parameters(), lr=0.1), batch=2, noise=Noise(0))
    assert predict_memory(loop).activations > 0


BAD = {
    "leading dimension batch = 3.*'prompt' has shape \\(2,\\)": lambda n, b, i: {"prompt": torch.zeros(2).long()},
    "'prompt' has list": lambda n, b, i: {"prompt": [0] * b},
    "'condition' has shape": lambda n, b, i: torch.zeros(b),
    "'prompt' has shape \\(\\)": lambda n, b, i: {"prompt": torch.tensor(0)},
}


@pytest.mark.parametrize("message", BAD)
def test_conditions_of_the_wrong_form(message):
    chain, _ = build(condition=BAD[message])
    with pytest.raises(InvalidInputError, match=message):
        chain.sample(Noise(0), 3)


def test_a_reward_of_prompts_needs_a_condition():
    chain = Chain(lambda x, t: x, table(N), (DIM,))
    with pytest.raises(InvalidInputError, match="come without a condition"):
        evaluate(chain, reward, Noise(0), starts=2)
