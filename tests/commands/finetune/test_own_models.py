"""Networks of the user's own, FILE.py:factory: trained, judged, saved, sampled and resumed as any model is."""

import json
import runpy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import implicit_diffusion as idf
from implicit_diffusion import cli
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.rewards import trust
from tests.helpers import own_models
from tests.helpers.stops import interrupt_at

SHORT = ["--batch", "4", "--updates", "4", "--starts", "4", "--lr", "0.05", "--kl-weight", "0.5"]
CALLBACKS = training.callbacks


def finetune(home, model, out, *more):
    call = ["finetune", *SHORT, "--model", f"{home}/own.py:{model}", "--reward", f"{home}/own.py:right"]
    return cli.main([*call, "--out", str(out), *map(str, more)])


def json_of(path):
    return json.loads(path.read_text())


def weights_of(run):
    return load_file(run / "model" / "model.safetensors")


def own(home, factory):
    return runpy.run_path(str(home / "own.py"))[factory]()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The file, a whole run of its network and one that was interrupted."""
    home = own_models.home(tmp_path_factory.mktemp("own"))
    assert finetune(home, "net", home / "whole") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(2), *CALLBACKS(*arguments)])
        assert finetune(home, "net", home / "half") == 130
    return home


@pytest.fixture
def copied(home, tmp_path):
    """The same in a place of its own, that is known to be its user's."""
    for name in ("whole", "half"):
        shutil.copytree(home / name, tmp_path / name)
        for file in ("config.json", "provenance.json", "model/factory.json"):
            if (path := tmp_path / name / file).exists():
                path.write_text(path.read_text().replace(str(home), str(tmp_path)))
    own_models.home(tmp_path)
    for factory in ("net", "right"):
        trust.remember(trust.code_of(f"{tmp_path}/own.py:{factory}"))
    return tmp_path


@pytest.fixture
def stranger(copied, monkeypatch):
    """The same before a user who has named nothing."""
    monkeypatch.setattr(trust, "_named", set())
    monkeypatch.setattr(trust, "_allowed", set())
    return copied


def test_the_result_is_a_state_of_the_network_that_the_factory_returns(home):
    run = home / "whole"
    config, summary = json_of(run / "config.json"), json_of(run / "summary.json")
    assert (config["scheduler"], config["num_steps"], config["model"]) == (None, 3, f"{home}/own.py:net")
    assert summary["factory"] == f"{home}/own.py:net" and summary["pipeline_is_the_chain"]
    assert json_of(run / "model" / "factory.json") == {"factory": f"{home}/own.py:net"}
    model, weights = own(home, "net"), weights_of(run)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    model.denoiser.load_state_dict(weights)  # every name, and no other
    assert not torch.equal(weights["last.weight"], before["last.weight"])
    assert json_of(run / "model" / "chain.json")["table"] == idf.tables.ou_reverse_sde(3, 1.5).to_dict()
    assert "3 steps of OU reverse SDE" in (run / "report.html").read_text()
    card = (run / "model" / "README.md").read_text()
    assert "load_state_dict" in card and "diffusers" not in card


def test_the_program_in_the_card_loads_the_trained_network(home, monkeypatch):
    monkeypatch.chdir(home)
    card = (home / "whole" / "model" / "README.md").read_text().replace("'this folder", "'whole/model")
    program = card.partition("```python\n")[2].partition("```")[0]
    namespace = {}
    exec(program, namespace)
    state = namespace["model"].denoiser.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights_of(home / "whole").items())


def test_samples_are_those_of_the_trained_chain(home, tmp_path):
    out = tmp_path / "x.npy"
    words = ["--num", "7", "--seed", "3", "--out", str(out)]
    assert cli.main(["sample", "--model", str(home / "whole/model"), *words]) == 0
    model = own(home, "net")
    model.denoiser.load_state_dict(weights_of(home / "whole"))
    expected = idf.Chain(model.denoiser, model.schedule, (2,)).sample(idf.Noise(3), 7)
    assert np.array_equal(np.load(out), expected.numpy())


