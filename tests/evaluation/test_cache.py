"""The evaluation cache: the same numbers without a network call, and never those of another evaluation."""

import pytest
import torch

from implicit_diffusion.commands.rewards.shipped import brightness, darkness
from implicit_diffusion.evaluation import cache, evaluate
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.scheduler import read_table

NOISE = Noise(0)
SIZES = {"starts": 4, "repeats": 2}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Evaluate with a cache in a fresh folder; also returns whether anything had to be computed."""
    monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(cache, "evaluate", lambda *a, **k: calls.append(a) or evaluate(*a, **k))

    def asked(chain, reward=brightness, noise=NOISE, name="brightness", **sizes):
        calls.clear()
        evaluation = cache.evaluate_pretrained(chain, reward, noise, name=name, **(SIZES | sizes))
        fresh = evaluate(chain.pretrained(), reward, noise, **(SIZES | sizes))
        columns = {column: value for column, value in vars(fresh).items() if value is not None}
        assert columns.keys() == vars(fresh).keys() - {"rewards"} and evaluation.rewards is None
        assert all(torch.equal(getattr(evaluation, column), value) for column, value in columns.items())
        return bool(calls)

    return asked


def digits_chain(num_steps=2, **changes):
    loaded = load_pretrained("digits")
    return Chain(loaded.denoiser, read_table(loaded.scheduler, num_steps), loaded.event_shape, **changes)


def test_the_second_time_nothing_is_computed(ask):
    assert ask(digits_chain())
    assert not ask(digits_chain())
    trained = digits_chain()
    with torch.no_grad():
        next(trained.denoiser.parameters()).add_(1)  # u_θ moved, u_0 did not
    assert not ask(trained)


def test_whatever_decides_the_numbers_is_in_the_key(ask):
    assert ask(digits_chain())
    other = digits_chain()
    with torch.no_grad():
        next(other.reference.parameters()).add_(1e-3)
    assert ask(other)
    assert ask(digits_chain(3))
    assert ask(digits_chain(), darkness, name="darkness")
    assert ask(digits_chain(), noise=Noise(1))
    assert ask(digits_chain(), noise=Noise(0).stream(1))
    assert ask(digits_chain(), starts=5) and ask(digits_chain(), repeats=3)
    assert not ask(digits_chain())


def test_the_key_names_what_it_holds(ask, monkeypatch):
    """Not the way in which an object happens to be printed."""
    assert ask(digits_chain())
    monkeypatch.setattr(Noise, "__repr__", lambda noise: "Noise")
    assert not ask(digits_chain())
    assert ask(digits_chain(), noise=Noise(1)) and ask(digits_chain(), noise=Noise(1).stream(2))


def test_code_and_versions_are_in_the_key(ask, monkeypatch):
    assert ask(digits_chain())
    monkeypatch.setattr(cache, "_software", lambda: "another torch")
    assert ask(digits_chain())


def test_rewards_without_a_name_are_never_kept(ask):
    assert ask(digits_chain(), name=None) and ask(digits_chain(), name=None)


def test_neither_are_evaluations_too_large(ask, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 100)
    assert ask(digits_chain()) and ask(digits_chain())


def test_off(ask, monkeypatch):
    monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", "off")
    assert ask(digits_chain()) and ask(digits_chain())


def test_a_damaged_file_is_made_again(ask, tmp_path):
    assert ask(digits_chain())
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    assert ask(digits_chain())
    assert not ask(digits_chain())


def test_a_folder_that_cannot_be_written_is_no_error(ask, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", str(tmp_path / "file"))
    assert ask(digits_chain()) and ask(digits_chain())
