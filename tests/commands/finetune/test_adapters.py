"""--lora-alpha and --init-lora: what is trained, what it is compared with, and what is written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.problem.adapters import export_adapters, for_comfyui
from implicit_diffusion.commands.finetune.problem.fitting import needs_of
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.denoisers.conditions import ClassifierFree
from implicit_diffusion.denoisers.lora import add_lora, merged
from implicit_diffusion.denoisers.low_rank import adapter_of
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.models.adapters.saving import save_adapter
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import adapter_cases, tiny

TINY = ["finetune", "--num-steps", "3", "--batch", "2", "--updates", "2", "--starts", "4", "--kl-weight", "0.1"]
BRIGHT = "def bright(images): return 50 * images.flatten(1).mean(1)"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a reward, and adapters of rank 2 and α = 3: by themselves in "lora", and merged in "merged"."""
    made = tmp_path_factory.mktemp("place")
    tiny.class_conditional(made / "model", classes=None)
    (made / "rewards.py").write_text(BRIGHT)
    pretrained = load_pretrained(made / "model")
    add_lora(pretrained.denoiser.model, 2, Noise(0), alpha=3.0)
    adapter_cases.move(pretrained.denoiser.model)
    save_adapter(made / "lora", pretrained.denoiser, None, "unet")
    save_pipeline(made / "merged", merged(pretrained.denoiser), pretrained.scheduler, "# Merged")
    return made


def tuned(place, out, *options):
    given = ["--model", str(place / "model"), "--reward", f"{place}/rewards.py:bright", "--out", str(place / out)]
    return main([*TINY, *given, *options])


def content(place, run, name="summary"):
    return json.loads((place / run / f"{name}.json").read_text())


def spec_of(place, **changes):
    options = {"model": str(place / "model"), "reward": f"{place}/rewards.py:bright", "num_steps": 3, "kl_weight": 0.1}
    return setup_spec(Config(**options | changes))


def test_the_reference_is_the_network_without_the_adapter(place):
    """The path KL at the start is that between two networks of their own: the merged one and the original."""
    chain = setup.build(spec_of(place, init_lora=place / "lora")).chain
    own, plain = (load_pretrained(place / each).denoiser for each in ("merged", "model"))
    apart = Chain(own, chain.table, chain.event_shape, reference=plain, pretrained_rows=chain.pretrained_rows)
    reward = setup.build(spec_of(place)).reward
    ours, theirs = (evaluate(each, reward, Noise(1), starts=8) for each in (chain, apart))
    torch.testing.assert_close(ours.path_kl, theirs.path_kl, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.reward, theirs.reward, rtol=1e-4, atol=1e-4)
    assert ours.path_kl.mean() > 1e-4
    new = setup.build(spec_of(place, lora_rank=2)).chain
    assert not evaluate(new, reward, Noise(1), starts=8).path_kl.any()


