"""Model cards with names from elsewhere in them: words, and neither HTML nor Markdown."""

import html
import inspect
import re
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.model_card import model_card
from implicit_diffusion.commands.pretrain import digits_card, images_card
from implicit_diffusion.commands.pretrain.config import Config as PretrainConfig
from implicit_diffusion.commands.pretrain.summary import ImagesSummary, Summary
from implicit_diffusion.commands.shared.formatting import markdown
from implicit_diffusion.digits.quality import Appearance, MMDBetweenHalves, Quality
from tests.helpers.toy_result import changed, digits_result

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "x\n\n<iframe src='http://a'></iframe>\n",
    "[click](javascript:alert(1))",
    "![x](http://a/b.png)",
    "a`b<b>c`d",
    "```\n<script>\n```",
    "**bold** _em_ ~~gone~~",
    "a|b",
    "---\nlicense: mit\n---",
    "# Title",
    "&lt;script&gt; &amp; <!-- ",
    "</code></pre><script>",
    "\u202eevil\x1b[31m\udc80",
    "C:\\new\\_x",
]
FORBIDDEN = ("<script", "<img", "<iframe", "<b>", "<!--", 'javascript:alert(1)"', "<a ", "<em>", "<s>")


def rendered(card):
    """HTML, by a reader that lets HTML through."""
    card.encode()
    body = card.split("\n---\n", 1)[1] if card.startswith("---\n") else card
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)


@pytest.mark.parametrize("words", ATTACKS)
def test_escaped_words_are_shown_as_they_are(words):
    shown = rendered(f"It is {markdown(words)} here.")
    plain = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(words.split()))
    assert html.unescape(re.fullmatch(r"<p>It is (.*) here\.</p>\n", shown)[1]) == plain
    assert "<" not in re.fullmatch(r"<p>(.*)</p>\n", shown)[1]


def images(words):
    config = PretrainConfig(data=words, channels=(8, 8))
    vars(config).update(prediction_type=words, beta_schedule=words)  # as if the types allowed it
    numbers = ImagesSummary(5, 2, (3, 8, 16), (), ())
    return images_card.model_card(
        config, Summary({}, numbers, 9, loss_train=0.1, loss_held_out=0.2, seconds=1.0, updates=1)
    )


def exported(words):
    config = Config(model=f"a/{words}", reward=words, scheduler="ddpm", num_steps=4)
    result = changed(digits_result(), pipeline_is_the_chain=False, pipeline=words)
    chain = SimpleNamespace(pretrained_rows=(), num_steps=4, table=SimpleNamespace(name=words))
    return inspect.unwrap(model_card)(config, result.summary, chain)


@pytest.mark.parametrize("words", ATTACKS)
@pytest.mark.parametrize("card", [images, exported])
def test_cards_have_the_elements_of_an_innocent_one(card, words):
    """The same tags in the same order, whatever the names are."""
    tags = [re.findall(r"<[^>]*>", rendered(card(name))) for name in ("innocent", words)]
    assert tags[0] == tags[1]
    assert not any(bad in card(words).lower() for bad in FORBIDDEN)


def test_the_digits_card_escapes_its_settings():
    numbers = Appearance(*[0.5] * 5)
    quality = Quality(
        **vars(numbers),
        class_histogram=[0.1] * 10,
        mmd=0.5,
        mmd_reference=MMDBetweenHalves(0.1, 0.2),
        held_out=numbers,
    )
    config = PretrainConfig(channels=(8,))
    vars(config).update(prediction_type="<script>", beta_schedule="<img src=x>")  # as if the types allowed it
    images = ImagesSummary(5, 2, (1, 8, 8), (), ())
    accuracies = {"classifier_accuracy": 0.5, "judge_accuracy": 0.5}
    summary = Summary({}, images, 1, 0.5, 0.5, 1.0, 3000, quality={"10": quality}, **accuracies)
    card = digits_card.model_card(config, summary)
    assert "<script" not in card and "<img" not in card
