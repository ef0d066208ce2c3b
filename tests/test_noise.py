"""Keys name numbers: whatever splits a key into streams, whichever order they are asked in, and no two alike."""

import itertools

import numpy as np
import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise

F64 = torch.float64
KEYS = [key for length in range(4) for key in itertools.product((0, 1, 2**32 - 1), repeat=length)]


def numbers(noise, *key):
    return tuple(noise.normal((3,), *key, dtype=F64).tolist())


def test_streams_and_keys_are_one_address():
    noise = Noise(7)
    for at in range(4):
        for second in range(at, 4):
            key = (5, 0, 2**31)
            split = noise.stream(*key[:at]).stream(*key[at:second])
            assert numbers(split, *key[second:]) == numbers(noise, *key)
    assert noise.stream(1).prefix == (1,) and noise.stream(1).stream(2, 3) == Noise(7, (1, 2, 3))
    assert noise.stream(1).seed == 7 and noise.prefix == ()


def test_every_key_of_every_seed_has_numbers_of_its_own():
    found = {numbers(Noise(seed), *key) for seed in (0, 1, 2**40, 2**40 + 1) for key in KEYS}
    assert len(found) == 4 * len(KEYS)


def test_numbers_depend_on_nothing_that_came_before():
    noise, expected = Noise(3), [numbers(Noise(3), k) for k in range(5)]
    torch.randn(11)
    assert [numbers(noise, k) for k in reversed(range(5))] == expected[::-1]
    state = torch.get_rng_state()
    noise.normal((5,), 1)
    assert torch.equal(torch.get_rng_state(), state)
    shared = Noise(3).generator(4)
    assert torch.equal(torch.randn(3, generator=shared, dtype=F64), noise.normal((3,), 4, dtype=F64))


def test_neighbouring_keys_do_not_correlate():
    """Standard normal numbers under a thousand neighbouring keys: moments, and correlations with the next key."""
    x = torch.stack([Noise(0).normal((64,), k, dtype=F64) for k in range(1000)])
    assert x.mean().abs() < 4 / x.numel() ** 0.5 and (x.var() - 1).abs() < 4 * (2 / x.numel()) ** 0.5
    assert (x[1:] * x[:-1]).mean().abs() < 4 / x.numel() ** 0.5
    assert (x[:, 0][1:] * x[:, 0][:-1]).mean().abs() < 4 / 1000**0.5  # first numbers, of seeds that are not hashed


def test_the_seed_is_hashed_by_numpy(as_users_run):
    word = np.random.SeedSequence(5, spawn_key=(1, 2)).generate_state(1, np.uint64)[0]
    assert Noise(5, (1,)).generator(2).initial_seed() == int(word)
    assert Noise(np.int64(5), (np.int32(1),)) == Noise(5, (1,)) and type(Noise(np.int64(5)).seed) is int


@pytest.mark.parametrize("given", [(-1, ()), (0, (-1,)), (1.5, ()), (0, (0.5,))])
def test_what_is_no_key_is_refused(given, as_users_run):
    with pytest.raises(InvalidInputError, match="integers ≥ 0"):
        Noise(*given)
