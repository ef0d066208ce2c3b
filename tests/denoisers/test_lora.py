"""Adapters: the same gradients as with a frozen copy, at the price of none; merged or by themselves on the way out."""

import copy

import pytest
import torch

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn
from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations, merged
from implicit_diffusion.denoisers.low_rank import adapter_of
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny
from tests.helpers.oracles import table

F64 = torch.float64


def reward(x):
    return torch.tanh(x.flatten(1)).mean(1)


OBJECTIVE = Reward(reward) + 0.3 * PathKL()


def adapted(rank=2, moved=True, checkpointing=False):
    """A class-conditional U-Net under guidance with adapters away from zero, and its plain original."""
    plain = DiffusersDenoiser(tiny.unet(num_class_embeds=3).double())
    network = copy.deepcopy(plain)
    add_lora(network.model, rank, Noise(0))
    g = torch.Generator().manual_seed(5)
    for p in network.parameters():
        if p.requires_grad and moved:
            p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=F64)
    if checkpointing:
        checkpoint_activations(network.model)
        checkpoint_activations(plain.model)
    return (ClassifierFree(part, 2.0, {"class_labels": 0}) for part in (network, plain))


def chain_of(denoiser, reference):
    condition = Drawn("class_labels", torch.tensor([1, 2]))
    return Chain(denoiser, table(4), (1, 8, 8), reference=reference, pretrained_rows=(3,), condition=condition)


def gradient(chain):
    for p in chain.denoiser.parameters():
        p.grad = None
    Adjoint()(chain, OBJECTIVE, Noise(3), 2)
    return {name: p.grad for name, p in chain.denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_with_a_frozen_copy(checkpointing):
    """Recomputed activations of u_0 must be those without adapters, though they are switched on by then."""
    denoiser, plain = adapted(checkpointing=checkpointing)
    shared = gradient(chain_of(denoiser, WithoutAdapter(denoiser)))
    copied = gradient(chain_of(denoiser, plain.requires_grad_(False)))
    assert shared.keys() == copied.keys() and all("lora" in name for name in shared)
    assert len(shared) == sum(p.requires_grad for p in denoiser.parameters())
    for name in shared:
        torch.testing.assert_close(shared[name], copied[name], rtol=1e-9, atol=1e-13)
    if checkpointing:
        other, _ = adapted(checkpointing=False)
        for name, value in gradient(chain_of(other, WithoutAdapter(other))).items():
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-13)


def test_it_starts_as_the_original_and_ends_merged():
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 1, 8, 8, dtype=F64, generator=g), torch.tensor([3.0, 5.0], dtype=F64)
    labels = torch.tensor([1, 2])
    denoiser, plain = adapted(moved=False)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, t, class_labels=labels), plain(x, t, class_labels=labels))
        denoiser, plain = adapted()
        u = denoiser(x, t, class_labels=labels)
        assert (u - plain(x, t, class_labels=labels)).abs().max() > 1e-3
        off = WithoutAdapter(denoiser)
        torch.testing.assert_close(off(x, t, class_labels=labels), plain(x, t, class_labels=labels))
        whole = merged(denoiser)
        torch.testing.assert_close(ClassifierFree(whole, 2.0, {"class_labels": 0})(x, t, class_labels=labels), u)
        torch.testing.assert_close(denoiser(x, t, class_labels=labels), u, rtol=0, atol=0)  # left as it was
    assert whole.state_dict().keys() == plain.denoiser.state_dict().keys()
    assert merged(plain).state_dict().keys() == plain.denoiser.state_dict().keys() and adapter_of(plain) is None


def test_initial_weights_are_addressed_and_nothing_else_is_drawn():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, _ = adapted(moved=False)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        second, _ = adapted(moved=False)
        assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = (dict(d.named_parameters()) for d in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    downs = [p for name, p in ours.items() if "lora_A" in name]
    assert all(p.any() and p.abs().max() <= p.shape[1] ** -0.5 for p in downs)
    assert not torch.equal(downs[0], downs[1])


@pytest.mark.slow
def test_a_state_holds_the_adapter_alone_and_continues():
    def fresh():
        denoiser, _ = adapted(moved=False)
        chain = chain_of(denoiser, WithoutAdapter(denoiser))
        optimizer = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3)
        return Queue(chain, OBJECTIVE, Update(optimizer, ema_decay=0.9), batch=2, noise=Noise(0), stride=2)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(5):
        expected = whole.step()
    for _ in range(2):
        first.step()
    state = first.state_dict()
    assert all("lora" in name for name in state["model"])
    assert all("lora" in name for name in state["update"]["ema"].keys() - {"n_averaged"})
    second.load_state_dict(state)
    for _ in range(3):
        metrics = second.step()
    assert metrics == expected
    for ours, theirs in zip(second.update.ema.parameters(), whole.update.ema.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    memory, weights = predict_memory(whole), sum(p.nbytes for p in whole.model.parameters())
    assert memory.resident < 2.01 * weights  # of θ and its average; u_0 costs nothing


def test_networks_without_attention_have_their_convolutions_adapted():
    network = load_pretrained("digits").denoiser
    plain, x, t = copy.deepcopy(network), torch.ones(2, 1, 8, 8), torch.tensor([3.0, 5.0])
    add_lora(network.model, 2, Noise(0))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(".conv1.lora" in name or ".conv2.lora" in name for name in trained)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.add_(0.05 * ("lora_B" in name))
        u = network(x, t)
        assert (u - plain(x, t)).abs().max() > 1e-3
        torch.testing.assert_close(merged(network)(x, t), u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(WithoutAdapter(network)(x, t), plain(x, t))


def test_unknown_targets_name_some_that_exist():
    with pytest.raises(InvalidInputError, match=r"called to_x; among those.*conv1.*to_k, to_out\.0"):
        add_lora(tiny.unet(), 2, Noise(0), ["to_q", "to_x"])
    with pytest.raises(InvalidInputError, match="rank must be"):
        add_lora(tiny.unet(), 0, Noise(0))
    with pytest.raises(InvalidInputError, match=r"no gradient checkpointing: .*does not support"):
        checkpoint_activations(unable())


def unable():
    from diffusers import ModelMixin

    return type("Unable", (ModelMixin,), {"config_name": "config.json"})()
