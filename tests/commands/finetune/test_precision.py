"""What the network computes in, and whether it is compiled: its outputs change by rounding, nothing else changes."""

import pytest
import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.problem.precision import check_precision
from implicit_diffusion.commands.finetune.specs import setup_spec, training_spec
from implicit_diffusion.commands.finetune.training import make_loop
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser, unwrapped
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL
from tests.helpers import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.labelled(tmp_path_factory.mktemp("place"))


def build(place, **options):
    model, reward = str(place / "classes"), f"{place}/rewards.py:label"
    return setup.build(setup_spec(Config(num_steps=4, model=model, reward=reward, **options)))


def predictions(chain):
    """u_θ, u_0 and their x-gradient on the same states."""
    x = chain.initial(Noise(0), 4)[None].requires_grad_()
    with torch.enable_grad():
        here = chain.transition(x, [1], reference=True, condition=chain.conditions(Noise(0), 4, [0]))
        (slope,) = torch.autograd.grad((here.u + here.u0).sum(), x)
    return here.u.detach(), here.u0.detach(), slope


@pytest.mark.slow
def test_bf16_is_the_networks_alone(place):
    half, full = (build(place, precision=precision).chain for precision in ("bf16", "float32"))
    ours, reference, slope = predictions(half)
    assert ours.dtype == reference.dtype == slope.dtype == torch.float32
    assert torch.equal(ours, reference)  # the path KL of the start is zero, not rounding
    theirs = predictions(full)[0]
    assert 1e-5 < (ours - theirs).abs().max() / theirs.abs().max() < 0.05
    assert all(p.dtype == torch.float32 for p in half.denoiser.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "gradient_checkpointing": True}], ids=["", "LoRA"])
def test_a_float16_network_under_guidance_has_the_gradient_of_a_float32_one(place, options):
    """Of small rewards, whose adjoints float16 would lose; u_0 without its adapters is in the same backward pass.

    What is left is the rounding of the predictions, which the path KL takes the difference of.
    """
    gradients = []
    for precision in ("fp16", "float32"):
        made = build(place, precision=precision, guidance=3.0, null_class=0, **options)
        trained = [p for p in made.chain.denoiser.parameters() if p.requires_grad]
        g = torch.Generator().manual_seed(0)
        for p in trained:
            p.data += 0.05 * torch.randn(p.shape, generator=g)
        objective = 1e-6 * (made.reward + PathKL())
        Adjoint()(made.chain, objective, Noise(0), 4)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).double())
    ours, theirs = gradients
    assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.05 * theirs.norm()


def test_devices_that_do_not_compute_in_half_precision_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InvalidInputError, match="Tesla T4 does not compute in bfloat16; use fp16, or float32"):
        check_precision("bf16", torch.device("cuda"))
    cpu = torch.device("cpu")
    assert check_precision("fp16", cpu) is torch.float16 and check_precision("bf16", cpu) is torch.bfloat16
    with (
        monkeypatch.context() as patched,
        pytest.raises(InvalidInputError, match=r"layers return torch.float32\); use"),
    ):
        patched.setattr("torch.nn.functional.conv2d", lambda x, w: x.float() * w)  # autocast that has been switched off
        check_precision("fp16", cpu)
    monkeypatch.setattr("torch.nn.functional.conv2d", lambda *a: (_ for _ in ()).throw(RuntimeError("no kernel")))
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        said = rf"--precision {name}: cpu does not compute in it \(no kernel\); use float32 or {other}"
        with pytest.raises(InvalidInputError, match=said):
            check_precision(name, cpu)


@pytest.mark.slow
def test_checkpointing_keeps_less_and_changes_nothing(tmp_path, place):
    """In four levels; the largest block, which is computed again and counts, is then a small part of the network."""
    levels = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
    tiny.class_conditional(tmp_path / "classes", block_out_channels=(4, 8, 16, 32), **levels)
    (tmp_path / "rewards.py").write_text((place / "rewards.py").read_text())
    memory, outputs = {}, {}
    for checkpointing in (False, True):
        config = Config(num_steps=4, gradient_checkpointing=checkpointing, kl_weight=1.0, stride=1)
        made = build(tmp_path, gradient_checkpointing=checkpointing)
        memory[checkpointing] = predict_memory(make_loop(training_spec(config), made, 1.0)).activations
        outputs[checkpointing] = predictions(made.chain)
    assert memory[True] < 0.5 * memory[False], memory[True] / memory[False]
    for ours, theirs in zip(outputs[True], outputs[False]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_network_of_convolutions_is_channels_last_and_transformers_are_not(tmp_path):
    """u_θ and u_0 of each kind of model, on the command line's way from folder to chain."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "rewards.py").write_text("def bright(x): return x.flatten(1).mean(1)")
    options = {"num_steps": 4, "reward": f"{tmp_path}/rewards.py:bright"}
    words = {"prompts": tmp_path / "prompts.txt"}
    for convolutional, given in (
        (True, {"model": str(tiny.class_conditional(tmp_path / "classes"))}),
        (True, {"model": str(tiny.stable_diffusion(tmp_path / "sd"))} | words),
        (False, {"model": str(tiny.dit(tmp_path / "dit"))}),
    ):
        chain = setup.build(setup_spec(Config(**options, **given))).chain
        for network in (unwrapped(chain.denoiser), unwrapped(chain.reference)):
            weights = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
            wide = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]
            assert wide and all(w.is_contiguous(memory_format=torch.channels_last) == convolutional for w in wide), (
                type(network)
            )


@pytest.mark.parametrize(("half", "full"), [(3.0, 0.5), (0.5, 3.0)])
def test_a_precision_that_the_processor_lacks_is_called_slow(place, monkeypatch, capsys, half, full):
    """By calls in either precision: of what the network computes in while the clock runs."""
    clock, seen = [0.0], []
    forward = DiffusersDenoiser.forward

    def timed(self, x, t, **condition):
        clock[0] += half if self.precision is torch.bfloat16 else full
        seen.append(self.precision)
        return forward(self, x, t, **condition)

    monkeypatch.setattr(DiffusersDenoiser, "forward", timed)
    monkeypatch.setattr("implicit_diffusion.commands.finetune.problem.precision.time.perf_counter", lambda: clock[0])
    chain = build(place, precision="bf16").chain
    said = "precision bfloat16 is 6.0 times slower than float32 (6 s against 1 s a call) on this processor; leave"
    assert (said in capsys.readouterr().out) == (half > full) and {*seen} == {None, torch.bfloat16}
    assert unwrapped(chain.denoiser).precision is unwrapped(chain.reference).precision is torch.bfloat16
    seen.clear()
    build(place)
    assert {*seen} == {None} and "precision" not in capsys.readouterr().out