def test_a_plan_agrees_with_the_closed_form(tmp_path):
    """x_N given x_0 is N(·, v), and the reward x_1 is linear: J can fall by v/2β."""
    own_models.home(tmp_path)
    assert finetune(tmp_path, "gaussian(rows=4)", tmp_path / "run", "--plan", "--starts", "64") == 0
    mean, variance, drawn = 0.0, 1.0, 0.0
    alpha = lambda t: np.exp(-t)  # noqa: E731
    h = 1.5 / 4
    for t in h * np.arange(4, 0, -1):
        w = alpha(t) ** 2 * 0.5 + 1 - alpha(t) ** 2
        slope = 1 + h - 2 * h / w
        mean, variance, drawn = (
            slope * mean + 2 * h * alpha(t) * 0.5 / w,
            slope**2 * variance + 2 * h,
            slope**2 * drawn + 2 * h,
        )
    plan = json_of(tmp_path / "run" / "plan.json")
    assert abs(plan["reward"] - mean) < 4 * np.sqrt(variance / 1024)
    assert abs(plan["reward_std"] ** 2 / variance - 1) < 4 * np.sqrt(2 / 1024)
    rows = [row for row in plan["rows"] if row["trusted"]]
    assert len(rows) >= 2
    for row in rows:
        assert abs(row["j_gain"] - drawn / (2 * row["kl_weight"])) < 4 * row["j_gain_se"] < row["j_gain"]


