"""What a resumed run trusts: nothing that has changed, and no code that its user has not named."""

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from implicit_diffusion import __version__, cli
from implicit_diffusion.commands import resuming
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.registry import COMMANDS
from implicit_diffusion.commands.rewards import trust as reward_trust
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.runs import surroundings
from implicit_diffusion.runs.directory import RunDirectory
from tests.helpers import tiny
from tests.helpers.stops import interrupt_at

TINY = ["--num-steps", "3", "--batch", "2", "--updates", "4", "--starts", "4", "--lr", "1e-3", "--kl-weight", "2.5"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REWARD = """
import os, pathlib, random, tempfile
import numpy, torch
from scale_of_reward import scale

(pathlib.Path(__file__).parent / "executed").touch()

def f(x):
    os.chdir(tempfile.gettempdir())
    i = int(torch.randint(0, 4, ())) + numpy.random.randint(2) + random.randint(0, 1)
    return scale * x[..., i:i + 3].flatten(1).mean(1)
"""


def model(folder, shift=0.0):
    unet = tiny.unet(in_channels=3, out_channels=3, **tiny.PLAIN)
    with torch.no_grad():
        next(unet.parameters()).add_(shift)
    return save_pipeline(folder, DiffusersDenoiser(unet), DDPMScheduler(clip_sample=False), "a test")


CALLBACKS = training.callbacks


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A whole run and an interrupted one, named by relative paths; the reward draws at random and changes directory."""
    home = tmp_path_factory.mktemp("home")
    model(home / "model")
    (home / "my.py").write_text(REWARD)
    (home / "scale_of_reward.py").write_text("scale = 2.0\n")
    with pytest.MonkeyPatch.context() as patched:
        for out in ("whole", "half", "adapters"):
            first = [] if out == "whole" else [interrupt_at(2)]
            patched.setattr(training, "callbacks", lambda *arguments, first=first: [*first, *CALLBACKS(*arguments)])
            lora = ["--lora-rank", "2"] if out == "adapters" else []
            patched.chdir(home)
            call = ["finetune", *TINY, *lora, "--model", "model", "--reward", "my.py:f", "--out", out]
            assert cli.main(call) == (0 if out == "whole" else 130)
    return home


@pytest.fixture
def half(home, tmp_path, monkeypatch):
    """The interrupted run, with all that it reads, in a place of its own that is known to be its user's."""
    for name in ("model", "half", "adapters", "my.py", "scale_of_reward.py"):
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, tmp_path / name)
    for run in ("half", "adapters"):
        for file in ("config.json", "provenance.json"):
            path = tmp_path / run / file
            path.write_text(path.read_text().replace(str(home), str(tmp_path)))
    reward_trust.remember(reward_trust.code_of(f"{tmp_path}/my.py:f"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "half"


@pytest.fixture
def nothing_runs(monkeypatch):
    """Neither a model is loaded nor a reward executed."""
    monkeypatch.setattr(setup, "_build", lambda *arguments: pytest.fail("it was built"))


@pytest.mark.slow
def test_a_run_goes_on_from_another_directory_bit_for_bit(home, tmp_path, monkeypatch):
    """Though its reward draws from all global generators; these are as they were afterwards, and so is the config."""
    config = json.loads((home / "half" / "config.json").read_text())
    assert [config[name] for name in ("model", "out")] == [f"{home}/{p}" for p in ("model", "half")]
    assert config["reward"] == [f"{home}/my.py:f"]
    copy = shutil.copytree(home / "half", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7), np.random.seed(7)  # noqa: NPY002
    expected = [torch.rand(()).item(), np.random.random()]  # noqa: NPY002
    torch.manual_seed(7), np.random.seed(7)  # noqa: NPY002
    assert cli.main(["resume", "moved"]) == 0
    monkeypatch.chdir(tmp_path)
    assert [torch.rand(()).item(), np.random.random()] == expected  # noqa: NPY002  # Python's own are drawn by libraries
    assert (copy / "model" / WEIGHTS).read_bytes() == (home / "whole" / "model" / WEIGHTS).read_bytes()
    again, whole = (json.loads((path / "summary.json").read_text()) for path in (copy, home / "whole"))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    assert json.loads((copy / "config.json").read_text()) == config
    assert str(home) not in (copy / "model" / "README.md").read_text()  # which is published


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = {
    "config": (lambda home: edit(home / "half/config.json", '"lr": 0.001', '"lr": 0.1'), "lr was 0.001 and is 0.1"),
    "model": (lambda home: model(home / "model", shift=0.1), f"model/{WEIGHTS} was sha256"),
    "reward": (lambda home: edit(home / "scale_of_reward.py", "2", "3"), "reward imports: .*scale_of_reward.py was"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_is_named_before_anything_runs(kind, half, nothing_runs, capsys):
    change, message = CHANGES[kind]
    change(half.parent)
    with pytest.raises(InvalidInputError, match=f"half depends on what has changed since it began: .*{message}"):
        resuming.resume(half)
    assert cli.main(["resume", str(half)]) == 2
    assert f"--accept-changes {kind}" in capsys.readouterr().err
    assert not (half.parent / "executed").exists()


def test_the_model_of_an_adapter_counts_as_well(half, nothing_runs):
    model(half.parent / "model", shift=0.1)
    with pytest.raises(InvalidInputError, match=f"adapters depends on what has changed .*model/{WEIGHTS} was sha256"):
        resuming.resume(half.parent / "adapters")


@pytest.mark.slow
def test_changes_are_accepted_by_name_and_noted(half, monkeypatch, capsys):
    now = surroundings.versions()
    monkeypatch.setattr(surroundings, "versions", lambda: now | {"torch": "99.1"})
    model(half.parent / "model", shift=0.1)
    assert cli.main(["resume", str(half), "--accept-changes", "model"]) == 2
    assert "torch was" in capsys.readouterr().err
    assert cli.main(["resume", str(half), "--accept-changes", "model", "versions"]) == 0
    printed = capsys.readouterr().out
    assert "accepted  model: " in printed and "accepted  torch was" in printed
    assert len(json.loads((half / "provenance.json").read_text())["accepted"]) == 2


def test_a_hand_that_writes_nonsense_into_the_config(half, nothing_runs, as_users_run):
    edit(half / "config.json", '"updates": 4', '"updates": "many"')
    for accepted in ([], ["config"]):
        with pytest.raises(InvalidInputError, match=r"config.json cannot be used: updates: 'many' is not .*\(int\)"):
            resuming.resume(half, accepted)


def of_version(run, version):
    """As if another version of this library had begun the run, and recorded that."""
    for file in ("config.json", "provenance.json"):
        edit(run / file, f'"{__version__}"', f'"{version}"')


def test_a_run_of_another_version_is_refused_by_name_or_resumed_where_that_is_asked_for(home, half, capsys):
    """Then it continues, bit for bit where the versions agree in what they compute, and is a run of this version."""
    of_version(half, "0.0.9")
    refusal = f"half was begun by implicit-diffusion 0.0.9; this is {__version__}"
    with pytest.raises(InvalidInputError, match=f"{refusal}: .*`accept_changes=..versions"):
        resuming.resume(half)
    assert cli.main(["resume", str(half)]) == 2
    said = capsys.readouterr().err
    assert refusal in said and "add --accept-changes versions" in said
    assert not (half.parent / "executed").exists()
    assert cli.main(["resume", str(half), "--accept-changes", "versions"]) == 0
    assert "accepted  implicit-diffusion was 0.0.9 and is " in capsys.readouterr().out
    assert RunDirectory(half).read_origin() == ("finetune", __version__)
    assert (half / "model" / WEIGHTS).read_bytes() == (home / "whole" / "model" / WEIGHTS).read_bytes()


def test_a_report_of_another_version_is_drawn_by_that_version(home, tmp_path):
    run = shutil.copytree(home / "whole", tmp_path / "whole")
    of_version(run, "0.0.9")
    with pytest.raises(InvalidInputError, match=r"whole was begun by implicit-diffusion 0.0.9; .*with that version"):
        resuming.report(run)
    (run / "report.html").unlink()  # interrupted before it was written
    with pytest.raises(InvalidInputError, match=r"was begun by implicit-diffusion 0.0.9"):
        resuming.resume(run)
    resuming.resume(run, ["versions"])
    (run / "report.html").unlink()
    resuming.report(run)
    assert (run / "report.html").exists() and RunDirectory(run).read_origin() == ("finetune", __version__)


def test_options_of_another_version_are_named(half, nothing_runs):
    """Though the version is accepted: what they would mean here is not known."""
    of_version(half, "0.0.9")
    edit(half / "config.json", '"ema": null', '"momentum": 0.9')
    with pytest.raises(InvalidInputError, match=f"config.json has momentum and lacks ema: .*version {__version__}"):
        resuming.resume(half, ["versions", "config"])


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({}, "does not say which command and which version began this run"),
        ({"command": "finetune", "version": 3}, "does not say which command"),
        ({"command": "nothing", "version": __version__}, "names the command 'nothing', whose runs .* finetune, "),
        ({"command": "sample", "version": __version__}, "names the command 'sample', whose runs"),
        ({"command": "sweep", "version": __version__}, "is a sweep; to continue it, repeat the `sweep` command"),
    ],
)
def test_what_no_command_can_go_on_with_is_refused(origin, message, tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    run.write_config(origin | {"lr": 0.1})
    run.write_summary({})
    for call in (resuming.resume, resuming.report):
        with pytest.raises(InvalidInputError, match=message):
            call(run.path)


def test_config_json_says_command_and_version_before_the_options(half):
    config = json.loads((half / "config.json").read_text())
    assert list(config.items())[:2] == [("command", "finetune"), ("version", __version__)]
    assert datetime.fromisoformat(config["begun"]) < datetime.now(UTC) and list(config)[2] == "begun"
    assert RunDirectory(half).read_config() == {name: config[name] for name in list(config)[3:]}


@pytest.fixture
def stranger(half, monkeypatch, tmp_path):
    """The same run before another user, with a home of their own where something can be noted."""
    monkeypatch.setattr(reward_trust, "_named", set())
    monkeypatch.delenv("IMPLICIT_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return half


def test_a_reward_that_was_never_named_is_not_run(stranger, nothing_runs, capsys):
    assert cli.main(["resume", str(stranger)]) == 2
    error = capsys.readouterr().err
    assert "my.py:f, which is code, and you have not named it on this machine before. Read it" in error
    assert "--trust-reward" in error and not (stranger.parent / "executed").exists()


def test_a_reward_is_known_by_place_and_content_in_later_processes(stranger, monkeypatch):
    name = f"{stranger.parent}/my.py:f"
    reward_trust.remember(reward_trust.code_of(name))
    monkeypatch.setattr(reward_trust, "_named", set())  # another process
    reward_trust.check_trust(name, stranger)
    shutil.copy(stranger.parent / "my.py", stranger.parent / "other.py")
    for other in (f"{stranger.parent}/other.py:f", f"{stranger.parent}/my.py:g"):
        with pytest.raises(InvalidInputError, match="not named it on this machine"):
            reward_trust.check_trust(other, stranger)
    edit(stranger.parent / "my.py", "scale *", "scale +")
    with pytest.raises(InvalidInputError, match="it has changed since you named it"):
        reward_trust.check_trust(name, stranger)


def test_a_reward_inside_the_run_directory_is_asked_about_each_time(stranger):
    """Also behind a link, and though it was trusted before."""
    (stranger / "evil.py").write_text("def f(x): return x.sum((1, 2, 3))")
    link = stranger.parent / "link.py"
    link.symlink_to(stranger / "evil.py")
    for name in (f"{stranger}/evil.py:f", f"{link}:f"):
        reward_trust.remember(reward_trust.code_of(name))
        with pytest.raises(InvalidInputError, match=r"evil.py lies inside the run directory"):
            reward_trust.check_trust(name, stranger)


@pytest.mark.parametrize("off", [True, False])
def test_where_nothing_can_be_noted_the_user_is_asked(off, stranger, monkeypatch):
    """In the process that named it, it is known."""
    name = f"{stranger.parent}/my.py:f"
    if off:
        monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", "off")
    else:
        (stranger.parent / "state").write_text("a file")
    reward_trust.remember(reward_trust.code_of(name))
    reward_trust.check_trust(name, stranger)
    monkeypatch.setattr(reward_trust, "_named", set())
    with pytest.raises(InvalidInputError, match="IMPLICIT_DIFFUSION_CACHE=off" if off else "before. Read it"):
        reward_trust.check_trust(name, stranger)
    assert not (stranger.parent / "state" / "implicit-diffusion").exists()


@pytest.mark.slow
def test_asked_for_it_runs_and_is_known_from_then_on(stranger, monkeypatch, capsys):
    """A reward that has changed is then another one that the run rests on, which is said."""
    edit(stranger.parent / "my.py", "scale *", "3 * scale *")
    assert cli.main(["resume", str(stranger)]) == 2
    assert cli.main(["resume", str(stranger), "--trust-reward"]) == 0
    assert "accepted  reward: " in capsys.readouterr().out
    assert (stranger.parent / "executed").exists()
    monkeypatch.setattr(reward_trust, "_named", set())
    reward_trust.check_trust(f"{stranger.parent}/my.py:f", stranger)


def test_a_module_is_found_without_running_its_packages(tmp_path, monkeypatch):
    package = tmp_path / "rewards_of_mine" / "inner"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "best.py"):
        file.write_text(f"raise SystemExit({file.name!r})")
    monkeypatch.syspath_prepend(tmp_path)
    code = reward_trust.code_of("rewards_of_mine.inner.best:f")
    assert [file.name for file in code.files] == ["__init__.py", "__init__.py", "best.py"]
    with pytest.raises(InvalidInputError, match="not named it on this machine"):
        reward_trust.check_trust("rewards_of_mine.inner.best:f", tmp_path / "run")
    reward_trust.remember(code)
    reward_trust.check_trust("rewards_of_mine.inner.best:f", tmp_path / "run")
    with pytest.raises(InvalidInputError, match="lies inside the run directory"):
        reward_trust.check_trust("rewards_of_mine.inner.best:f", tmp_path)
    (package / "__init__.py").write_text("raise SystemExit(2)")
    with pytest.raises(InvalidInputError, match="has changed"):
        reward_trust.check_trust("rewards_of_mine.inner.best:f", tmp_path / "run")
    for name in ("sys:exit", "os:system"):
        with pytest.raises(InvalidInputError, match="not named it on this machine"):
            reward_trust.check_trust(name, tmp_path)
    for name in ("rewards_of_mine.none:f", "best.rewards_of_mine:f", "rewards_of_mine.inner.best.more:f"):
        with pytest.raises(InvalidInputError, match="no module"):
            reward_trust.check_trust(name, tmp_path)


def test_a_run_inside_a_sweep_may_name_no_other_reward(half, monkeypatch, capsys):
    """A sweep whose own options agree, with a run in it that came from elsewhere."""
    from implicit_diffusion.commands.sweep import command as sweep

    call = ["sweep", *TINY[:-2], "--model", "model", "--kl-weights", "2.5", "--out", "sweep"]
    monkeypatch.setattr(sweep, "_one", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(call) == 130
    monkeypatch.undo()
    monkeypatch.chdir(half.parent)
    run = half.rename(half.parent / "sweep" / "beta-2.5")
    evil = half.parent / "evil.py"
    evil.write_text("raise SystemExit('executed')")
    for file in ("config.json", "provenance.json"):
        edit(run / file, "my.py", "evil.py")
    capsys.readouterr()
    assert cli.main(call) == 2
    assert "evil.py:f, which is code, and you have not named it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_goes_on_rests_on_what_it_began_with(half, monkeypatch, capsys):
    from implicit_diffusion.commands.sweep import command as sweep

    call = ["sweep", *TINY[:-2], "--model", "model", "--kl-weights", "2.5", "--out", "sweep"]
    monkeypatch.setattr(sweep, "_one", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(call) == cli.main(call) == 130
    model(half.parent / "model", shift=0.1)
    capsys.readouterr()
    assert cli.main(call) == 2
    assert f"model/{WEIGHTS} was sha256" in capsys.readouterr().err
    assert cli.main([*call, "--accept-changes", "model"]) == 130
    assert "accepted  model: " in capsys.readouterr().out
    assert cli.main(call) == 130
    assert len(json.loads((half.parent / "sweep" / "provenance.json").read_text())["accepted"]) == 1
    of_version(half.parent / "sweep", "0.0.9")
    assert cli.main(call) == 2
    assert f"sweep was begun by implicit-diffusion 0.0.9; this is {__version__}" in capsys.readouterr().err
    assert cli.main([*call, "--accept-changes", "versions"]) == 130
    assert cli.main(call) == 130


@pytest.mark.slow
def test_a_reward_with_a_state_of_its_own_is_said(half, capsys):
    (half.parent / "counts.py").write_text(
        "import torch\ng = torch.Generator().manual_seed(0)\n"
        "def own(x): return x.flatten(1).mean(1) * torch.rand((), generator=g)\n"
        "def shared(x): return x.flatten(1).mean(1) * torch.rand(())\n"
    )
    for function, said in {"own": True, "shared": False}.items():
        options = ["--model", "model", "--reward", f"counts.py:{function}", "--plan", "--out", function]
        assert cli.main(["finetune", *TINY, *options]) == 0
        assert ("counts.py:own gives other values" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    "command",
    [
        "finetune",
        "sweep",
        "ebm",
        "ebm --compare",
        "tilt --model x",
        "pretrain --steps 1",
        "hexagon",
        "recovery",
        "compare",
        "theory",
        "resume",
    ],
)
def test_several_processes_are_refused_before_anything_is_written(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    if command == "resume":
        run.mkdir()
        (run / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*command.split(), *([str(run)] if command == "resume" else ["--out", str(run)])]) == 2
    assert "one of 2 processes (WORLD_SIZE" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    from pathlib import Path

    from implicit_diffusion.commands.ebm import config as ebm_config
    from implicit_diffusion.commands.finetune import config as finetune_config
    from implicit_diffusion.commands.shared.inputs import absolute
    from implicit_diffusion.commands.tilt import command as tilt

    monkeypatch.chdir(tmp_path)
    for name in ("digits", "moons", "mine", "other"):
        (tmp_path / name).mkdir()
    config = finetune_config.Config(model="mine", reference="other", prompts=Path("p"), out=Path("o"))
    found = absolute(config)
    assert (found.model, found.reference) == (str(tmp_path / "mine"), str(tmp_path / "other"))
    assert (found.prompts, found.out, found.reward) == (tmp_path / "p", tmp_path / "o", ("brightness",))
    kept = absolute(finetune_config.Config(model="digits", reference="owner/name", reward="pkg.mod:f"))
    assert (kept.model, kept.reference, kept.reward) == ("digits", "owner/name", ("pkg.mod:f",))
    assert absolute(ebm_config.Config(data="moons")).data == "moons"
    assert absolute(tilt.Config(Path("mine"), reward="r.py:f")).reward == f"{tmp_path}/r.py:f"
    assert absolute(tilt.Config(Path("mine"))).model == tmp_path / "mine"


def test_an_energy_based_run_rests_on_its_data(tmp_path, monkeypatch):
    from implicit_diffusion.commands.ebm import command as ebm
    from implicit_diffusion.commands.ebm import config as ebm_config

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("data.npy", rng.normal(size=(60, 2)))
    config = ebm_config.Config(data="data.npy", steps=3, particles=16, width=4, judge_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(ebm, "train", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ebm.run(config)
    (run,) = tmp_path.glob("runs/ebm-data-*")
    assert json.loads((run / "config.json").read_text())["data"] == str(tmp_path / "data.npy")
    np.save("data.npy", rng.normal(size=(60, 2)))
    with pytest.raises(InvalidInputError, match=r"data: .*data.npy was sha256 .*accept_changes=..data"):
        resuming.resume(run)
    assert RunDirectory(run).read_config() is not None


CONFIGS = {
    "finetune": ("finetune", {}),
    "ebm": ("ebm", {}),
    "compare": ("ebm", {"compare": True}),
    "pretrain": ("pretrain", {}),
    "tilt": ("tilt", {"model": Path("energy")}),
    "own": ("tilt", {"model": Path("energy"), "reward": "mine.py:f"}),
    "recovery": ("recovery", {}),
    "hexagon": ("hexagon", {}),
    "methods": ("compare", {}),
    "theory": ("theory", {}),
}


def begun(path, name="finetune"):
    """A folder with the config.json of a run."""
    run, (command, options) = RunDirectory.create(path), CONFIGS[name]
    run.write_config(COMMANDS[command].config(**options), command)
    return run


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("has", [("figures",), ("model", "figures", "report.html"), ()], ids=len)
def test_a_finished_run_names_only_results_that_are_there(name, has, tmp_path, capsys):
    run = begun(tmp_path / "a run", name)
    run.write_summary({})
    for part in (*has, "report.html") if name == "finetune" or "report.html" in has else has:
        (run.path / part).touch()
    if not (run.path / COMMANDS[CONFIGS[name][0]].last_file).exists():
        pytest.skip("the report is still to be written")
    assert cli.main(["resume", str(run.path)]) == 2
    said = capsys.readouterr().err
    results = re.findall(rf"{re.escape(str(run.path))}/([\w.]+)", said)
    there = [part for part in ("model", "report.html", "figures", "summary.json") if (run.path / part).exists()]
    assert results == there
    assert f"`implicit-diffusion report '{run.path}'` draws it again" in said


def test_a_part_of_a_run_and_one_that_never_began_are_not_continued(tmp_path, capsys):
    run = RunDirectory.create(tmp_path / "run")
    for command in ("resume", "report"):
        assert cli.main([command, str(run.path)]) == 2
        assert "no run has begun in it" in capsys.readouterr().err
    begun(tmp_path / "again").path.joinpath("config.json").rename(run.path / "config.json")
    run.model.mkdir()
    for command in ("resume", "report"):
        assert cli.main([command, str(run.model)]) == 2
        assert f"name the run itself, {run.path}\n" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match=f"`implicit-diffusion resume {run.path}` continues it"):
        resuming.report(run.path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_options_that_are_gone_are_not_said_to_be_of_another_version(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r"config\.json is gone, or cannot be read; put .* back"):
        read_options(COMMANDS["hexagon"].config, RunDirectory(tmp_path))
