"""Warm-up reaches its target; resampling counts as it should."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers import HMC, MALA, ULA, power_law, warm_up
from implicit_diffusion.samplers.weighted_state import systematic
from tests.helpers.oracles_gibbs import Banana, Harmonic, Quartic, advance

F64 = torch.float64


FROM_ONE_SIDE = [(MALA, None, 1e-3), (HMC, None, 5.0), (MALA, 0.8, 5.0), (HMC, 0.6, 1e-3)]
FROM_THE_OTHER_SIDE = [(MALA, None, 5.0), (HMC, None, 1e-3), (MALA, 0.8, 1e-3), (HMC, 0.6, 5.0)]


@pytest.mark.parametrize(
    ("kernel", "target", "start"),
    [*FROM_ONE_SIDE, *(pytest.param(*case, marks=pytest.mark.slow) for case in FROM_THE_OTHER_SIDE)],
)
def test_reaches_the_target(kernel, target, start):
    potential = Banana()
    x = potential.draw(500, torch.Generator().manual_seed(0))
    tuned, x = warm_up(kernel(start), potential, x, Noise(0), target=target)
    target = target or {MALA: 0.574, HMC: 0.8}[kernel]
    measured = [advance(tuned, potential, x, 1, seed=k)[1].acceptance.mean() for k in range(20)]
    assert abs(torch.stack(measured).mean().item() - target) < 0.02
    assert isinstance(tuned, kernel) and tuned.step_size != start


class Wide(Harmonic):
    """N(0, scale²)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return super().forward(x / self.scale)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1e-6, 1e9])
@pytest.mark.parametrize("kernel", [MALA, HMC])
def test_the_search_may_begin_in_other_units(kernel, ratio):
    """From h = 1 the step size of another scale is found; it is that of the unit scale, scaled."""
    unit, scale = Harmonic(), ratio**0.5 if kernel is MALA else ratio
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    right = warm_up(kernel(1.0), unit, x, Noise(0))[0].step_size
    tuned, moved = warm_up(kernel(1.0), Wide(scale), scale * x, Noise(0))
    assert tuned.step_size / ratio == pytest.approx(right, rel=0.05)
    accepted = [advance(tuned, Wide(scale), moved, 1, seed=k)[1].acceptance.mean() for k in range(10)]
    assert abs(torch.stack(accepted).mean().item() - kernel.target_acceptance) < 0.02


def test_a_target_that_is_not_met_is_said():
    flat, x = Odd(lambda x: 0 * x.sum(1)), torch.zeros(40, 2, dtype=F64)
    with pytest.warns(UserWarning, match=r"did not reach its target: 100% of the proposals .* not 57%; use more steps"):
        tuned, _ = warm_up(MALA(1.0), flat, x, Noise(0))
    assert tuned.step_size > 2.0**100


def test_is_replayable_and_leaves_the_kernel_and_the_mode_alone():
    kernel, potential = MALA(0.1), Quartic().train()
    x = potential.draw(50, torch.Generator().manual_seed(0))
    one, two = (warm_up(kernel, potential, x, Noise(3), steps=30) for _ in range(2))
    assert one[0].step_size == two[0].step_size and torch.equal(one[1], two[1])
    assert kernel.step_size == 0.1 and potential.training


def test_refusals():
    x = torch.zeros(4, 2, dtype=F64)
    with pytest.raises(InvalidInputError, match="ULA never rejects"):
        warm_up(ULA(0.1), Harmonic(), x, Noise(0))
    with pytest.raises(InvalidInputError, match="steps must be"):
        warm_up(MALA(0.1), Harmonic(), x, Noise(0), steps=19)
    with pytest.raises(InvalidInputError, match="target must lie in"):
        warm_up(MALA(0.1), Harmonic(), x, Noise(0), target=1.0)
    with pytest.raises(InvalidInputError, match="particles must be finite"):
        warm_up(MALA(0.1), Harmonic(), x * float("nan"), Noise(0))
    with pytest.raises(InvalidInputError, match=r"step_size is a function of the iteration.*scale the schedule"):
        warm_up(MALA(power_law(0.5, 1 / 3)), Harmonic(), x, Noise(0))
    with pytest.raises(InvalidInputError, match=r"one number per particle.*got \(2, 1\)"):
        warm_up(MALA(0.1), Odd(lambda x: x.square()), x[:, :1], Noise(0))
    with pytest.raises(InvalidInputError, match="NaN or infinite on the initial particles"):  # on the last one
        warm_up(MALA(0.1), Odd(lambda x: x.sum(1) / (torch.arange(len(x)) < 3)), x, Noise(0))


def test_particles_that_fall_into_a_well_without_bottom():
    potential = Odd(lambda x: torch.where(x[:, 0] > 1, -torch.inf, x.square().sum(1)))
    with pytest.raises(NonFiniteError, match="bounded below"):
        warm_up(MALA(0.5), potential, torch.zeros(40, 2, dtype=F64), Noise(0), steps=20)


class Odd(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_systematic_resampling_counts_floor_or_ceil_and_is_unbiased():
    n, draws = 40, 1000
    log_weights = 2 * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=F64)
    share = n * log_weights.softmax(0)
    total = torch.zeros(n, dtype=F64)
    for u in (torch.arange(draws, dtype=F64) + 0.5) / draws:  # the mean over the uniform, by the midpoint rule
        index = systematic(log_weights, u)
        counts = torch.bincount(index, minlength=n).to(F64)
        assert counts.sum() == n
        assert ((counts == share.floor()) | (counts == share.ceil())).all()
        total += counts
    assert (total / draws - share).abs().max() < 2 / draws


def test_systematic_resampling_at_the_edges():
    zero, one = torch.tensor(0.0), torch.tensor(1 - 2.0**-24)
    even = torch.zeros(1000)
    for u in (torch.tensor(0.01), torch.tensor(0.5)):
        assert torch.equal(systematic(even, u), torch.arange(1000))
    assert systematic(even, zero).max() == 999
    alone = torch.full((8,), -200.0)
    alone[3] = 0
    assert (systematic(alone, one) == 3).all() and (systematic(alone, zero) == 3).all()
