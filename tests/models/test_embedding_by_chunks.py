"""Prompts of pipelines that are read off: embedded by chunks, as in one call, with encoders loaded one at a time."""

import gc
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline, ZImagePipeline

from implicit_diffusion.denoisers import embedding_table
from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.models.pipelines import embedding, loading
from implicit_diffusion.models.pipelines.arguments import PerSample, filled, leaves, same
from implicit_diffusion.models.pipelines.columns import Columns, Uneven, merged
from implicit_diffusion.models.pipelines.loading import load_pipeline
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pipelines.recording import NetworkCall
from implicit_diffusion.noise import Noise
from tests.helpers import tiny_pipelines

PROMPTS = ["a cat", "red dogs", "a", "a cat", "b", "a cat", "of the red dogs", "cat"]
NEGATIVES = ["", "dogs", "", "", "a red cat and a dog", "dogs", "", "of"]


def arguments(probed, which=None):
    """What the network is called with for these prompts, by default for all in their order."""
    plan = probed.denoiser.plan
    which = torch.arange(plan.prompts) if which is None else which
    x, t = Noise(0).normal((len(which), *probed.event_shape), 0), torch.full((len(which),), 500.0)
    return [filled(call.roles, x, t, plan.rows_of(which), len(call.weights)) for call in plan.at(x.device)]


def by_prompt(probed):
    return [value for call in probed.denoiser.plan.calls for r in leaves(call.roles) if isinstance(r, PerSample)
            for value in r.values]  # fmt: skip


def read(monkeypatch, pipeline, chunk, limit=2**28, prompts=PROMPTS, **call):
    monkeypatch.setattr(embedding, "CHUNK", chunk)
    monkeypatch.setattr(embedding_table, "IN_MEMORY", limit)
    return read_pipeline(pipeline, 2, prompts=prompts, **call)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A saved Stable Diffusion XL, which has two text encoders."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_pipelines.FAMILIES["Stable Diffusion XL"](folder / "made").pipeline.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture
def loads(monkeypatch):
    """How often each text encoder is loaded; it fails where one comes while another one is there."""
    alive, count, own = weakref.WeakSet(), Counter(), loading.load_model

    def load_model(checkpoint, folder, part, *args, **kwargs):
        loaded = own(checkpoint, folder, part, *args, **kwargs)
        if part.startswith("text_encoder"):
            if alive:
                gc.collect()
            assert not alive, f"{part} comes while another one is there"
            alive.add(loaded)
            count[part] += 1
        return loaded

    monkeypatch.setattr(loading, "load_model", load_model)
    return count


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)


@pytest.mark.skipif(OLD, reason="products of this torch are rounded by their number of rows")
@pytest.mark.parametrize("limit", [0, pytest.param(2**28, marks=pytest.mark.slow)])
def test_chunks_are_one_call_to_the_bit(sdxl, loads, monkeypatch, limit):
    """With duplicates, a negative prompt each, and two encoders that are loaded once for all of the four chunks."""
    call = {"negative_prompt": NEGATIVES, "guidance_scale": 5.0}
    one = read(monkeypatch, load_pipeline(sdxl), 100, **call)
    before = loads.total()
    held = one.denoiser.plan.kept
    ours = read(monkeypatch, load_pipeline(sdxl), 2, limit, **call)
    assert loads.total() == 2 * before
    assert ours.denoiser.plan.kept == (held if limit else 0) and held > 0
    assert same(arguments(ours), arguments(one))
    theirs = read(monkeypatch, DiffusionPipeline.from_pretrained(sdxl), 100, **call)
    assert same(arguments(ours), arguments(theirs))
    assert ours.denoiser.plan.rows.tolist() == [0, 1, 2, 0, 3, 4, 5, 6]  # a pair of the same words has one row
    words = [value for value in by_prompt(ours) if value.ndim == 3]
    assert [len(value) for value in words] == [7, 7]
    assert not same(arguments(ours, torch.tensor([0])), arguments(ours, torch.tensor([5])))
    assert len(ours.denoiser.plan.calls) == 1


