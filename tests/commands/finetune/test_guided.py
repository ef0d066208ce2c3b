"""`finetune --guidance w --student-guidance 1`, from the command line to plain diffusers without guidance."""

import json
import re

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import guidance, planning, training
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.finished import TiltSpec, load_tilt
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.denoisers import ClassifierFree
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from tests.helpers import tiny, tiny_pipelines
from tests.helpers.stops import interrupt_at

TINY = ["finetune", "--num-steps", "3", "--batch", "2", "--updates", "2", "--starts", "4", "--lr", "1e-4"]
TINY += ["--kl-weight", "2.5", "--student-guidance", "1"]
REWARDS = """
def red(images, prompts):
    return 50 * images[:, 0].flatten(1).mean(1)
def label(images, labels):
    return images.flatten(1).mean(1) * (labels + 1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = tmp_path_factory.mktemp("place")
    tiny.class_conditional(made / "classes", **tiny.PLAIN)
    (made / "rewards.py").write_text(REWARDS)
    (made / "prompts.txt").write_text("a cat\nred dog\n")
    return made


def words(place, options):
    return [option.format(place=place) for option in options]


CLASSES = ("--model", "{place}/classes", "--reward", "{place}/rewards.py:label", "--null-class", "0", "--guidance", "3")
TEXT = ("--model", "{place}/sd/model", "--prompts", "{place}/prompts.txt", "--reward", "{place}/rewards.py:red")


def classes(place, **changes):
    given = {"model": str(place / "classes"), "reward": f"{place}/rewards.py:label", "null_class": 0, "num_steps": 3}
    return Config(**given | {"guidance": 3.0, "student_guidance": 1.0} | changes)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classes"
    assert main([*TINY, "--out", str(out), *words(place, CLASSES)]) == 0
    return out


@pytest.mark.slow
def test_the_numbers_of_a_run_count_from_where_it_begins(run, capsys):
    summary, config, chain, cost = (
        json.loads((run / f"{name}.json").read_text()) for name in ("summary", "config", "model/chain", "guidance")
    )
    begun, beta = summary["untrained"], summary["kl_weight"]
    assert begun["path_kl"] > 1 and summary["path_kl"] > 1
    assert begun["j"] == pytest.approx(beta * begun["path_kl"] - begun["reward"], rel=1e-5)
    assert begun["j_above"] == pytest.approx(begun["j"] - summary["j_before"], rel=1e-5)
    assert summary["j_before"] == pytest.approx(-summary["reward_before"])
    assert summary["j_fall"] == pytest.approx(begun["j"] - summary["j_after"], rel=1e-4)
    assert summary["j_possible"] == pytest.approx(begun["j"] - summary["j_bound"], rel=1e-2)
    assert summary["captured"] == pytest.approx(summary["j_fall"] / summary["j_possible"], rel=1e-5)
    assert (config["guidance"], config["student_guidance"], chain["guidance"]) == (3.0, 1.0, 1.0)
    assert [row["guidance"] for row in cost["norms"]] == [1.0, 2.0, 3.0, 5.0] and cost["path_kl"] > 1
    page, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    assert "What guidance cost at the start" in page and re.search(r">untrained<", page)
    assert "guidance 1," in card and "that of the pretrained model was 3" in card
    assert "torch.full_like" not in card.split("```python\n")[1]  # one call of the network
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "untrained reward" in printed and "nats: the cost of guidance; J" in printed


@pytest.mark.slow
def test_the_exported_network_needs_no_guidance(run, tmp_path):
    """The program of the card draws what the exported chain draws, and `sample` what chain.json holds."""
    assert main(["sample", "--model", str(run / "model"), "--num", "2", "--out", str(tmp_path / "grid.png")]) == 0
    program = (run / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space = {}
    with torch.no_grad():
        exec(program.replace("this folder", str(run / "model")), space)
    assert space["x"].isfinite().all()
    exported = load_pretrained(run / "model")
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([400, 400]), torch.tensor([1, 2])
    with torch.no_grad():
        theirs = space["pipeline"].unet(x, 400, class_labels=labels).sample
        torch.testing.assert_close(exported.denoiser(x, t, class_labels=labels), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 2])
def test_the_chain_of_a_setup(place, lora):
    """Guided u_0, plain u_θ, the untrained chain between them; with adapters and without."""
    made = setup.build(setup_spec(classes(place, lora_rank=lora)))
    chain, network = made.chain, made.pretrained.denoiser
    assert chain.denoiser is network and made.guidance == 3.0 and made.student_guidance == 1.0
    guided = ClassifierFree(network, 3.0, {"class_labels": 0})  # before training the weights are the same
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([300, 700]), {"class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        torch.testing.assert_close(chain.reference(x, t, **labels), guided(x, t, **labels))
        begun = evaluate(made.untrained, made.reward, Noise(0), starts=2)
        torch.testing.assert_close(begun.path_kl, evaluate(chain, made.reward, Noise(0), starts=2).path_kl)
        assert begun.path_kl.min() > 0.1
        for p in network.parameters():
            p += p.requires_grad * 0.1
        torch.testing.assert_close(evaluate(made.untrained, made.reward, Noise(0), starts=2).path_kl, begun.path_kl)
        assert not torch.equal(evaluate(chain, made.reward, Noise(0), starts=2).path_kl, begun.path_kl)
    same = setup.build(setup_spec(classes(place, lora_rank=lora, student_guidance=None)))
    assert same.untrained is None and same.student_guidance == 3.0
    alone = setup.build(setup_spec(classes(place, lora_rank=lora, guidance=1.0)))
    assert guidance.measure(alone, 2.0, batch=2, depth=None, max_grad_norm=1.0) is None


@pytest.mark.slow
def test_the_cost_is_a_square_of_the_scale_and_gamma_a_polynomial(place):
    """‖Γ‖ of the path KL is |w − 1| times a straight line's norm; nothing of θ, gradients or noise is left changed."""
    made = setup.build(setup_spec(classes(place)))
    weights = [p.detach().clone() for p in made.pretrained.denoiser.parameters()]
    cost = guidance.measure(made, 2.0, batch=2, depth=None, max_grad_norm=1.0)
    kls = {row.guidance: row.path_kl for row in cost.norms}
    assert kls[5.0] == pytest.approx(4 * kls[3.0]) and kls[2.0] == pytest.approx(kls[3.0] / 4) and kls[1.0] == 0
    assert kls[3.0] == pytest.approx(cost.path_kl.mean)
    first, *_ = cost.norms
    assert first.of_path_kl == pytest.approx(0.0, abs=1e-6) and first.student == pytest.approx(first.guided, rel=1e-5)
    trained = list(made.pretrained.denoiser.parameters())

    def of_path_kl(scale):
        from implicit_diffusion.gradients import Adjoint
        from implicit_diffusion.objectives import PathKL

        noise = made.spec.noise.stream(setup.PLAN, 2)
        Adjoint()(made.under(scale, 1.0), 2.0 * PathKL(), noise, 2)
        gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).double()
        made.pretrained.denoiser.zero_grad()
        return gradient

    half, whole, double = map(of_path_kl, (2.0, 3.0, 5.0))
    # (w − 1) A + (w − 1)² B at 1, 2, 4 times the way: the third follows from two
    expected = 4 * (2 * half - whole / 2) + 16 * (whole - 2 * half) / 2
    torch.testing.assert_close(double, expected, rtol=1e-2, atol=1e-3 * double.abs().max().item())
    assert {row.guidance: row.of_path_kl for row in cost.norms}[3.0] == pytest.approx(whole.norm().item(), rel=1e-4)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(trained, weights))


