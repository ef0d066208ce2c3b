"""Frozen weights in half precision: the bytes of half precision, and to the last bit the numbers of float32."""

from functools import cache

import pytest
import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.specs import setup_spec, training_spec
from implicit_diffusion.commands.finetune.training import make_loop
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.half_weights import read_in_single
from implicit_diffusion.denoisers.lora import add_lora, checkpoint_activations, merged
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.gradients.footprint import saved_per_sample
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from tests.helpers import tiny

CASES = {"stable_diffusion": torch.bfloat16, "stable_diffusion_3": torch.bfloat16, "dit": torch.float16}


def halved(folder, dtype):
    """A folder whose network was saved in half precision."""
    pretrained = load_pretrained(folder)
    pretrained.denoiser.model.to(dtype).save_pretrained(folder / pretrained.family.part)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("half")
    return cache(lambda kind: halved(getattr(tiny, kind)(made / kind), CASES[kind]))


def moved(model, **options):
    """A checkpoint with adapters away from zero."""
    pretrained = load_pretrained(model, **options)
    add_lora(pretrained.denoiser.model, 2, Noise(0))
    g = torch.Generator().manual_seed(0)
    for p in pretrained.denoiser.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    return pretrained


def given(pretrained):
    """x, t and a condition for two samples."""
    g, config = torch.Generator().manual_seed(1), pretrained.denoiser.model.config
    x, t = torch.randn(2, *pretrained.event_shape, generator=g), torch.tensor([3.0, 500.0])
    if pretrained.num_classes:
        return x, t, {"class_labels": torch.tensor([1, 2])}
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    condition = {"encoder_hidden_states": torch.randn(2, 5, width, generator=g)}
    if "pooled_projections" in pretrained.family.embeddings:
        condition["pooled_projections"] = torch.randn(2, config.pooled_projection_dim, generator=g)
    return x, t, condition


def answers(pretrained, precision):
    """u, and the gradients of its square in x and in the adapters."""
    x, t, condition = given(pretrained)
    pretrained.denoiser.precision = precision
    trained = [p for p in pretrained.denoiser.parameters() if p.requires_grad]
    u = pretrained.denoiser(x.requires_grad_(), t, **condition)
    return [u.detach(), *torch.autograd.grad(u.square().sum(), [x, *trained])]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "dit")) for kind in CASES])
def test_u_and_its_gradients_are_those_in_float32_to_the_bit(folders, kind):
    half, single = moved(folders(kind), frozen=True), moved(folders(kind))
    for name, p in half.denoiser.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else CASES[kind]), name
    assert all(p.dtype == torch.float32 for p in single.denoiser.parameters())
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(half.denoiser.model)
            checkpoint_activations(single.denoiser.model)
        for precision in (None, torch.bfloat16, torch.float16):
            for ours, theirs in zip(answers(half, precision), answers(single, precision), strict=True):
                assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    half.denoiser.precision = single.denoiser.precision = None
    ours, theirs = merged(half.denoiser), merged(single.denoiser)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert [type(layer) for layer in ours.modules()] == [type(layer) for layer in theirs.modules()]


def test_autograd_keeps_no_copy_of_the_weights_in_float32():
    """What is saved for one sample, beyond what each further sample adds, is less than one float32 weight."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 64, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, 512))
    read_in_single(network.bfloat16())
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(torch.zeros(2, 4, 2, 2, requires_grad=True))
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert {x.untyped_storage().data_ptr() for x in saved} <= weights and saved
    assert saved_per_sample(lambda n: network(torch.zeros(n, 4, 2, 2, requires_grad=True)))[0] == 0


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}, {"stride": 2}])
def test_convolutions_of_every_kind_are_those_of_float32(padding):
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(4, 6, 3, groups=2, **padding)
    layer.weight.data, layer.bias.data = (torch.randn(p.shape, generator=g).bfloat16() for p in layer.parameters())
    single = torch.nn.Conv2d(4, 6, 3, groups=2, **padding)
    single.load_state_dict({name: p.float() for name, p in layer.state_dict().items()})
    read_in_single(layer)
    x = torch.randn(2, 4, 8, 8, generator=g, requires_grad=True)
    ours, theirs = layer(x), single(x)
    weight = torch.randn(ours.shape, generator=g)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)))


def test_only_what_was_saved_whole_in_half_precision_stays_in_it(tmp_path):
    """A network of which one weight is in float32 is loaded in float32; one of pixels always."""
    folder = halved(tiny.stable_diffusion(tmp_path / "sd"), torch.bfloat16)
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = weights["conv_in.bias"].float()
    save_file(weights, path, metadata={"format": "pt"})
    pixels = halved(tiny.class_conditional(tmp_path / "pixels"), torch.bfloat16)
    for model in (folder, pixels):
        assert {p.dtype for p in load_pretrained(model, frozen=True).denoiser.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_run_starts_at_a_path_kl_of_zero_with_half_the_weights(folders, tmp_path):
    """u_θ and u_0 are one computation, on weights of half the bytes, in every precision."""
    (tmp_path / "prompts.txt").write_text("a cat\nred dog\n")
    (tmp_path / "rewards.py").write_text("def red(images): return images[:, 0].flatten(1).mean(1)")
    options = {"model": str(folders("stable_diffusion_3")), "prompts": tmp_path / "prompts.txt", "num_steps": 3}
    options |= {"reward": f"{tmp_path}/rewards.py:red", "kl_weight": 1.0, "stride": 3, "batch": 2, "lora_rank": 2}
    resident = {}
    for precision in ("float32", "bf16"):
        config = Config(**options, precision=precision)
        made = setup.build(setup_spec(config))
        assert made.chain.dtype == torch.float32
        result = evaluate(made.chain, made.reward, Noise(1), starts=2, repeats=2)
        assert result.path_kl.dtype == torch.float32 and not result.path_kl.any()
        resident[precision] = predict_memory(make_loop(training_spec(config), made, 1.0)).resident
    network = made.chain.denoiser
    half = sum(p.nbytes for p in network.parameters() if not p.requires_grad)
    assert half == 2 * sum(p.numel() for p in network.parameters() if not p.requires_grad)
    weights = sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
    embeddings = sum(column.nbytes for column in made.conditioning.table.columns.values())  # which stay on the device
    assert resident["float32"] == resident["bf16"] == weights + embeddings


def test_a_network_in_half_precision_is_no_denoiser_that_reads_in_single():
    """Without the mark a network of half precision is called in its own, as ever."""
    network = DiffusersDenoiser(tiny.unet().bfloat16())
    assert network(torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), torch.zeros(1)).dtype == torch.bfloat16
