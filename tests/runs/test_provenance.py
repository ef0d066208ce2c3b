"""What a run rests on: every difference is named, and refused unless it is accepted."""

import json

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.fingerprints import MODEL_FILES, fingerprint
from implicit_diffusion.runs import RunDirectory, provenance, surroundings
from implicit_diffusion.runs.provenance import record, verified, verify

CONFIG = {"lr": 1e-3, "model": "model", "chains": (1, 2)}


@pytest.fixture
def run(tmp_path):
    """A run that rests on a model's folder, a file, prompts of its own and a tensor."""
    directory = RunDirectory.create(tmp_path / "run")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    for name, text in {"model/unet/weights.safetensors": "w", "model/README.md": "r", "data.npy": "d"}.items():
        (tmp_path / name).write_text(text)
    (directory.path / "prompts.txt").write_text("p")
    record(
        directory,
        CONFIG,
        {
            "model": fingerprint(tmp_path / "model", MODEL_FILES),
            "data": tmp_path / "data.npy",
            "prompts": directory.path / "prompts.txt",
            "reference": torch.arange(3.0),
        },
    )
    directory.write_config(CONFIG)
    return directory


def change_config(run):
    run.write_config(CONFIG | {"lr": 2e-3})


CHANGES = {
    "config": (change_config, "config.json: lr was 0.001 and is 0.002"),
    "model": (
        lambda run: (run.path.parent / "model/unet/weights.safetensors").write_text("v"),
        r"model: .*unet/weights.safetensors was sha256 50e721e49c01… and is sha256 4c94485e0c21…",
    ),
    "data": (lambda run: (run.path.parent / "data.npy").unlink(), r"data: .*data.npy was sha256 .*… and is not there"),
    "prompts": (lambda run: (run.path / "prompts.txt").write_text("q"), r"prompts: .*run/prompts.txt was"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_difference_is_named_and_refused_and_may_be_accepted_once(kind, run, capsys):
    verify(run)
    change, message = CHANGES[kind]
    change(run)
    with pytest.raises(InvalidInputError, match=message) as refused:
        verify(run)
    assert f"`accept_changes=[{kind!r}]`" in str(refused.value)
    with pytest.raises(InvalidInputError, match=message):
        verify(run, ["versions"])
    verify(run, [kind])
    assert capsys.readouterr().out.startswith(f"accepted  {kind}")
    verify(run)  # what the run rests on from now on
    assert len(json.loads((run.path / "provenance.json").read_text())["accepted"]) == 1


def test_new_files_of_a_folder_count_and_files_that_nobody_loads_do_not(run):
    model = run.path.parent / "model"
    (model / "README.md").write_text("other")
    (model / ".cache").mkdir()
    (model / ".cache" / "x.json").write_text("{}")
    verify(run)
    (model / "unet" / "weights.index.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"weights.index.json was not there and is sha256 44136fa355b3…"):
        verify(run)


def test_many_files_are_counted(run):
    for number in range(9):
        (run.path.parent / "model" / f"{number}.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"0.json was not there .*2.json was not there .*model: 6 more files"):
        verify(run)


def test_versions_are_named(run, monkeypatch):
    now = surroundings.versions()
    assert {"torch", "diffusers", "numpy", "safetensors", "python", "implicit-diffusion"} == now.keys()
    monkeypatch.setattr(surroundings, "versions", lambda: now | {"torch": "99.1"})
    with pytest.raises(InvalidInputError, match=f"torch was {now['torch']} and is 99.1".replace("+", r"\+")):
        verify(run)
    verify(run, ["versions"])
    verify(run)


def test_a_tensor_is_compared_where_it_is_given(run):
    verify(run, inputs={"reference": torch.arange(3.0)})
    for other in (torch.arange(3.0) + 1, torch.arange(3.0).double(), torch.arange(3.0)[None]):
        with pytest.raises(InvalidInputError, match="reference was sha256"):
            verify(run, inputs={"reference": other})


def test_threads_are_as_they_were(run, capsys):
    here = torch.get_num_threads()
    saved = json.loads((run.path / "provenance.json").read_text())
    (run.path / "provenance.json").write_text(json.dumps(saved | {"threads": here + 1}))
    with verified(run):
        assert torch.get_num_threads() == here + 1
    assert torch.get_num_threads() == here
    assert (
        capsys.readouterr().out == f"threads   {here + 1}, as when the run began; {here} are usual here, and would "
        "round otherwise\n"
    )


def test_another_device_is_named_and_the_usual_one_may_take_its_place(run):
    saved = json.loads((run.path / "provenance.json").read_text())
    gone = {"name": "cuda:77", "kind": "H1"}
    (run.path / "provenance.json").write_text(json.dumps(saved | {"device": gone}))
    with pytest.raises(InvalidInputError, match="device cuda:77 was H1 and is not here"):
        verify(run)
    verify(run, ["device"])
    assert provenance.device_of(run) in ("cpu", "cuda", "mps", "xpu")
    verify(run)


def test_a_run_of_an_earlier_release_has_no_record(run):
    (run.path / "provenance.json").unlink()
    verify(run)  # nothing has been trained yet: it begins anew
    run.checkpoints.save(0, {})
    with pytest.raises(InvalidInputError, match=r"an earlier release began it.*accept_changes=\[.provenance"):
        verify(run)
    verify(run, ["provenance"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 10**5,
        '{"config": {}, "inputs": {"model": {"files": 1}}, "versions": {}, "threads": 1}',
    ],
    ids=range(6),
)
def test_a_damaged_record_is_one_line(run, text):
    (run.path / "provenance.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r"provenance.json is damaged"):
        verify(run)


def test_the_run_may_be_moved(run, tmp_path):
    run.path.rename(tmp_path / "elsewhere")
    verify(RunDirectory(tmp_path / "elsewhere"))
