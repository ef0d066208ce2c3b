"""Prompts beyond the length of a tokenizer: which are cut, and what of them, as the tokenizers themselves cut."""

import warnings

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models import cut_prompts, embed_prompts, load_pretrained
from implicit_diffusion.models.pipelines.cutting import CutPromptWarning, warn_of_cuts
from tests.helpers import tiny, tiny_pipelines

LONG = "a red cat, in snow"  # of 15 letters and a comma
PROMPTS = ["a cat", LONG, "ten letters", LONG + " and more"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """CLIP's and T5's, with 12 tokens each: CLIP marks the begin and the end of a text, T5 the end."""
    folder = tmp_path_factory.mktemp("words")
    return {"tokenizer": tiny.tokenizer(folder), "tokenizer_2": tiny_pipelines.t5()[1], "nothing": None, "vae": len}


def test_what_is_cut_is_what_the_tokenizer_leaves_out(tokenizers):
    cuts = cut_prompts(tokenizers, PROMPTS)
    assert [each.index for each in cuts] == sorted(each.index for each in cuts)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = tokenizers[name]
        own = {each.index: each for each in cuts if each.tokenizer == name}
        for i, prompt in enumerate(PROMPTS):
            whole = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            seen = tokenizer(prompt, truncation=True)["input_ids"]
            marks = tokenizer.num_special_tokens_to_add()
            assert (i in own) == (len(whole) + marks > 12) and len(seen) <= 12
            if i in own:
                assert own[i].tokens == len(whole) and own[i].kept == 12 - marks
                read = prompt.removesuffix(own[i].cut)
                assert prompt == read + own[i].cut
                assert tokenizer(read, add_special_tokens=False)["input_ids"] == whole[: own[i].kept]
                assert [token for token in seen if token in whole[: own[i].kept]] == whole[: own[i].kept]
    assert {each.tokenizer: each.cut for each in cuts if each.index == 1} == {
        "tokenizer": "snow",
        "tokenizer_2": "in snow",
    }


def test_the_pipeline_says_how_much_it_keeps(tokenizers, as_users_run):
    """The smaller one of the tokenizer's length and of the pipeline's max_sequence_length, given or by default."""

    class Pipeline:
        components = tokenizers

        def __call__(self, prompt=None, max_sequence_length=8):
            pass

    lengths = {each.tokenizer: each.kept for each in cut_prompts(Pipeline(), [LONG])}
    assert lengths == {"tokenizer": 6, "tokenizer_2": 7}
    lengths = {each.tokenizer: each.kept for each in cut_prompts(Pipeline(), [LONG], max_sequence_length=11)}
    assert lengths == {"tokenizer": 9, "tokenizer_2": 10}
    assert not cut_prompts({}, [LONG]) and not cut_prompts(tokenizers, ["short"])
    for wrong in ({"prompts": LONG}, {"prompts": [3]}, {"pipeline": 3}, {"max_sequence_length": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            cut_prompts(**({"pipeline": tokenizers, "prompts": [LONG]} | wrong))


def test_a_tokenizer_without_offsets_decodes_what_it_leaves_out(tokenizers):
    class Slow:
        model_max_length, is_fast = 12, False

        def __getattr__(self, name):
            return getattr(tokenizers["tokenizer"], name)

        def __call__(self, texts, **options):
            assert "return_offsets_mapping" not in options
            return tokenizers["tokenizer"](texts, **options)

    (fast,), (slow,) = (cut_prompts({"tokenizer": each}, [LONG]) for each in (tokenizers["tokenizer"], Slow()))
    assert (slow.tokens, slow.kept) == (fast.tokens, fast.kept)
    assert slow.cut.replace(" ", "") == fast.cut.replace(" ", "")


def test_a_warning_names_prompts_and_what_they_lose(tokenizers):
    with pytest.warns(CutPromptWarning) as caught:
        warn_of_cuts(tokenizers, [*PROMPTS, *[f"{LONG} {i}" for i in range(6)]])
    messages = [str(each.message) for each in caught]
    assert len(messages) == 2 and all(message.startswith("prompts: ") for message in messages)
    assert f"{LONG!r} loses " in messages[0] and "that tokenizer keeps" in messages[0] and "; and 3 more" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cuts(tokenizers, ["short"])


def test_embedding_warns_before_it_encodes(tmp_path, monkeypatch):
    pretrained = load_pretrained(tiny.stable_diffusion(tmp_path))
    load = pytest.fail
    monkeypatch.setattr("implicit_diffusion.models.prompts.load_model", lambda *a, **k: load("an encoder was loaded"))
    with (
        pytest.warns(CutPromptWarning, match="1 prompt is longer than the 10 tokens"),
        pytest.raises(pytest.fail.Exception),
    ):
        embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, ["a cat", LONG], torch.device("cpu"))