@pytest.mark.slow
def test_numbers_that_depend_on_both_encoders(sdxl, loads, monkeypatch):
    """Every chunk loads both, one after the other."""

    class Both(DiffusionPipeline.from_pretrained(sdxl).__class__):
        def encode_prompt(self, *args, **kwargs):
            words, none, pooled, other = super().encode_prompt(*args, **kwargs)
            return words * pooled.mean(1)[:, None, None], none, pooled, other

    def pipeline():
        made = load_pipeline(sdxl)
        made.__class__ = Both
        return made

    prompts = PROMPTS[:3]
    one = read(monkeypatch, pipeline(), 100, prompts=prompts)
    before = loads.total()
    ours = read(monkeypatch, pipeline(), 2, prompts=prompts)
    assert loads.total() > 2 * before and same(arguments(ours), arguments(one))


def embedding_of(text, width, extra=1):
    return torch.stack([torch.sin(torch.arange(1.0, width + 1) * (ord(letter) + extra)) for letter in text or " "])


class PaddedQwen(QwenImagePipeline):
    """Embeds by letters, pads to the longest text of the call, and gives no mask where nothing is padded."""

    def encode_prompt(self, prompt, prompt_embeds=None, prompt_embeds_mask=None, **options):
        embeds = [embedding_of(text, 12) for text in prompt]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e), dtype=torch.long) for e in embeds], True)
        return torch.nn.utils.rnn.pad_sequence(embeds, True), None if mask.all() else mask


class ListingZ(ZImagePipeline):
    """Embeds by letters, and gives a list of tensors."""

    def encode_prompt(self, prompt, negative_prompt=None, **options):
        negative = [negative_prompt or ""] * len(prompt) if not isinstance(negative_prompt, list) else negative_prompt
        return tuple([embedding_of(text, 16) for text in texts] for texts in (prompt, negative))


def other_class(name, tmp_path, made):
    family = tiny_pipelines.FAMILIES[name](tmp_path)
    family.pipeline.__class__ = made
    return family.pipeline


def test_padding_is_that_of_the_longest_prompt_in_every_chunk(tmp_path, monkeypatch):
    """And the mask, which one prompt alone does not have, has an entry per prompt."""
    pipeline = other_class("Qwen-Image", tmp_path, PaddedQwen)
    one, ours = (read(monkeypatch, pipeline, chunk, height=16, width=16) for chunk in (100, 2))
    assert same(arguments(ours), arguments(one))
    longest = max(map(len, PROMPTS))
    some = torch.tensor([6, 2, 1])
    (given,) = arguments(ours, some)
    assert given["encoder_hidden_states"].shape == (3, longest, 12)
    assert given["encoder_hidden_states_mask"].sum(1).tolist() == [len(PROMPTS[i]) for i in some]
    one_mask = read(monkeypatch, pipeline, 2, prompts=["red", "cat", "dog", "a"][:3], height=16, width=16)
    assert arguments(one_mask)[0]["encoder_hidden_states_mask"] is None
    x = Noise(0).normal((1, *ours.event_shape), 0)
    alone = read_pipeline(pipeline, 2, prompts=["red dogs"], height=16, width=16).denoiser
    u = ours.denoiser(x, torch.tensor([500.0]), prompt=torch.tensor([1]))
    torch.testing.assert_close(u, alone(x, torch.tensor([500.0])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [2**28, 0])
def test_lists_keep_the_lengths_of_their_prompts(tmp_path, monkeypatch, limit):
    pipeline = other_class("Z-Image", tmp_path, ListingZ)
    call = {"height": 16, "width": 16, "guidance_scale": 3.0, "negative_prompt": NEGATIVES}
    one, ours = (read(monkeypatch, pipeline, *size, **call) for size in ((100,), (2, limit)))
    assert same(arguments(ours), arguments(one))
    (words,) = (value for value in arguments(ours)[0].values() if isinstance(value, list) and value[0].ndim == 2)
    assert sorted(map(len, words)) == sorted(max(1, len(text)) for text in PROMPTS + NEGATIVES)


def test_what_the_pipeline_makes_uneven_is_embedded_in_one_call(tmp_path, monkeypatch):
    """Texts whose embeddings are longer than their words say: no anchor foresees that."""

    class Surprising(PaddedQwen):
        def encode_prompt(self, prompt, **options):
            return super().encode_prompt([text.replace("cat", "an animal that purrs") for text in prompt])

    pipeline = other_class("Qwen-Image", tmp_path, Surprising)
    prompts = ["a", "of red dogs", "b", "cat"]
    one, ours = (read(monkeypatch, pipeline, chunk, prompts=prompts, height=16, width=16) for chunk in (100, 1))
    assert same(arguments(ours), arguments(one))


def test_what_depends_on_prompts_otherwise_is_refused(tmp_path, monkeypatch):
    class Odd(PaddedQwen):
        def encode_prompt(self, prompt, **options):
            embeds, mask = super().encode_prompt(prompt)
            return embeds, None if mask is None else torch.ones(len(prompt) + 5, embeds.shape[1], dtype=torch.long)

    pipeline = other_class("Qwen-Image", tmp_path, Odd)
    with pytest.raises(NonAffineError, match="argument encoder_hidden_states_mask depends on the number of samples"):
        read(monkeypatch, pipeline, 100, height=16, width=16)


def calls(*values, **constant):
    return [NetworkCall({"words": torch.cat(values), **constant}, [])]


def test_columns_refuse_what_does_not_fit_together():
    from implicit_diffusion.models.pipelines.arguments import Constant

    columns = Columns([{"words": PerSample(1), "n": Constant()}], 4)
    columns.add(columns.entries(calls(torch.ones(3, 2), n=1), 3, 2), 2)
    with pytest.raises(Uneven, match="arguments of the network depend on the prompts"):
        columns.entries(calls(torch.ones(3, 2), n=2), 3, 2)
    with pytest.raises(Uneven, match="words has 4 entries for 3 prompts"):
        columns.entries(calls(torch.ones(4, 2), n=1), 3, 2)
    with pytest.raises(Uneven, match="differ in shape"):
        columns.add(columns.entries(calls(torch.ones(3, 5), n=1), 3, 2), 2)
    columns.add(columns.entries(calls(2 * torch.ones(3, 2), n=1), 3, 2), 2)
    (bound,) = columns.bound()
    assert bound["words"].values[0].tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]] and bound["n"].value == 1


