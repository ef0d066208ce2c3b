"""Fine-tuning on every kind of chain: defaults, refusals, and folders that sample what they say."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from implicit_diffusion.cli import main
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.table import ChainTable
from tests.helpers.toy_model import folder

TINY = ["--num-steps", "4", "--batch", "2", "--updates", "3", "--starts", "8", "--lr", "1e-3", "--kl-weight", "2.5"]


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("models") / "flow", FlowMatchEulerDiscreteScheduler(shift=2.0))


@pytest.fixture(scope="module")
def flow_run(flow_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *TINY, "--model", flow_model, "--out", str(out)]) == 0
    return out


def read(run):
    return tuple(json.loads((run / name).read_text()) for name in ("config.json", "summary.json", "model/chain.json"))


def test_a_flow_model_is_trained_on_its_memoryless_chain(flow_run):
    config, summary, chain = read(flow_run)
    assert config["scheduler"] == "flow-memoryless"
    assert summary["path_kl"] > 0 and summary["j_bound"] is not None
    assert chain["num_steps"] == 4 and "sde-dpmsolver++" in chain["table"]["name"]
    assert summary["pipeline_is_the_chain"] is True
    assert "4 memoryless flow steps" in (flow_run / "report.html").read_text()


@pytest.fixture(scope="module")
def unusual_run(tmp_path_factory):
    """A flow whose memoryless chain no pipeline of diffusers samples."""
    out = tmp_path_factory.mktemp("unusual")
    model = folder(out / "model", FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    assert main(["finetune", *TINY, "--model", model, "--out", str(out / "run")]) == 0
    return out / "run"


@pytest.mark.slow
def test_a_folder_that_samples_something_else_says_so(unusual_run):
    _, summary, chain = read(unusual_run)
    assert chain["table"]["name"] == "memoryless flow, 4 steps, karras sigmas"
    assert summary["pipeline_is_the_chain"] is False
    assert summary["pipeline"] == "FlowMatchEulerDiscrete, 4 steps, karras sigmas"
    card = (unusual_run / "model" / "README.md").read_text()
    assert "samples another chain" in card and "implicit-diffusion sample" in card
    assert "which is not the chain that was trained" in (unusual_run / "report.html").read_text()


@pytest.mark.slow
def test_the_reward_of_the_export_is_that_of_the_pipeline(unusual_run):
    """`reward_exported` is what the deterministic pipeline earns, not the trained chain."""
    _, summary, _ = read(unusual_run)
    loaded = load_pretrained(unusual_run / "model")
    pipeline = loaded.pipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=400, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(5)
    ).images
    scheduler = loaded.scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and images.shape == (400, 3, 8, 8)
    rewards = 100 * images.flatten(1).mean(1)  # the pipeline clamps: few pixels of this model lie outside
    error = (rewards.std() / 20).item() + summary["reward_exported_se"]
    assert abs(rewards.mean().item() - summary["reward_exported"]) < 4 * error + 1


def test_sample_draws_from_the_trained_chains_own_table(flow_run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["sample", "--model", str(flow_run / "model"), "--num", "1", "--out", str(out)]) == 0
    loaded, (_, _, chain) = load_pretrained(flow_run / "model"), read(flow_run)
    table = ChainTable.from_dict(chain["table"])
    x = Chain(loaded.denoiser, table, loaded.event_shape).sample(Noise(0), 1)
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert np.array_equal(np.asarray(Image.open(out)), expected[0].permute(1, 2, 0).numpy())
    capsys.readouterr()
    more = tmp_path / "more.png"
    assert (
        main(["sample", "--model", str(flow_run / "model"), "--num", "1", "--num-steps", "6", "--out", str(more)]) == 0
    )
    assert "6 steps of the folder's pipeline" in capsys.readouterr().out


@pytest.mark.slow
def test_a_deterministic_flow_needs_another_penalty(flow_model, tmp_path, capsys):
    call = ["finetune", *TINY, "--model", flow_model, "--scheduler", "flow-euler", "--out", str(tmp_path / "run")]
    assert main(call) == 2
    assert "has noise" in capsys.readouterr().err
    assert main([*call, "--penalty", "drift"]) == 0
    _, summary, _ = read(tmp_path / "run")
    assert summary["pipeline_is_the_chain"] is True


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory):
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    return folder(tmp_path_factory.mktemp("models") / "diffusion", scheduler)


@pytest.mark.slow  # test_kinds compares the tables
def test_noisy_kinds_are_ddpm_in_other_words(diffusion_model, tmp_path):
    """The same noise gives the same rewards and path KL, before and after, and folders that draw the chain."""
    runs = {}
    for kind in ("ddpm", "euler-ancestral", "dpm-solver"):
        call = ["finetune", *TINY, "--num-steps", "5", "--model", diffusion_model, "--scheduler", kind]
        assert main([*call, "--out", str(tmp_path / kind)]) == 0
        config, runs[kind], _ = read(tmp_path / kind)
        assert config["scheduler"] == kind and runs[kind]["pipeline_is_the_chain"] is True
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / kind / "model", local_files_only=True)
        assert type(pipeline).__name__ == "DDPMPipeline"
        for name in ("reward_before", "reward_after", "reward_exported", "path_kl"):
            assert runs[kind][name] == pytest.approx(runs["ddpm"][name], rel=0.02, abs=0.02)


@pytest.mark.slow
def test_euler_is_saved_as_first_order_dpm_solver(diffusion_model, tmp_path):
    out = tmp_path / "run"
    options = ["--num-steps", "5", "--scheduler", "euler", "--penalty", "drift", "--out", str(out)]
    options += ["--model", diffusion_model]
    assert main(["finetune", *TINY, *options]) == 0
    _, summary, chain = read(out)
    assert summary["pipeline_is_the_chain"] is True and "eta" not in chain
    assert chain["table"]["initial_std"] == pytest.approx(1, rel=1e-6) and set(chain["table"]["m"]) == {1.0}
    saved = load_pretrained(out / "model").scheduler
    assert isinstance(saved, DPMSolverMultistepScheduler) and saved.config.algorithm_type == "dpmsolver++"
    assert main(["sample", "--model", str(out / "model"), "--num", "2", "--out", str(tmp_path / "grid.png")]) == 0


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [("flow", "ddpm", "is for diffusion models, and this is a flow model"), ("digits", "flow-euler", "is for flow")],
)
def test_kinds_of_the_other_family(model, kind, message, flow_model, tmp_path, capsys):
    name = flow_model if model == "flow" else model
    assert main(["finetune", *TINY, "--model", name, "--scheduler", kind, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["euler-ancestral", pytest.param("dpm-solver", marks=pytest.mark.slow)])
def test_clipping_of_the_checkpoint_is_accounted_for(kind, tmp_path, capsys):
    """The clipped sampler draws the chain's own noise: with a range that never bites nothing changes."""
    model = folder(tmp_path / "model", DDPMScheduler(clip_sample=True, clip_sample_range=1e6))
    call = [
        "finetune",
        *TINY,
        "--num-steps",
        "5",
        "--model",
        model,
        "--scheduler",
        kind,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(call) == 2
    assert "--no-clip" in capsys.readouterr().err
    assert main([*call, "--no-clip"]) == 0
    _, summary, _ = read(tmp_path / "run")
    scale = abs(summary["clipping"]["reward_with_clipping"])
    assert summary["clipping"]["largest_change"] < 1e-3 * scale
