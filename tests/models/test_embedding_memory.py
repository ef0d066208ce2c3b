"""Text encoders one at a time, and embeddings of many prompts in little memory."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.denoisers import embedding_table
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.conditions import Embedded
from implicit_diffusion.denoisers.embedding_table import EmbeddingTable, EmbeddingWriter
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models import prompts as prompts_module
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.models.prompts import embed_prompts
from tests.helpers import tiny

CPU = torch.device("cpu")
PROMPTS = ["a cat", "red dog", "a cat", "blue", "red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion_3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def encoders(monkeypatch):
    """Weak references to the text encoders that are loaded, with what was alive when each came and when it answered."""
    seen, together = [], []
    load = prompts_module.load_model

    def loading(checkpoint, place, part, *arguments, **options):
        assert not [name for name, model in seen if model() is not None], f"{part} comes while another is there"
        model = load(checkpoint, place, part, *arguments, **options)
        seen.append((part, weakref.ref(model)))

        def count(*_):
            alive = [other() for _, other in seen if other() is not None]
            together.append(sum(p.numel() for encoder in alive for p in encoder.parameters()))

        model.register_forward_hook(count)
        return model

    monkeypatch.setattr(prompts_module, "load_model", loading)
    return seen, together


def test_encoders_are_never_resident_together_and_make_what_the_pipeline_makes(folder, encoders, monkeypatch):
    seen, together = encoders
    pretrained = load_pretrained(folder)
    table = embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, PROMPTS, CPU)
    assert sorted(part for part, _ in seen) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    gc.collect()
    assert not any(model() for _, model in seen)
    monkeypatch.undo()
    pipeline = pretrained.pipeline  # all encoders at once
    largest = max(sum(p.numel() for p in getattr(pipeline, part).parameters()) for part, _ in seen)
    assert len(together) == 3 and max(together) == largest
    with torch.no_grad():
        words, _, pooled, _ = pipeline.encode_prompt([*PROMPTS, ""], None, None, do_classifier_free_guidance=False)
    assert torch.equal(table["encoder_hidden_states"], words) and torch.equal(table["pooled_projections"], pooled)
    assert all(len(column) == 4 for column in table.columns.values())  # distinct prompts, the empty one among them


@pytest.mark.slow
def test_the_network_comes_to_its_device_when_the_encoders_have_gone(folder, tmp_path, encoders, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\nred dog\n")
    (tmp_path / "rewards.py").write_text("def red(images): return images[:, 0].flatten(1).mean(1)")
    seen, _ = encoders
    move, moved = DiffusersDenoiser.to, []

    def moving(self, *arguments):
        gc.collect()
        moved.append([part for part, model in seen if model() is not None])
        return move(self, *arguments)

    monkeypatch.setattr(DiffusersDenoiser, "to", moving)
    options = {"model": str(folder), "prompts": tmp_path / "prompts.txt", "reward": f"{tmp_path}/rewards.py:red"}
    made = setup.build(setup_spec(Config(num_steps=3, **options)))
    assert len(seen) == 3 and moved == [[]]
    assert made.conditioning.table.columns["pooled_projections"].device == CPU


def test_encoders_whose_answers_are_not_side_by_side_are_refused(folder, monkeypatch):
    encode = prompts_module._encode
    monkeypatch.setattr(prompts_module, "_encode", lambda *a: [value + 1 for value in encode(*a)])
    pretrained = load_pretrained(folder)
    with pytest.raises(InvalidInputError, match="not their answers side by side"):
        embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, PROMPTS, CPU)


class Spy(torch.nn.Module):
    def forward(self, x, t, **condition):
        self.seen = condition
        return x


@pytest.mark.parametrize("limit", [2**28, 0])
def test_a_table_in_a_file_is_one_in_memory(limit, monkeypatch):
    monkeypatch.setattr(embedding_table, "IN_MEMORY", limit)
    shapes = {"words": (5, 2, 3), "pooled": (5, 3)}
    g = torch.Generator().manual_seed(0)
    words, pooled = (torch.randn(shape, generator=g) for shape in shapes.values())
    writer = EmbeddingWriter(shapes)
    for first in (0, 2, 4):  # two encoders, each in its own places
        writer.add(first, {"words": words[first : first + 2], "pooled": 0 * pooled[first : first + 2]})
    for first in (3, 0):
        writer.add(first, {"words": 0 * words[first : first + 3], "pooled": pooled[first : first + 3]})
    table = EmbeddingTable(writer.columns, torch.tensor([4, 0, 4, 1, 2, 3]))
    del writer
    gc.collect()
    spy = Embedded(Spy(), table)
    which = torch.tensor([2, 1, 5])
    spy(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3), prompt=which)
    expected = {"words": words[[4, 0, 3]], "pooled": pooled[[4, 0, 3]]}
    assert spy.denoiser.seen.keys() == expected.keys()
    for name, value in expected.items():
        assert spy.denoiser.seen[name].dtype == torch.float64
        assert torch.equal(spy.denoiser.seen[name], value.double()) and torch.equal(table[name][which], value)
    spy(torch.zeros(3, 1, device="meta"), torch.zeros(3), prompt=which)
    assert {value.device.type for value in spy.denoiser.seen.values()} == {"meta"}  # rows travel to where x is


def test_rows_that_there_are_not_are_refused():
    for rows in (torch.tensor([0, 3]), torch.tensor([-1])):
        with pytest.raises(InvalidInputError, match=r"rows must lie in 0..2"):
            EmbeddingTable({"a": torch.zeros(3, 2)}, rows)


PROGRAM = """
import sys, torch
from implicit_diffusion.denoisers import embedding_table
from implicit_diffusion.denoisers.conditions import Embedded
from implicit_diffusion.models import prompts
from implicit_diffusion.models.pretrained import load_pretrained

folder, embedding_table.IN_MEMORY = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
pretrained = load_pretrained(folder)
network, cpu, encode, seen = pretrained.denoiser, torch.device("cpu"), prompts._encode, []


def private():
    # without the pages of mapped files
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))


def encoding(*arguments):
    seen.append(private())
    return encode(*arguments)


prompts.embed_prompts(pretrained.checkpoint, network.model, ["warm"], cpu)
before, prompts._encode = private(), encoding
table = prompts.embed_prompts(pretrained.checkpoint, network.model, [f"{i}" for i in range(10000)], cpu)
x = torch.zeros(4, *pretrained.event_shape)
with torch.no_grad():
    u = Embedded(network, table)(x, torch.full((4,), 500.0), prompt=torch.tensor([0, 9999, 5000, 10000]))
assert u.isfinite().all() and (u[0] != u[1]).any()
print(max(*seen, private()) - before, sum(column.nbytes for column in table.columns.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_ten_thousand_prompts_take_64_megabytes(folder):
    """Of private memory, at every batch; the table has 344 MB, which are seen where it is held in memory."""
    for limit in ("2.7e8", "inf"):
        command = [sys.executable, "-c", PROGRAM, str(folder), limit]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        used, size = map(int, result.stdout.split())
        print(
            f"{used / 1e6:.1f} MB of private memory for a table of {size / 1e6:.1f} MB, in memory up to {limit} bytes"
        )
        assert size > 340 * 10**6
        assert used < 64 * 10**6 if limit != "inf" else used > size, (limit, used)
