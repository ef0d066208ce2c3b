"""The chain that a folder says it was fine-tuned for."""

import json
import random

import pytest
from diffusers import DDPMPipeline

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.models.chain_file import TrainedChain, read_chain, write_chain
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.tables.named import scheduler_for, table_for
from tests.helpers import tiny


def model(folder):
    DDPMPipeline(unet=tiny.unet(**tiny.PLAIN), scheduler=tiny.scheduler()).save_pretrained(folder)
    return folder


def test_digits_is_the_shipped_model_whatever_lies_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "chain.json").write_text("not of the shipped model")
    checkpoint = load_pretrained("digits").checkpoint
    assert checkpoint is None or read_chain(checkpoint.folder) is None


CHANGES = [None, [], {}, "x", -1, 0, 10**9, 1e300, float("nan"), [1.0], [[1.0]], [None], {"a": 1}, True]


def test_a_damaged_chain_is_an_error_of_ours(tmp_path):
    """Every key with values of other types, and files that are cut or no JSON."""
    folder = model(tmp_path / "model")
    table = table_for(scheduler_for(load_pretrained(folder).scheduler, "ddpm", clip=False), "ddpm", 3)
    write_chain(folder, TrainedChain(table, eta=0.5, guidance=2.0, null_class=1))
    path = folder / "chain.json"
    sound = json.loads(path.read_text())
    sound_chain = read_chain(folder)
    assert sound_chain.table.to_dict() == table.to_dict()
    assert (sound_chain.eta, sound_chain.guidance, sound_chain.null_class) == (0.5, 2.0, 1)
    texts = ["", "[]", "{}", path.read_text()[:200], "{" * 10**5, '{"a":' * 10**5]
    texts += [json.dumps(sound | {key: value}) for key in sound for value in CHANGES]
    texts += [json.dumps(sound | {"table": sound["table"] | {k: v}}) for k in sound["table"] for v in CHANGES]
    for text in random.Random(0).sample(texts, len(texts)):
        path.write_text(text)
        said, chain = None, None
        try:
            chain = read_chain(folder)
        except ImplicitDiffusionError as error:
            said = str(error)
        if said is None:
            assert len(chain.table) == 3
            assert isinstance(chain.eta, float | int | None)
        else:
            assert "chain.json" in said and "\n" not in said
    path.unlink()
    (tmp_path / "elsewhere.json").write_text(json.dumps(sound))
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidInputError, match=r"elsewhere\.json, outside of the model's folder"):
        read_chain(folder)