def test_of_an_encoder_only_its_numbers_are_taken():
    old, silent, new = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 0, 9]), torch.tensor([0.0, 5, 9])
    assert merged([old, [old]], [silent, [silent]], [new, [new]])[0].tolist() == [1, 5, 3]


PROGRAM = """
import sys, torch
from implicit_diffusion.denoisers import embedding_table
from implicit_diffusion.models.pipelines.loading import load_pipeline
from implicit_diffusion.models.pipelines import reading
from implicit_diffusion.models.pipelines.recording import Recorder

folder, embedding_table.IN_MEMORY = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
pipeline, own, seen = load_pipeline(folder), Recorder.run, []


def private():
    # without the pages of mapped files
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))


def run(*arguments):
    seen.append(private())
    return own(*arguments)


options = {"negative_prompt": "red", "guidance_scale": 5.0}
reading.read_pipeline(pipeline, 1, prompts=["warm", "a cat"], **options)
before, Recorder.run = private(), run
probed = reading.read_pipeline(pipeline, 1, prompts=[f"{i}" for i in range(10000)], **options)
x = torch.zeros(4, *probed.event_shape)
with torch.no_grad():
    u = probed.denoiser(x, torch.full((4,), 500.0), prompt=torch.tensor([0, 9999, 5000, 3]))
assert u.isfinite().all() and (u[0] != u[1]).any()
from implicit_diffusion.models.pipelines.placing import bytes_held
print(max(*seen, private()) - before, sum(bytes_held(call.roles) for call in probed.denoiser.plan.calls))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_ten_thousand_prompts_take_64_megabytes(sdxl):
    """Of private memory, at every chunk, all embeddings aside: these are seen where they are held in memory."""
    private, sizes = [], []
    for limit in ("1e7", "inf"):
        command = [sys.executable, "-c", PROGRAM, str(sdxl), limit]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        used, size = map(int, result.stdout.split())
        private.append(used)
        sizes.append(size)
        print(f"{used / 1e6:.1f} MB of private memory for {size / 1e6:.1f} MB, in memory up to {limit} bytes")
    assert sizes[0] == sizes[1] > 15 * 10**6 and private[0] < 64 * 10**6
    assert private[1] - private[0] > 0.8 * sizes[0]
