"""What cannot fit is refused by configs and headers alone, before any weight is read."""

import re
from dataclasses import replace

import pytest
import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.problem.fitting import check_fit, needs_of
from implicit_diffusion.commands.finetune.specs import setup_spec, training_spec
from implicit_diffusion.commands.finetune.training import make_loop
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import MemoryLimitError
from implicit_diffusion.gradients.footprint import saved_per_sample
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.loops.unread.needs import Needs, check_needs, weight_bytes
from implicit_diffusion.models.pretrained import load_pretrained
from tests.helpers import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = tmp_path_factory.mktemp("place")
    folder = tiny.stable_diffusion_3(made)
    network = load_pretrained(folder).denoiser.model
    network.to(torch.bfloat16).save_pretrained(folder / "transformer")
    (made / "prompts.txt").write_text("a cat\nred dog\n")
    (made / "rewards.py").write_text("def red(images): return images[:, 0].flatten(1).mean(1)")
    return made


def config_of(place, **changes):
    words = {"model": str(place / "model"), "prompts": place / "prompts.txt", "reward": f"{place}/rewards.py:red"}
    return Config(**words, num_steps=4, kl_weight=1.0, batch=2, guidance=1.0, **changes)


def needs(place, **changes):
    spec = setup_spec(config_of(place, **changes))
    return needs_of(spec, spec.flight)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lora_rank": 2, "stride": 2}, {"stride": 1}, {"lora_rank": 2, "loop": "nested"}])
def test_needs_are_those_of_the_loop_without_its_weights(place, options):
    """Weights, moments and states exactly; activations to those of the longer prompts and of the decoder."""
    config = config_of(place, **options)
    asked = needs(place, **options)
    made = setup.build(setup_spec(config))
    loop = make_loop(training_spec(config), made, 1.0)
    predicted = predict_memory(loop)
    assert asked.states == predicted.states
    parts = made.chain.denoiser if "lora_rank" in options else [made.chain.denoiser, made.chain.reference]
    held = {id(x): x.nbytes for part in torch.nn.ModuleList(parts if isinstance(parts, list) else [parts]).modules()
            for x in (*part.parameters(recurse=False), *part.buffers(recurse=False))}  # fmt: skip
    trained = sum(p.nbytes for p in loop.update.parameters if p.requires_grad)
    buffers = sum(b.nbytes for b in made.chain.denoiser.buffers())
    adapters = trained if "lora_rank" in options else 0
    assert asked.network == pytest.approx(sum(held.values()) - adapters, abs=2 * buffers)
    assert asked.trained == 3 * trained + adapters
    assert asked.decoder == weight_bytes(made.pretrained.decoder)
    assert 0 < asked.activations <= predicted.activations


def test_encoders_count_by_the_largest(place):
    pipeline = load_pretrained(place / "model").pipeline
    sizes = [weight_bytes(getattr(pipeline, part)) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    asked = needs(place, lora_rank=2)
    assert list(asked.encoders.values()) == sizes and asked.encoder == max(sizes) < sum(sizes)


def test_half_precision_and_checkpointing_need_less(place):
    plain, half = (needs(place, lora_rank=2, precision=precision) for precision in ("float32", "bf16"))
    assert half == replace(plain, activations=plain.activations // 2)
    assert needs(place, lora_rank=2, gradient_checkpointing=True).activations < plain.activations
    whole = needs(place)
    assert whole.network > 3.9 * plain.network  # θ and u_0, in float32 each, against bfloat16


def test_what_cannot_fit_is_refused_and_no_weight_is_read(place, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**4}))
    monkeypatch.setattr("implicit_diffusion.models.parts._load", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(MemoryLimitError, match=r"cpu has 10 kB free.*at least .*network .*have not been read"):
        setup.build(setup_spec(config_of(place, lora_rank=2)))


def test_a_decoder_counts_where_a_gradient_goes_through_it(place):
    """In pieces of as many samples as it decodes together, at the size that is asked for."""
    decoder = load_pretrained(place / "model").decoder

    def bytes_at(side, together):
        def decode(n):
            return decoder.decode(torch.zeros(n, 4, side, side, requires_grad=True))

        return together * saved_per_sample(decode)[0]

    side = load_pretrained(place / "model").event_shape[-1]
    assert needs(place, lora_rank=2).decoding == bytes_at(side, 2) > 0
    small, more = (needs(place, lora_rank=2, size=(decoder.factor * n,) * 2) for n in (side // 2, side))
    assert small.decoding == bytes_at(side // 2, 2) < more.decoding
    assert needs(place, lora_rank=2, estimator="score").decoding == 0


def test_a_refusal_names_the_decoder():
    asked = Needs(network=40, trained=8, states=5, activations=10, decoder=2, decoding=50)
    assert (asked.training, replace(asked, decoding=9).training) == (105, 65)  # of two that do not come together
    with pytest.raises(MemoryLimitError, match=r"decoding 50 B\).*smaller samples.*kept by the decoder"):
        check_needs(asked, CPU, {"cpu": 104})
    check_needs(asked, CPU, {"cpu": 105})
    unknown = replace(asked, decoding=None, unknown="why")
    assert unknown.note == "decoding are not known, and not counted: why"


def test_devices_and_host_are_asked_for_what_comes_to_them():
    asked = Needs(network=40, trained=8, states=5, activations=10, decoder=2, encoders={"t5": 60, "clip": 7})
    assert (asked.training, asked.device, asked.host, asked.alone) == (65, 65, 102, 102)
    heavy = replace(asked, encoders={"t5": 80})
    assert (heavy.device, heavy.host, heavy.alone) == (80, 122, 122)
    check_needs(asked, GPU, {"cuda": 65, "cpu": 102})
    check_needs(asked, GPU, {"cuda": None, "cpu": 102})
    for free, said in (({"cuda": 64, "cpu": 200}, "cuda has 64 B free"), ({"cuda": 65, "cpu": 101}, "cpu has 101 B")):
        with pytest.raises(MemoryLimitError, match=said):
            check_needs(asked, GPU, free)
    with pytest.raises(MemoryLimitError, match="at least 102 B"):
        check_needs(asked, CPU, {"cpu": 101})


def test_what_is_not_known_is_said(place, monkeypatch, capsys):
    """A network that cannot be evaluated without numbers: weights are counted, and the run says what is not."""
    monkeypatch.setattr(DiffusersDenoiser, "forward", lambda *a, **k: int(a[1].sum().tolist()[0]))
    config = config_of(place, lora_rank=2)
    spec = setup_spec(config)
    asked = needs(place, lora_rank=2)
    assert (
        asked.activations is None
        and asked.states
        and asked.training == asked.network + asked.trained + asked.states + asked.decoder + asked.decoding
    )
    assert "activations are not known, and not counted: the network cannot be evaluated without numbers (" in str(asked)
    check_fit(spec, spec.flight, CPU)
    assert re.search(r"^memory before loading: network .*; activations are not known", capsys.readouterr().out)
    free = {"cpu": asked.alone - 1}
    with pytest.raises(MemoryLimitError, match="activations are not known, and not counted"):
        check_needs(asked, CPU, free)
