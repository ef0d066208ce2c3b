"""Folders of runs made to do harm: nothing outside of them is read or changed, and what they say is plain text."""

import copy
import itertools
import json
import os
import random
import shutil
from html.parser import HTMLParser

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from tests.helpers import tiny, toy_model
from tests.helpers.stops import interrupt_at, limited

TINY = ["--num-steps", "3", "--batch", "2", "--updates", "4", "--starts", "4", "--kl-weight", "2.5", "--device", "cpu"]
FILES = ("config.json", "provenance.json", "metrics.jsonl", "summary.json", "seconds.json", "plan.json", ".lock")
STATES = ("checkpoint/state.safetensors", "judged/state.safetensors")
FOLDERS = ("figures", "checkpoint", "model", "judged", "plan")
UNFINISHED = ("report.html.tmp", "summary.json.tmp", "config.json.tmp", "checkpoint/state.safetensors.tmp")
SECONDS = 60  # after which a command hangs
EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script>\n---\n[a](javascript:alert(1))`\u202e'
ORIGIN = ("command", "version")  # of a run, in its config.json
CALLBACKS = training.callbacks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An interrupted run of fine-tuning, and the same one when it was resumed."""
    home = tmp_path_factory.mktemp("home")
    model = toy_model.folder(home / "tiny", tiny.scheduler())
    call = ["finetune", "--model", str(model), "--reward", "brightness", *TINY]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(2), *CALLBACKS(*arguments)])
        assert main([*call, "--out", str(home / "half")]) == 130
    shutil.copytree(home / "half", home / "whole")
    assert main(["resume", str(home / "whole")]) == 0
    return home


@pytest.fixture(scope="module")
def energy(runs):
    """A run of an energy-based model, beside them."""
    ebm = ["ebm", "--data", "moons", "--steps", "3", "--particles", "16", "--judge-steps", "4", "--width", "8", "--out"]
    assert main([*ebm, str(runs / "energy")]) == 0
    return runs / "energy"


@pytest.fixture
def outside(tmp_path):
    """A place of the user's own, with files of every name that a run has."""
    outside = tmp_path / "outside"
    for name in (*FILES, *STATES, *UNFINISHED, "figures/before.png", "model/README.md", "plan/state.safetensors"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("the user's own\n")
    return outside


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def place(run, name):
    """The path of that name in the run, where nothing is any more."""
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    return path


def linked(run, outside, name):
    place(run, name).symlink_to(outside / name)


def linked_by_relative_path(run, outside, name):
    path = place(run, name)
    path.symlink_to(os.path.relpath(outside / name, path.parent))


def linked_twice(run, outside, name):
    (run / "between").symlink_to(outside)
    path = place(run, name)
    path.symlink_to(os.path.relpath(run / "between" / name, path.parent))


def hard_linked(run, outside, name):
    os.link(outside / name, place(run, name))


def a_pipe(run, outside, name):
    os.mkfifo(place(run, name))


def a_device(run, outside, name):
    place(run, name).symlink_to("/dev/zero")


LINKS = (linked, linked_by_relative_path, linked_twice)
ATTACKS = [
    *itertools.product(LINKS, (*FILES, *STATES, *FOLDERS, *UNFINISHED)),
    *itertools.product((hard_linked, a_pipe, a_device), (*FILES, *STATES, *UNFINISHED)),
]
COMMANDS = (("report", "whole"), ("resume", "half"))
FEW = random.Random(0).sample(list(itertools.product(COMMANDS, ATTACKS)), 30)


def refused(command, run, capsys):
    capsys.readouterr()
    with limited(SECONDS):
        status = main([*command, str(run)])
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and said[-1].startswith("error: "), said
    return said[-1]


def check_refused(command, run, attack, name, tmp_path, outside, runs, capsys):
    target = shutil.copytree(runs / run, tmp_path / "run")
    attack(target, outside, name)
    before = contents(outside)
    said = refused([command], target, capsys)
    assert str(target) in said
    assert contents(outside) == before
    assert not (target / ".lock").is_file() or name == ".lock"
    shutil.rmtree(target)


@pytest.mark.parametrize(
    ("command", "attack"), FEW, ids=lambda pair: "-".join(getattr(part, "__name__", part) for part in pair)
)
def test_what_leads_out_of_a_run_is_refused(command, attack, tmp_path, outside, runs, capsys):
    check_refused(*command, *attack, tmp_path, outside, runs, capsys)


@pytest.mark.slow
def test_all_that_leads_out_of_a_run_is_refused(tmp_path, outside, runs, energy, capsys):
    for command, attack in itertools.product((*COMMANDS, ("report", "energy")), ATTACKS):
        check_refused(*command, *attack, tmp_path, outside, runs, capsys)


@pytest.mark.parametrize("name", ["figures", "config.json.tmp", ".lock", "seconds.json"])
@pytest.mark.parametrize("command", ["finetune --model digits", "ebm --data moons", "hexagon", "sweep --kl-weights 1"])
def test_a_new_run_goes_into_no_such_folder(command, name, tmp_path, outside, capsys):
    """A folder that looks empty, for --out."""
    (tmp_path / "run").mkdir()
    linked(tmp_path / "run", outside, name)
    before = contents(outside)
    assert "outside" in refused([*command.split(), "--out"], tmp_path / "run", capsys)
    assert contents(outside) == before


def test_links_within_a_run_and_copies_of_it_are_no_harm(tmp_path, runs, capsys):
    run = shutil.copytree(runs / "half", tmp_path / "run")
    (run / "checkpoint").rename(run / "elsewhere")
    (run / "checkpoint").symlink_to("elsewhere")
    os.link(run / "plan.json", run / "plan-as-it-was.json")
    (tmp_path / "name").symlink_to(run)
    assert main(["resume", str(tmp_path / "name")]) == 0


def leaves(value, path=()):
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def with_leaf(value, path, leaf):
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = leaf(inner[path[-1]]) if callable(leaf) else leaf
    return value


class Words(HTMLParser):
    """Fails where words of a run have become HTML."""

    def handle_starttag(self, tag, attributes):
        assert tag != "script" and not any(name.startswith("on") for name, _ in attributes)
        assert all(value.startswith("data:") for name, value in attributes if name in ("src", "href"))


WRONG = (EVIL, lambda was: was + EVIL if isinstance(was, str) else EVIL, None, [], {}, -1, True, 1e308, "", [[EVIL]])


def check_report(run, capsys):
    """It is refused in a line, or its words are words."""
    for page in (*run.rglob("report.html"), run / "model/README.md"):
        page.unlink(missing_ok=True)
    capsys.readouterr()
    with limited(SECONDS):
        status = main(["report", str(run)])
    out, err = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in out + err
    assert status == 0 or err.strip().splitlines()[-1].startswith("error: ")
    for page in run.rglob("report.html"):
        Words().feed(page.read_text())


JSON = ("summary.json", "config.json", "seconds.json", "plan.json")


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of a dot."""
    from matplotlib.figure import Figure
    from PIL import Image

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: Image.new("RGB", (1, 1)).save(file, "png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "energy"])
def test_what_a_run_says_is_refused_or_plain_text(name, runs, energy, tmp_path, undrawn, capsys):
    run = shutil.copytree(runs / name, tmp_path / name)
    draws = random.Random(0)
    for file in (run / name for name in JSON if (run / name).exists()):
        sound = json.loads(file.read_text())
        for path in leaves(sound):
            file.write_text(json.dumps(with_leaf(sound, path, draws.choice(WRONG))))
            check_report(run, capsys)
        file.write_text(json.dumps(sound))
    check_report(run, capsys)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("provenance", ["as it was", "without it", "gone"])
def test_a_run_that_names_a_file_of_its_reader_is_refused(provenance, runs, tmp_path, capsys):
    """In config.json, with a provenance.json that agrees: whoever made the folder does not know what the file holds."""
    run = shutil.copytree(runs / "half", tmp_path / "run")
    shutil.copytree(runs / "tiny", tmp_path / "private")
    edit(tmp_path / "private/scheduler/scheduler_config.json", clip_sample_range=2.0)
    edit(run / "config.json", model=str(tmp_path / "private"))
    config = {key: value for key, value in json.loads((run / "config.json").read_text()).items() if key not in ORIGIN}
    if provenance == "gone":
        (run / "provenance.json").unlink()
    else:
        edit(run / "provenance.json", config=config)
    if provenance == "without it":
        edit(run / "provenance.json", inputs={})
    assert "run depends on what has changed" in refused(["resume"], run, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("provenance", ["as it was", "gone"])
def test_a_report_reads_no_file_that_the_run_did_not_read(provenance, runs, energy, tmp_path, capsys):
    run = shutil.copytree(energy, tmp_path / "run")
    (tmp_path / "private.csv").write_text("1,2\n3,4\n" * 30)
    edit(run / "config.json", data=str(tmp_path / "private.csv"))
    if provenance == "gone":
        (run / "provenance.json").unlink()
    assert "run depends on what has changed" in refused(["report"], run, capsys)
    assert "private.csv" in refused(["report"], run, capsys)