def cost(*norms, student=True, max_grad_norm=1.0):
    begun = Estimate(5.0, 0.1), Estimate(1.0, 0.1)
    return guidance.Cost(
        3.0,
        1.0 if student else 3.0,
        0.5,
        max_grad_norm,
        *(begun if student else (Estimate(0.0, 0.0), None)),
        list(norms),
    )


def test_advice_is_given_where_guidance_blows_the_gradient_up():
    plain, rows = guidance.Norms(1.0, 2.0, 2.0, 0.0, 0.0), (3.0, 50.0, 48.0, 5.0)
    (sentence,) = cost(plain, guidance.Norms(3.0, *rows[:1], *rows[1:])).advice
    assert "50 times as large as --max-grad-norm" in sentence and "--guidance 2 and then" in sentence
    assert not cost(plain, guidance.Norms(3.0, *rows), max_grad_norm=60.0).advice  # nothing is scaled down
    assert not cost(guidance.Norms(1.0, 20.0, 20.0, 0.0, 0.0), guidance.Norms(3.0, *rows)).advice  # it is the reward's
    calm, blown = (guidance.Norms(3.0, norm, None, None, None) for norm in (15.0, 25.0))
    lone = guidance.Norms(1.0, 2.0, None, None, None)
    assert not cost(lone, calm, student=False).advice
    (sentence,) = cost(lone, blown, student=False).advice
    assert "12.5 times" in sentence and "--student-guidance 1" in sentence
    assert not cost().advice