def test_an_interrupted_run_goes_on_to_the_bit(copied):
    assert cli.main(["resume", str(copied / "half")]) == 0
    ours, theirs = weights_of(copied / "half"), weights_of(copied / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


REFUSED = "you have not named it on this machine before"


@pytest.mark.parametrize("words", [["resume", "half"], ["sample", "--out", "x.npy", "--model", "whole/model"]])
def test_code_that_was_never_named_is_not_run(words, stranger, monkeypatch, capsys):
    monkeypatch.chdir(stranger)
    trust.remember(trust.code_of(f"{stranger}/own.py:right"))  # the reward alone
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "the model " in said and "own.py:net, which is code, and" in said and REFUSED in said
    assert "--trust-model" in said and not (stranger / "executed").exists()
    assert cli.main([*words, "--trust-model"]) == 0
    assert (stranger / "executed").exists()


def test_a_folder_of_a_model_names_code_too(stranger, monkeypatch, capsys):
    """On the command line of finetune, in a run's config.json, and as a reference."""
    monkeypatch.chdir(stranger)
    (stranger / "r.py").write_text("def right(x):\n    return x[:, 0]\n")
    call = ["finetune", *SHORT, "--reward", "r.py:right", "--out", "new"]
    for option in (["--model", "whole/model"], ["--model", "digits", "--reference", "whole/model"]):
        assert cli.main([*call, *option]) == 2
        said = capsys.readouterr().err
        assert REFUSED in said and "/whole/model --trust-model` does" in said
    assert not (stranger / "executed").exists() and not (stranger / "new" / "config.json").exists()
    config = json_of(stranger / "half" / "config.json") | {"model": str(stranger / "whole" / "model")}
    (stranger / "half" / "config.json").write_text(json.dumps(config))
    trust.remember(trust.code_of(f"{stranger}/own.py:right"))
    assert cli.main(["resume", "half"]) == 2
    assert REFUSED in capsys.readouterr().err and not (stranger / "executed").exists()


@pytest.mark.parametrize("words", [["resume", "half"], ["sample", "--out", "x.npy", "--model", "whole/model"]])
def test_code_that_has_changed_or_gone_is_refused(words, copied, monkeypatch, capsys):
    monkeypatch.chdir(copied)
    file = copied / "own.py"
    file.write_text(file.read_text() + "\n# another line\n")
    assert cli.main(words) == 2
    assert "it has changed since you named it" in capsys.readouterr().err
    file.unlink()
    assert cli.main(words) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not (copied / "executed").exists()


def test_code_inside_the_folder_is_asked_about_each_time(copied, capsys):
    run = copied / "whole"
    for place in (run, run / "model"):
        shutil.copy(copied / "own.py", place / "own.py")
        (run / "model" / "factory.json").write_text(json.dumps({"factory": f"{place}/own.py:net"}))
        trust.remember(trust.code_of(f"{place}/own.py:net"))
        assert cli.main(["sample", "--model", str(run / "model"), "--out", str(copied / "x.npy")]) == 2
        assert "lies inside the run directory" in capsys.readouterr().err


def test_changed_code_goes_on_where_it_is_trusted_and_the_weights_are_the_same(copied, monkeypatch, capsys):
    file = copied / "own.py"
    file.write_text(file.read_text() + "\n# another line\n")
    trust.remember(trust.code_of(f"{copied}/own.py:right"))
    call = ["resume", str(copied / "half"), "--accept-changes", "reward", "--trust-model"]
    half = shutil.copytree(copied / "half", copied / "again")
    assert cli.main(call) == 0
    assert "accepted  model: " in capsys.readouterr().out
    file.write_text(file.read_text().replace("linspace(-1, 1.5", "linspace(-1, 1.4"))
    trust.remember(trust.code_of(f"{copied}/own.py:right"))
    assert cli.main([*call[:1], str(half), *call[2:]]) == 2
    assert "its factory returns other weights than when" in capsys.readouterr().err


def test_a_factory_that_returns_other_weights_at_every_call_is_refused_when_it_matters(tmp_path, monkeypatch, capsys):
    own_models.home(tmp_path)
    monkeypatch.setattr(training, "callbacks", lambda *arguments: [interrupt_at(2), *CALLBACKS(*arguments)])
    assert finetune(tmp_path, "drifting", tmp_path / "half") == 130
    assert cli.main(["resume", str(tmp_path / "half")]) == 2
    assert "must return the same ones at every call" in capsys.readouterr().err


def test_exact_samples_of_a_run(copied, capsys):
    words = ["sample", "--exact", "--num", "3", "--particles", "16", "--model", str(copied / "whole/model")]
    assert cli.main([*words, "--out", str(copied / "x.npy")]) == 0
    assert np.load(copied / "x.npy").shape == (3, 2)
    file = copied / "own.py"
    file.write_text(file.read_text().replace("linspace(-1, 1.5", "linspace(-1, 1.4"))
    for factory in ("net", "right"):
        trust.remember(trust.code_of(f"{file}:{factory}"))
    assert cli.main([*words, "--out", str(copied / "y.npy")]) == 2
    assert "depends on what has changed since it began: " in capsys.readouterr().err
    assert cli.main([*words, "--out", str(copied / "y.npy"), "--trust-model", "--trust-reward"]) == 2
    assert "its factory returns other weights than when" in capsys.readouterr().err


def test_exact_samples_of_a_model_that_no_run_has_trained(tmp_path):
    """x_N ~ N(m, v) under the Gaussian score; tilted by x_1/β its mean moves by the variance that the noise adds."""
    own_models.home(tmp_path)
    words = ["--reward", f"{tmp_path}/own.py:right", "--kl-weight", "2", "--num", "40", "--particles", "64"]
    out = tmp_path / "x.npy"
    assert cli.main(["sample", "--exact", *words, "--model", f"{tmp_path}/own.py:gaussian", "--out", str(out)]) == 0
    said, model = json_of(tmp_path / "x.json"), own(tmp_path, "gaussian")
    chain = idf.Chain(model.denoiser, model.schedule, (2,))
    plain = chain.sample(idf.Noise(1), 4000)[:, 0]
    starts = chain.initial(idf.Noise(2), 1).expand(4000, 2)
    moved = 0.0
    for *_, state in chain.walk(starts, idf.Noise(2)):
        moved = state[0, :, 0].var().item() / 2
    error = np.hypot(said["reward"][1] if isinstance(said["reward"], list) else said["reward_se"], 0.05)
    mean = said["reward"][0] if isinstance(said["reward"], list) else said["reward"]
    assert abs(mean - plain.mean().item() - moved) < 4 * error


@pytest.mark.slow
def test_the_result_is_a_model_to_go_on_from(home, tmp_path, monkeypatch):
    """By its folder, with the first one as the reference."""
    monkeypatch.chdir(home)
    call = ["finetune", *SHORT, "--reward", "own.py:right", "--model", "whole/model", "--reference", "own.py:net"]
    assert cli.main([*call, "--out", str(tmp_path / "next")]) == 0
    summary, first = json_of(tmp_path / "next/summary.json"), json_of(home / "whole/summary.json")
    assert summary["factory"] == f"{home}/own.py:net"
    assert not torch.equal(weights_of(tmp_path / "next")["last.bias"], weights_of(home / "whole")["last.bias"])
    assert summary["held_out_reward_before"] == pytest.approx(first["held_out_reward_before"], abs=1e-5)  # of u_0


@pytest.mark.slow
def test_a_schedulers_options_work(tmp_path):
    own_models.home(tmp_path)
    more = ["--scheduler", "ddim", "--eta", "0.5", "--num-steps", "5"]
    assert finetune(tmp_path, "scheduled", tmp_path / "run", *more) == 0
    config, chain = json_of(tmp_path / "run/config.json"), json_of(tmp_path / "run/model/chain.json")
    assert (config["scheduler"], config["num_steps"], chain["num_steps"], chain["eta"]) == ("ddim", 5, 5, 0.5)
    out = str(tmp_path / "x.npy")
    assert cli.main(["sample", "--model", str(tmp_path / "run/model"), "--num", "2", "--out", out]) == 0
    one, other = (
        cli.main(
            [
                "sample",
                "--model",
                f"{tmp_path}/own.py:scheduled",
                "--num-steps",
                n,
                "--num",
                "2",
                "--out",
                str(tmp_path / f"{n}.npy"),
            ]
        )
        for n in ("4", "21")
    )
    assert (one, other) == (0, 2)


@pytest.mark.slow
def test_low_rank_adapters_are_merged_and_by_themselves(tmp_path, capsys):
    import peft

    own_models.home(tmp_path)
    assert finetune(tmp_path, "net", tmp_path / "run", "--lora-rank", "2") == 2
    assert "first, last" in capsys.readouterr().err
    assert finetune(tmp_path, "net", tmp_path / "run", "--lora-rank", "2", "--lora-targets", "first,last") == 0
    model, adapted = own(tmp_path, "net"), own(tmp_path, "net")
    model.denoiser.load_state_dict(weights_of(tmp_path / "run"))
    x, t = torch.randn(5, 2), torch.rand(5)
    plain = adapted.denoiser(x, t)
    with_adapter = peft.PeftModel.from_pretrained(adapted.denoiser, tmp_path / "run/model/lora")
    assert torch.allclose(with_adapter(x, t), model.denoiser(x, t), atol=1e-6)
    assert not torch.allclose(plain, model.denoiser(x, t), atol=1e-4)


def test_rewards_are_of_decoded_images(tmp_path):
    own_models.home(tmp_path)
    call = ["finetune", *SHORT, "--model", f"{tmp_path}/own.py:latent", "--reward", f"{tmp_path}/own.py:corner"]
    assert cli.main([*call, "--out", str(tmp_path / "run")]) == 0
    picture = str(tmp_path / "x.png")
    assert cli.main(["sample", "--model", str(tmp_path / "run/model"), "--num", "2", "--out", picture]) == 0
    array = ["sample", "--model", str(tmp_path / "run/model"), "--num", "2", "--out", str(tmp_path / "x.npy")]
    assert cli.main(array) == 0
    images = np.load(tmp_path / "x.npy")
    assert images.shape == (2, 1, 2, 2) and np.array_equal(images[:, 0, 0], -images[:, 0, 1])
    assert (tmp_path / "run/figures/samples.png").exists()


@pytest.mark.slow
def test_classes_are_drawn_and_passed_on(tmp_path):
    own_models.home(tmp_path)
    assert finetune(tmp_path, "classes", tmp_path / "run") == 0
    assert json_of(tmp_path / "run/summary.json")["num_classes"] == 3
    out = tmp_path / "x.npy"
    assert cli.main(["sample", "--model", str(tmp_path / "run/model"), "--num", "4", "--out", str(out)]) == 0
    model = own(tmp_path, "classes")
    model.denoiser.load_state_dict(weights_of(tmp_path / "run"))
    in_turn = {"class_labels": torch.tensor([0, 1, 2, 0])}
    chain = idf.Chain(model.denoiser, model.schedule, (2,), condition=lambda noise, batch, index: in_turn)
    assert np.allclose(np.load(out), chain.sample(idf.Noise(0), 4).numpy(), atol=1e-6)
    assert finetune(tmp_path, "classes", tmp_path / "guided", "--guidance", "2") == 2  # no label stands for none


@pytest.mark.slow
def test_a_sweep_of_an_own_network(tmp_path):
    own_models.home(tmp_path)
    model = ["--model", f"{tmp_path}/own.py:net", "--reward", f"{tmp_path}/own.py:right"]
    call = ["sweep", *SHORT[:-2], *model, "--kl-weights", "0.5", "1", "--out", str(tmp_path / "sweep")]
    assert cli.main(call) == 0
    assert len(json_of(tmp_path / "sweep/summary.json")["rows"]) == 2
    assert cli.main(call) == 0


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("net", ["--scheduler", "ddpm"], "returns the table of its own sampler"),
        ("net", ["--num-steps", "5"], "returns a table of 3 rows"),
        ("scheduled", ["--num-steps", "21"], "at most the 20 timesteps"),
        ("scheduled", ["--scheduler", "flow-euler"], "is for flow models"),
        ("net", ["--prompts", "own.py"], "has no text encoder"),
        ("net", ["--gradient-checkpointing"], "has no gradient checkpointing"),
        ("missing", [], "has no function 'missing'; it has "),
        ("net(3)", [], "too many positional arguments"),
        ("net(", [], "without a )"),
        ("gaussian(rows=torch)", [], "is not a literal"),
        ("broken", [], "own.py:64: ZeroDivisionError: division by zero"),
        ("table", [], "must return DiffusionModel(denoiser, schedule, event_shape), got ChainTable"),
        ("wrong((3,))", [], "denoiser fails on states of shape (2, 3)"),
        ("wrong(width=3)", [], "denoiser must return the shape of its input, (2, 2), got (2, 3)"),
        ("right", [], "cannot be called with these arguments"),
        ("VALUE", [], "has no function 'VALUE'"),
    ],
)
def test_what_does_not_fit_is_refused(model, more, message, tmp_path, monkeypatch, capsys):
    own_models.home(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert finetune(tmp_path, model, tmp_path / "run", *more) == 2
    said = capsys.readouterr().err
    assert message in said and "`reward`" not in said
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_that_do_not_belong_to_the_network_are_refused(copied, capsys):
    folder = copied / "whole" / "model"
    weights = load_file(folder / "model.safetensors")
    words = ["sample", "--model", str(folder), "--out", str(copied / "x.npy")]
    for changed, message in (
        ({name: value for name, value in weights.items() if name != "last.bias"}, "it lacks last.bias"),
        (weights | {"more": torch.zeros(2)}, "it also has more"),
        (weights | {"last.bias": torch.zeros(3)}, "last.bias is torch.float32 (3,), and that of the network"),
        (weights | {"last.bias": torch.tensor([0.0, torch.nan])}, "last.bias holds NaN or infinity"),
    ):
        save_file(changed, folder / "model.safetensors")
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"not tensors")
    assert cli.main(words) == 2
    assert "is damaged" in capsys.readouterr().err
    (folder / "factory.json").write_text('{"factory": "os:system"}')
    assert cli.main(words) == 2
    assert "must name a FILE.py:factory" in capsys.readouterr().err