@pytest.mark.slow
def test_training_goes_on_where_the_adapter_is(place, capsys):
    """With steps of nothing the second run ends as the first did, judged against the same pretrained model."""
    assert tuned(place, "first", "--lora-rank", "2", "--lora-alpha", "3", "--lr", "0.05") == 0
    assert tuned(place, "second", "--init-lora", str(place / "first" / "model" / "lora"), "--lr", "1e-12") == 0
    assert "peft.PeftModel" in capsys.readouterr().out
    first, second = (content(place, run) for run in ("first", "second"))
    assert second["path_kl"] == pytest.approx(first["path_kl"], rel=1e-4) and first["path_kl"] > 1e-4
    for name in ("reward_before", "reward_after"):
        assert second[name] == pytest.approx(first[name], rel=1e-4)
    config = content(place, "second", "config")
    assert (config["lora_rank"], config["lora_alpha"]) == (2, 3.0)
    assert "of rank 2 and α = 3" in (place / "second" / "model" / "README.md").read_text()
    name = "model/lora/adapter_model.safetensors"
    ours, theirs = (load_file(place / run / name) for run in ("second", "first"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-10)
    assert "initial adapter" in (place / "second" / "provenance.json").read_text()


@pytest.mark.slow
def test_the_adapters_layers_are_trained_and_the_prediction_knows_them(place):
    spec = spec_of(place, init_lora=place / "lora")
    made = setup.build(spec)
    adapter = adapter_of(made.pretrained.denoiser)
    assert (adapter.rank, adapter.alpha) == (2, 3.0)
    asked, own = (needs_of(s, s.flight) for s in (spec, spec_of(place, lora_rank=2)))
    assert asked == own


def test_the_plan_does_not_depend_on_the_adapter(place):
    with_one = Config(model=str(place / "model"), init_lora=place / "lora")
    without = replace(with_one, init_lora=None)
    assert inputs(with_one).keys() - inputs(without).keys() == {"initial adapter"}
    made = setup.build(spec_of(place))
    facts = [planning.what_it_depends_on(made, 4, inputs(config)) for config in (with_one, without)]
    assert facts[0] == facts[1]


@pytest.fixture(scope="module")
def bad(place):
    """Folders with adapters that do not fit, by name."""
    lora = place / "lora"
    config = (lora / "adapter_config.json").read_text()
    state = load_file(lora / "adapter_model.safetensors")
    name = next(iter(state))
    changed = {
        "other": {key.replace("attentions.0", "attentions.7"): weight for key, weight in state.items()},
        "nan": state | {name: state[name] * torch.nan},
        "damaged": state,
        "zero": state,
        "whole": state,
    }
    for folder, entries in changed.items():
        (place / folder).mkdir()
        save_file(entries, place / folder / "adapter_model.safetensors")
        (place / folder / "adapter_config.json").write_text(config)
    (place / "zero" / "adapter_config.json").write_text(json.dumps(json.loads(config) | {"lora_alpha": 0}))
    (place / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    (place / "pickled").mkdir()
    (place / "pickled" / "adapter_model.bin").write_bytes(b"nothing")
    return place


BAD = {
    "--lora-alpha must be positive": ("--lora-rank", "2", "--lora-alpha", "0"),
    "--lora-alpha must be positive and finite, got -1": ("--lora-rank", "2", "--lora-alpha", "-1"),
    "--lora-alpha needs --lora-rank": ("--lora-alpha", "2"),
    "its rank is 2, not --lora-rank 8": ("--init-lora", "{}/whole", "--lora-rank", "8"),
    "its alpha is 3, not --lora-alpha 2": ("--init-lora", "{}/whole", "--lora-alpha", "2"),
    "which --lora-targets leaves out": ("--init-lora", "{}/whole", "--lora-targets", "to_q"),
    "it does not adapt conv1, which --lora-targets names": (
        *("--init-lora", "{}/whole"),
        *("--lora-targets", "to_q,to_k,to_v,to_out.0,conv1"),
    ),
    "attentions.7": ("--init-lora", "{}/other"),
    "holds NaN or infinity": ("--init-lora", "{}/nan"),
    "is damaged": ("--init-lora", "{}/damaged"),
    "lora_alpha must be positive and finite, got 0": ("--init-lora", "{}/zero"),
    "holds a pickle, adapter_model.bin": ("--init-lora", "{}/pickled"),
    "nowhere": ("--init-lora", "{}/nowhere"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line_before_any_work(message, bad, capsys, monkeypatch):
    monkeypatch.setattr(planning, "evaluate_pretrained", lambda *arguments, **options: pytest.fail("the plan was made"))
    assert tuned(bad, "refused", *(word.format(bad) for word in BAD[message])) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and not (bad / "refused").exists()
    assert "--init-lora" not in BAD[message] or str(bad) in line


def test_both_files_are_written_of_a_denoiser_under_guidance(tmp_path):
    pretrained = load_pretrained(tiny.stable_diffusion(tmp_path))
    add_lora(pretrained.denoiser.model, 2, Noise(0), alpha=3.0)
    model = ClassifierFree(pretrained.denoiser, 2.0, {"prompt": 0})
    export_adapters(tmp_path / "out", model, pretrained.family, for_comfyui(model, pretrained.family))
    own = load_file(tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(load_file(tmp_path / "out" / "lora-comfyui.safetensors")) == 1.5 * len(own) > 0


def test_flags_that_agree_are_accepted(place):
    network = replace(
        spec_of(place, init_lora=place / "lora", lora_rank=2, lora_alpha=3.0).network,
        lora_targets="to_q,to_k,to_v,to_out.0",
    )
    assert network.adapted and adapter_of(setup.build(replace(spec_of(place), network=network)).pretrained.denoiser)
