"""A pipeline of any family before its weights are read: the same chain, and what training it will need."""

import pytest
import torch

from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora
from implicit_diffusion.denoisers.without_numbers import hollow, without_numbers
from implicit_diffusion.gradients.footprint import saved_per_sample
from implicit_diffusion.loops.unread.needs import Call, Training, needs_of_network, weight_bytes
from implicit_diffusion.loops.unread.pipelines import needs_of_pipeline
from implicit_diffusion.models.checkpoints import find_checkpoint
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pipelines.unread import unread_pipeline
from implicit_diffusion.noise import Noise
from tests.helpers import tiny_pipelines

FAST = "FLUX.1"
NAMES = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny_pipelines.FAMILIES]
STEPS, RANK = 2, 2
LESS = {"Sana": 0.05, "FLUX.2 klein": 0.002}  # kernels that keep less without numbers; the pipeline's own end


def saved(name, tmp_path, dtype=None):
    """A family's tiny pipeline, and the checkpoint that it is saved as; its network in `dtype`."""
    family = tiny_pipelines.FAMILIES[name](tmp_path / "made")
    family.pipeline.save_pretrained(tmp_path / "saved")
    if dtype is not None:
        part = "unet" if hasattr(family.pipeline, "unet") else "transformer"
        getattr(family.pipeline, part).to(dtype).save_pretrained(tmp_path / "saved" / part)
        getattr(family.pipeline, part).float()
    return family, find_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_those_of_the_pipeline_with_its_weights(tmp_path, monkeypatch, name):
    """Table, states, sizes of all parts and activations exactly, guidance and the longer prompt included."""
    family, checkpoint = saved(name, tmp_path, torch.bfloat16)
    monkeypatch.setattr("implicit_diffusion.models.parts._load", lambda *a: pytest.fail("weights were read"))
    options = {"prompts": family.prompts, "sampler": "own"} | family.call
    without = unread_pipeline(checkpoint).read(STEPS, **options)
    training = Training(samples=6, events=10, adapt=lambda network: add_lora(network, RANK, Noise(0)), ending=4)
    needs = needs_of_pipeline(checkpoint, training, STEPS, **options)

    probed = read_pipeline(family.pipeline, STEPS, **options)
    network = probed.denoiser.model
    for column in "abst":
        torch.testing.assert_close(getattr(without.table, column), getattr(probed.table, column), rtol=1e-5, atol=1e-6)
    assert without.event_shape == probed.event_shape
    assert needs.unknown is None and needs.network == weight_bytes(network, torch.bfloat16)
    assert needs.decoder == weight_bytes(family.pipeline.vae)
    encoders = {part: model for part, model in family.pipeline.components.items() if part.startswith("text_encoder")}
    assert needs.encoders == {part: weight_bytes(model) for part, model in encoders.items() if model is not None}
    assert needs.states == 10 * 4 * torch.Size(probed.event_shape).numel()

    add_lora(network, RANK, Noise(0))
    adapters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert needs.trained == 4 * 4 * adapters
    parts = [probed.denoiser, WithoutAdapter(probed.denoiser)]
    longest = max(range(2), key=lambda i: len(family.prompts[i])) if family.prompts else 0

    def called(n):
        x = torch.zeros(n, *probed.event_shape, requires_grad=True)
        return [u(x, torch.full((n,), 500.0), prompt=torch.full((n,), longest)) for u in parts]

    assert needs.activations == 6 * saved_per_sample(called)[0] > 0

    def decoded(n):
        return probed.decoder.decode(torch.zeros(n, *probed.event_shape, requires_grad=True))

    counted = 3 * saved_per_sample(decoded)[0]  # of the four that end together, the first is decoded by itself
    assert (1 - LESS.get(name, 0)) * counted <= needs.decoding <= counted


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return saved(FAST, tmp_path_factory.mktemp("flux"))


def test_what_cannot_be_read_without_numbers_is_said(flux):
    """A call that fails: weights are known, states and activations are not."""
    family, checkpoint = flux
    options = {"prompts": family.prompts} | family.call | {"max_sequence_length": 10_000}
    needs = needs_of_pipeline(
        checkpoint,
        Training(samples=2, events=3, adapt=lambda network: add_lora(network, RANK, Noise(0))),
        STEPS,
        **options,
    )
    assert needs.states is None and needs.activations is None and needs.training > needs.network > 0
    assert "states and activations are not known, and not counted: the pipeline cannot be read" in str(needs)


class Reads(torch.nn.Module):
    """Reads numbers, and attends: where something is not finite, to nothing."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x, t=None):
        if not x.isfinite().all():
            raise ValueError("not finite")
        q, k, v = (self.layer(x).unflatten(2, (2, 4)).transpose(1, 2) for _ in range(3))
        return torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v).transpose(1, 2).flatten(2)


def test_a_network_without_numbers_keeps_what_it_keeps_with_them():
    network, meta = Reads(), Reads().to("meta")
    expected = saved_per_sample(lambda n: network(torch.zeros(n, 50, 8, requires_grad=True)))
    with without_numbers():
        ours = saved_per_sample(lambda n: meta(torch.zeros(n, 50, 8, device="meta", requires_grad=True)))
        network(torch.ones(2, 5, 8)).sum().backward()  # others are as they were
        meta(torch.zeros(2, 5, 8, device="meta", requires_grad=True)).sum().backward()
        assert network.layer.weight.grad.abs().sum() > 0 and meta.layer.weight.grad.shape == (8, 8)
    assert ours == expected and ours[0] < 50 * 50 * 4 * 2  # not the matrix of attention


def test_a_hollow_network_answers_zeros():
    network = Reads().to("meta")
    hollow(network)
    answer = network(torch.ones(2, 5, 8))
    assert answer.shape == (2, 5, 8) and answer.device.type == "cpu" and not answer.any()
    assert not network.layer(torch.ones(2, 8)).any()  # a part that is called by itself
    with without_numbers():
        assert network(torch.ones(2, 5, 8, device="meta")).is_meta


def test_what_is_asked_for_counts():
    """Adapters or all weights, half precision, shares."""
    numbers, adapters, x = 72, 2 * RANK * 8, torch.zeros(3, 50, 8)
    parts = [Reads(), Reads().requires_grad_(False)]
    two = saved_per_sample(lambda n: [u(torch.zeros(n, 50, 8, requires_grad=True)) for u in parts])[0]

    def adapt(network):
        add_lora(network, RANK, Noise(0), ["layer"])

    def needs(**changes):
        network = Reads().to("meta")

        def called(u, n):
            return u(torch.zeros(n, 50, 8, device="meta", requires_grad=True), torch.zeros(n, device="meta"))

        call = Call(network, called, (50, 8))
        return needs_of_network(network, call, Training(samples=6, events=10, **changes))

    light, whole = needs(adapt=adapt, kept=torch.bfloat16, half=True), needs(shares=2)
    assert (light.network, light.trained) == (2 * numbers, 4 * 4 * adapters)
    assert (whole.network, whole.trained) == (2 * 4 * numbers // 2, 3 * 4 * numbers // 2)
    assert light.states == whole.states == 10 * x[0].nbytes
    assert whole.activations == 6 * two
    assert needs(adapt=adapt).activations == 2 * light.activations > 6 * two  # adapters keep more