BAD = {
    "--student-guidance: digits is unconditional": ("--model", "digits"),
    "--guidance needs --null-class": (*CLASSES[:4], "--guidance", "3"),
    "--student-guidance needs --penalty path-kl": (*CLASSES, "--penalty", "drift"),
    "--target-kl-mode stop waits": (*CLASSES, "--target-kl", "1", "--target-kl-mode", "stop"),
    "--student-guidance must be": (*CLASSES, "--student-guidance", "-1"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line_before_any_work(message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "evaluate_pretrained", lambda *arguments, **options: pytest.fail("the plan was made"))
    assert main([*TINY, "--out", str(tmp_path / "run"), *words(place, BAD[message])]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_bit(place, run, tmp_path, monkeypatch):
    out = tmp_path / "run"

    with monkeypatch.context() as patched:
        own = training.callbacks
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1), *own(*arguments)])
        assert main([*TINY, "--out", str(out), *words(place, CLASSES)]) == 130
    assert main(["resume", str(out)]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (run / name).read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, run)]
    for key in ("untrained", "j_after", "captured", "path_kl"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.slow
def test_plain_diffusers_draws_the_same_images_without_guidance(place, tmp_path, monkeypatch):
    """Adapters on Stable Diffusion: exported, its pipeline at guidance_scale=1 is the exported chain."""
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "run"
    tiny.stable_diffusion(place / "sd")
    assert main([*TINY, "--out", str(out), *words(place, TEXT), "--guidance", "4", "--lora-rank", "2"]) == 0
    assert "guidance_scale=1)" in (out / "model" / "README.md").read_text()
    given = {"prompts": place / "prompts.txt", "reward": f"{place}/rewards.py:red", "num_steps": 3}
    again = setup.build(setup_spec(Config(model=str(out / "model"), **given)))
    assert again.guidance == 1.0 and again.untrained is None  # by default as it was trained to be sampled
    assert not isinstance(again.chain.denoiser, ClassifierFree)
    chain = again.chain.replace(
        reference=again.chain.denoiser, condition=lambda noise, batch, index: {"prompt": torch.arange(batch) % 2}
    )
    noise = Noise(1)
    with torch.no_grad():
        steps = list(chain.walk(chain.initial(noise, 2), noise))
    drawn = iter([torch.zeros_like(x[0]) if xi is None else xi[0] for _, xi, x in steps])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(drawn))
    pipeline = StableDiffusionPipeline.from_pretrained(out / "model", safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"latents": chain.initial(noise, 2), "output_type": "latent", "num_inference_steps": 3}
    theirs = torch.as_tensor(pipeline(["a cat", "red dog"], guidance_scale=1.0, **options).images)
    torch.testing.assert_close(steps[-1][2][0], theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_run_goes_on_from_its_model_with_the_original_as_reference(place, run, tmp_path, capsys):
    """What the first run has captured stays captured: the second counts from the original as well."""
    out = tmp_path / "further"
    options = ["--model", str(run / "model"), "--reference", str(place / "classes"), *words(place, CLASSES)[2:]]
    assert main([*TINY, "--out", str(out), *options]) == 0
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, out))
    assert first["untrained"]["path_kl"] == pytest.approx(second["untrained"]["path_kl"], rel=1e-4)
    asked = TiltSpec(
        str(out / "model"), (), None, None, None, None, Noise(0), "cpu", trust_reward=True, trust_model=False
    )
    chain = load_tilt(asked, 3).setup.chain  # of `sample --exact`: the same two networks
    assert isinstance(chain.reference, ClassifierFree) and chain.reference.scale == 3
    assert not isinstance(chain.denoiser, ClassifierFree)


def test_options_that_contradict_each_other():
    with pytest.raises(InvalidInputError, match="path-kl"):
        Config(student_guidance=1.0, penalty="drift", kl_weight=1.0).check()


@pytest.mark.slow
def test_a_pipeline_that_is_read_off_is_read_under_both_scales(tmp_path):
    """Guidance is in its network's answers: the guided one is called for both parts, the student for one."""
    place = tmp_path / "xl"
    tiny_pipelines.stable_diffusion_xl(place).pipeline.save_pretrained(place / "model")
    (place / "prompts.txt").write_text("a cat\nred dogs\n")
    given = {"model": str(place / "model"), "prompts": place / "prompts.txt", "num_steps": 3, "guidance": 4.0}
    made = setup.build(setup_spec(Config(**given, student_guidance=1.0, reward="redness", lora_rank=2)))
    chain, network = made.chain, made.pretrained.denoiser
    weights = [[c for call in each.plan.calls for c in call.weights] for each in (network, chain.denoiser)]
    assert [[pytest.approx(c, abs=1e-4) for c in sorted(each)] for each in weights] == [[-3.0, 4.0], [1.0]]
    assert chain.denoiser.model is network.model and made.student_guidance == 1.0
    seen = evaluate(made.untrained, made.reward, Noise(0), starts=2)
    torch.testing.assert_close(evaluate(chain, made.reward, Noise(0), starts=2).path_kl, seen.path_kl)
    assert seen.path_kl.min() > 0
    x, t, which = chain.initial(Noise(0), 2), torch.tensor([500.0, 500.0]), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(chain.reference(x, t, prompt=which), network(x, t, prompt=which))
    cost = guidance.measure(made, 1.0, batch=2, depth=None, max_grad_norm=1.0)
    assert [row.guidance for row in cost.norms] == [1.0, 4.0] and cost.norms[1].of_path_kl > 0
