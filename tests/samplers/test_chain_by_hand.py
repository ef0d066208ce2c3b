"""The chain's recursion in plain arithmetic, row by row and slot by slot, and the law that it leads to."""

import itertools
import math

import pytest
import torch

from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.samplers.rows import RowCache
from tests.helpers.oracles import AffineDenoiser, affine_chain, table

F64 = torch.float64
N = 6


def build(pretrained_rows=(1, 4)):
    """A chain whose network is not its reference."""
    (first, _), (second, _) = affine_chain(N, 2), affine_chain(N, 2, seed=5)
    return Chain(
        first.denoiser, table(N, scaled=True), (2,), reference=second.denoiser, pretrained_rows=pretrained_rows
    )


def advanced(chain, x, k, xi):
    """a x + b u(m x, t) + s ξ with the network that acts on row k."""
    tab, net = chain.table, chain.reference if k in chain.pretrained_rows else chain.denoiser
    with torch.no_grad():
        u = net(tab.m[k] * x, torch.full((len(x),), float(tab.t[k]), dtype=F64))
    return tab.a[k] * x + tab.b[k] * u + tab.s[k] * xi


def test_a_trajectory_row_by_row():
    chain, noise = build(), Noise(3)
    states = chain.trajectory(noise, 5, 2)
    unit = Chain(chain.denoiser, table(N), (2,)).initial(noise, 5, 2) / 1.3
    torch.testing.assert_close(states[0], 1.3 * unit)
    x, used = states[0], [states[0] / 1.3]
    for k in range(N):
        xi = chain.innovation(noise, 5, [2], [k])[0]
        x = advanced(chain, x, k, xi)
        torch.testing.assert_close(states[k + 1], x, rtol=1e-13, atol=1e-13)
        used.append(xi)
    assert torch.equal(chain.sample(noise, 5, 2), states[-1])
    assert torch.cat(used).unique().numel() == (N + 1) * 10  # no number of x_0 or of a row serves twice
    other = [chain.innovation(noise, 5, [3], [k])[0] for k in range(N)]
    assert torch.cat([*used, *other, chain.initial(noise, 5, 3) / 1.3]).unique().numel() == 2 * (N + 1) * 10


@pytest.mark.parametrize("rows", [[0], [5, 4, 3, 2, 1, 0], [1, 0, 4, 4, 2], [4, 1], [2, 3], [1, 4, 0]])
@pytest.mark.parametrize("reference", [False, True])
def test_slots_on_rows_of_their_own(rows, reference):
    """Whatever the order of trained and pretrained rows: each slot is that of a call by itself."""
    chain, noise = build(), Noise(4)
    x = noise.normal((len(rows), 3, 2), 9, dtype=F64)
    transition = chain.transition(x, rows, reference=reference)
    kept = sum(row in chain.pretrained_rows for row in rows)
    assert transition.evaluations == 3 * (2 * len(rows) - kept if reference else len(rows))
    xi = chain.innovation(noise, 3, list(range(len(rows))), rows)
    found = transition.push(xi)
    for slot, row in enumerate(rows):
        torch.testing.assert_close(found[slot], advanced(chain, x[slot], row, xi[slot]), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(xi[slot], chain.innovation(noise, 3, [slot], [row])[0])
        assert bool(transition.trained[slot]) == (row not in chain.pretrained_rows)
        assert transition.h[slot].item() == chain.table.h[row].item()
        if reference:
            t = torch.full((3,), float(row), dtype=F64)
            torch.testing.assert_close(transition.u0[slot], chain.reference(chain.table.m[row] * x[slot], t).detach())
    assert transition.u0 is None or reference
    torch.testing.assert_close(transition.push(None), found - transition.s * xi)


def test_the_law_of_the_samples():
    """Mean and variance by recursion, four deviations of 40,000 samples."""
    chain, n = build(()), 40_000
    mean, variance = torch.zeros(2, dtype=F64), torch.full((2,), 1.3**2, dtype=F64)
    for k in range(N):
        tab, net = chain.table, chain.denoiser
        slope = (tab.a[k] + tab.b[k] * tab.m[k] * net.gain[k]).detach()
        mean, variance = slope * mean + tab.b[k] * net.shift[k].detach(), slope**2 * variance + tab.s[k] ** 2
    x = chain.sample(Noise(0), n)
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / n)).all()


def test_rows_with_and_without_noise_side_by_side():
    chain = build(())
    s = chain.table.s.clone()
    s[2] = 0
    mixed = Chain(
        AffineDenoiser(chain.denoiser.gain.detach(), chain.denoiser.shift.detach()),
        type(chain.table)(**{name: getattr(chain.table, name) for name in "abmth"}, s=s, initial_std=1.3),
        (2,),
    )
    assert mixed.innovation(Noise(0), 3, [0], [2]) is None and mixed.innovation(Noise(0), 3, [0, 1], [2, 1]) is not None
    with torch.no_grad():
        x = Noise(1).normal((2, 3, 2), dtype=F64)
        xi = mixed.innovation(Noise(0), 3, [0, 1], [2, 1])
        found = mixed.transition(x, [2, 1]).push(xi)
        torch.testing.assert_close(found[0], advanced(mixed, x[0], 2, 0 * xi[0]))
        torch.testing.assert_close(found[1], advanced(mixed, x[1], 1, xi[1]))


def test_what_a_replaced_chain_keeps():
    chain = build()
    same = chain.replace(denoiser=chain.reference)
    assert same.pretrained_rows == chain.pretrained_rows and same.reference is chain.reference
    assert same.table is chain.table and same.event_shape == (2,)
    assert chain.pretrained().denoiser is chain.reference
    assert chain.replace(pretrained_rows=()).trained_rows == tuple(range(N)) and chain.trained_rows == (0, 2, 3, 5)


def test_combinations_of_rows_are_right_and_not_kept_forever():
    tab = table(4)
    rows = RowCache(tab, {3}, 2, torch.device("cpu"), torch.float64)
    for which in itertools.product(range(4), repeat=4):
        known = rows(which)
        assert torch.equal(known.a.flatten(), tab.a[list(which)]) and rows(which) is known
    assert len(rows._known) == 8 * len(tab) < 4**4
