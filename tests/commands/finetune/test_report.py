"""The report and its figures, on made-up results: files, self-containedness, escaping, warnings."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from implicit_diffusion.commands.finetune.by_weights import by_weights
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.model_card import model_card
from implicit_diffusion.commands.finetune.report.figures import draw
from implicit_diffusion.commands.finetune.report.frontier import frontier, tangent_curve
from implicit_diffusion.commands.finetune.report.headline import headline_of, opening, print_headline, smaller_rate
from implicit_diffusion.commands.finetune.report.report import command, write_report
from implicit_diffusion.commands.finetune.report.run_warnings import run_warnings
from implicit_diffusion.commands.finetune.report.samples import samples
from implicit_diffusion.commands.finetune.report.training import cost, staleness, training
from implicit_diffusion.commands.finetune.summary import Summary
from implicit_diffusion.commands.shared.drawing import smooth
from implicit_diffusion.commands.shared.formatting import number, percent
from implicit_diffusion.evaluation import Bound, bound, judge
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.runs import RunDirectory
from tests.helpers.oracles import affine_chain
from tests.helpers.toy_result import BETA, MEAN, STD, changed, colour_result, digits_result, evaluation, quality

pytestmark = pytest.mark.drawn
ALL = ["samples", "frontier", "training", "hacking", "cost", "staleness"]


class Page(HTMLParser):
    """Collects tags with attributes, checks that tags are closed in order."""

    VOID = ("meta", "img", "link", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def good():
    return digits_result()


def written(result, directory, figures=()):
    return write_report(result, list(figures), RunDirectory.create(directory)).read_text()


def reached_rows(text):
    return re.findall('<th scope="row">(.*?)</th>', text.partition("What was reached")[2].partition("</section>")[0])


def titles(result, *, warning=True):
    return [each.title for each in run_warnings(result) if each.serious is warning]


def headline(before, after, exported, beta, lr=1e-4, advise=True):
    return headline_of(judge(before, after, exported, beta), lr=lr, advise=advise)


def test_a_good_run(good, tmp_path):
    directory = RunDirectory.create(tmp_path / "run")
    figures = draw(good, directory)
    assert [f.name for f in figures] == ALL
    for figure in figures:
        assert figure.path == directory.figure(figure.name)
        assert imread(figure.path).shape[1] == 1000
        assert figure.title and figure.caption.endswith(".")
    path = write_report(good, figures, directory)
    assert path == directory.path / "report.html"
    text = path.read_text()
    tags = Page(text).tags
    assert "No warnings" in text and "this run" in text and "DiffusionPipeline.from_pretrained" in text

    images = [a for tag, a in tags if tag == "img"]
    assert len(images) == len(ALL)
    assert all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in images)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") or name in ("href", "srcset") for _, a in tags for name in a)
    assert not re.search(r"url\(|@import|https?://", text)


def test_a_small_gain_is_seen_in_the_headline(good, tmp_path):
    rewards = {"reward_before": -0.39208, "reward_after": -0.38860, "reward_gain": 0.00348}
    small = changed(good, **{name: Estimate(reward, 1e-4) for name, reward in rewards.items()})
    page = write_report(small, [], RunDirectory.create(tmp_path / "run")).read_text()
    assert "−0.3921 →</span> −0.3886" in page


@pytest.mark.slow
def test_a_model_that_is_not_digits_in_a_nested_loop(tmp_path):
    """No quality, three channels, no staleness; with three updates nothing was held out on the way."""
    result = colour_result()
    result = replace(result, metrics=result.metrics[:3])
    directory = RunDirectory.create(tmp_path)
    figures = draw(result, directory)
    assert [f.name for f in figures] == ALL[:-1]
    text = write_report(result, figures, directory).read_text()
    assert "judge" not in text and "nan" not in re.sub('base64,[^"]*', "", text)
    assert titles(result) == []


def test_a_run_without_path_kl(good, tmp_path):
    """The penalty on drifts has no bound: its numbers are None and are left out."""
    absent = [name for name in vars(good.summary.headline) if name.startswith(("path_kl", "j_", "captured"))]
    plan = replace(good.plan, bounds=(), gain_se=(), j_gain_se=())
    config = replace(good.config, penalty="drift")
    result = replace(changed(good, **dict.fromkeys(absent)), bound=None, plan=plan, config=config)
    weighted = by_weights(good.before, good.after, judge(good.before, good.after, good.after, None))
    result = replace(result, summary=replace(result.summary, by_weights=weighted))
    assert frontier(result) is None and cost(result) is None
    figure, _, caption = training(result)
    assert len(figure.axes) == 1 and "KL" not in caption and "optimum" not in caption
    text = written(result, tmp_path)
    assert "Captured" not in text and "None" not in text
    assert reached_rows(text) == ["pretrained", "trained"] and "with a penalty on drifts there is no law" in text
    assert "drift weight 3.3" in text and "KL weight" not in text and "the KL," not in text
    assert titles(result) == []


def test_the_frontier_shows_gains_over_the_pretrained_model_on_the_same_noise(good):
    """However much the held-out noise of the training earns before it, and with the star on the line."""
    luck = 5.0
    metrics = [m | {"held_out_reward": m["held_out_reward"] + luck} for m in good.metrics if "held_out_reward" in m]
    before = good.summary.training.held_out_reward_before
    lucky = replace(changed(good, held_out_reward_before=before + luck), metrics=metrics)
    for result in (good, lucky):
        axes = frontier(result)[0].axes[0]
        dots = next(c for c in axes.collections if "training" in c.get_label())
        gains = [row[1] - before for row in good.column("held_out_path_kl", "held_out_reward")]
        assert np.asarray(dots.get_offsets())[:, 1] == pytest.approx(np.array(gains))
        lines = {line.get_label(): line.get_xydata() for line in axes.lines}
        curve = lines["best possible, by KL weight"]
        optimum = good.bound.reward - good.summary.headline.reward_before.mean
        assert np.interp(good.bound.path_kl, *curve.T) == pytest.approx(optimum, abs=1e-3)


def test_a_summary_goes_to_json_and_back(good):
    """Also where numbers do not exist, and with all that only some runs have."""
    kept = {"updates": 3, "fall": 0.5}
    some = changed(good, clipping=ClippingEffect(0.01, 0.3, 36.0, 36.1), kept=kept, stopped="target", worse="J rose.")
    none = changed(colour_result(), path_kl=None, j_before=None, j_bound=None, captured=None, captured_unknown="why")
    for result in (good, some, none):
        content = json.loads(json.dumps(result.summary.to_json(), allow_nan=False))
        assert Summary.from_json(content) == result.summary
        assert content["reward_gain"], content["reward_gain_se"] == result.summary.headline.reward_gain
    content = none.summary.to_json()
    assert content["j_bound"] is content["j_bound_se"] is content["quality_after"] is None
    with pytest.raises(KeyError, match="updates"):
        Summary.from_json({name: value for name, value in content.items() if name != "updates"})


def test_what_there_is_no_data_for_is_not_drawn(good):
    flat = replace(good, metrics=[], before=replace(good.before, samples=good.before.samples.flatten(2)))
    assert training(flat) is None and staleness(flat) is None and samples(flat) is None


def test_what_a_user_names_is_escaped(good, tmp_path):
    evil = '<script>alert("x")</script>'
    config = replace(good.config, model=f"folder/{evil}", reward=evil)
    text = written(replace(changed(good, stopped=evil), config=config), tmp_path)
    assert "<script" not in text and "&lt;script&gt;" in text
    Page(text)


def test_no_false_alarm(good):
    assert run_warnings(good) == []
    assert run_warnings(changed(good, quality_after=quality(mmd=0.05, nearest_distance=2.5))) == []


@pytest.mark.parametrize(
    ("summary", "title"),
    [
        ({"captured": Estimate(0.7, 0.02)}, "Much of the possible gain is left"),
        ({"stopped": "no progress"}, "The run stopped early"),
        ({"path_kl": Estimate(0.9, 0.01)}, "The KL is above its target"),
        ({"exported_less_after": Estimate(-2.0, 0.1)}, "The exported model differs from the trained chain"),
        ({"reward_gain": Estimate(0.1, 0.1)}, "No clear gain"),
        ({"reward_gain": Estimate(-1.0, 0.1)}, "The reward fell"),
        (
            {"quality_after": quality(judge_confidence=0.8)},
            "Reward hacking suspected: the second classifier lost",
        ),
        ({"quality_after": quality(nearest_distance=3.9)}, "Reward hacking suspected: samples left the real digits"),
        ({"quality_after": quality(memorised=0.2)}, "The model copies its training data"),
    ],
)
def test_warnings(good, tmp_path, summary, title):
    result = changed(replace(good, config=replace(good.config, target_kl=0.6)), **summary)
    assert title in titles(result)
    text = written(result, tmp_path)
    assert title in text and "No warnings" not in text


def test_a_target_that_was_not_reached_is_noted(good):
    aimed = replace(good, config=replace(good.config, target_kl=0.6))
    notes = [run_warnings(changed(aimed, path_kl=Estimate(kl, 0.01))) for kl in (0.58, 0.4)]
    assert [[note.title for note in each] for each in notes] == [[], ["The KL is below its target"]]


@pytest.mark.parametrize(
    ("sign", "source", "reason"),
    [(1, "pretrained", "The captured share has a standard error of "), (-1, "trained", "may be nothing")],
)
def test_a_share_of_nothing_is_not_reported(sign, source, reason):
    """Where the possible gain, or the share of it, may be none within its error, none is given, but the reason is."""
    noise = torch.Generator().manual_seed(0)
    shift = 50 * torch.randn(16, 1, generator=noise)
    before = evaluation(starts=16, repeats=8)
    after = replace(before, reward=before.reward + sign * shift)
    judged = headline(before, after, after, BETA)
    assert judged.j_bound_from == source and judged.j_bound.mean < judged.j_before.mean
    assert judged.captured is None and reason in judged.captured_unknown and judged.worse is None
    assert headline(before, before, before, BETA).captured.mean == 0.0


def ruined(shift=8.0):
    """A chain that was shifted far beyond the optimum, by 8 in place of 1: J rises from −36 to 3.3 · 32 − 62.4 = 43."""
    before, after = evaluation(repeats=8), evaluation(shift, repeats=8)
    return after, judge(before, after, after, BETA)


def test_a_ruined_chain_does_not_tell_the_bound():
    """J* is −m − σ²/2β = −37.65 whatever became of the chain; the pretrained samples know it."""
    after, judgement = ruined()
    assert judgement.bound_from == "pretrained" and judgement.bound.trusted
    exact = -MEAN - STD**2 / (2 * BETA)
    assert abs(judgement.bound.j - exact) < 4 * judgement.bound.j_se < 1
    assert bound(after, BETA).j > exact + 10
    good = judge(evaluation(repeats=8), evaluation(0.93, repeats=8), evaluation(0.93, repeats=8), BETA)
    assert good.bound_from == "trained" and not good.worse and good.captured.mean > 0.98


def test_a_run_that_made_things_worse_says_so_first(good, tmp_path, capsys):
    """In the summary, on the terminal, in the report and in the model card, with a rate to try."""
    _, judgement = ruined()
    said = headline_of(judgement, lr=0.03, advise=True)
    summary = replace(good.summary, headline=said)
    assert next(iter(summary.to_json())) == "worse"
    worse = said.worse
    assert re.match(r"Fine-tuning made the model worse: J .* rose by \S+ ±\N{NO-BREAK SPACE}\S+, from −35\.", worse)
    assert worse.endswith("Try --lr 0.0003, 100 times smaller.")  # (43 + 37.65)/1.65 = 49
    assert said.captured is None and "J rose" in said.captured_unknown
    result = replace(good, summary=summary, bound=judgement.bound)
    assert titles(result)[0] == "J rose"
    directory = RunDirectory.create(tmp_path / "run")
    page = write_report(result, [], directory).read_text()
    assert f'<p class="lead"><b>{worse}</b> Fine-tuning raised' in page
    assert "which pretrained samples of the final noise determine more sharply" in frontier(result)[2]
    print_headline(summary, directory, tmp_path)
    assert capsys.readouterr().out.startswith(worse)
    chain, _ = affine_chain(2, 1)
    card = model_card(good.config, summary, chain)
    assert card.split("\n\n")[1] == f"**{worse}**"


@pytest.mark.parametrize(
    ("excess", "possible", "factor"),
    [(58.7, 1.28, 100), (696.0, 1.28, 1000), (1.01, 1.0, 10), (1e30, 1.0, 10**6), (5.0, 0.0, 10)],
)
def test_the_rate_to_try_brings_j_below_where_it_began(excess, possible, factor):
    """Noise keeps J above J* in proportion to the rate: excess/factor < possible."""
    assert smaller_rate(excess, possible) == factor
    assert excess / factor < possible or possible == 0 or factor == 10**6


def test_without_a_finite_j_a_run_is_worse():
    before = evaluation(repeats=8)
    after = replace(before, path_kl=before.path_kl + float("inf"), log_ratio=before.log_ratio + float("inf"))
    ruined = headline(before, after, after, BETA)
    assert "is no longer finite" in ruined.worse and ruined.captured is None
    fell = replace(before, reward=before.reward - 1)
    assert headline(before, fell, fell, 0.0).worse  # J is minus the reward
    assert headline(before, before, before, None).worse is None
    assert "the mean reward, which it raises, fell by " in headline(before, fell, fell, None).worse  # at least


def test_a_run_that_was_stopped_says_so_first(good, tmp_path, capsys):
    """After what is worse than that, and once: on the terminal, in the report and on the card."""
    stopped = "the path KL on held-out noise, 0.1 nats, reached the target 0.1"
    result = changed(good, stopped=stopped)
    first = f"Stopped after update 250: {stopped}."
    assert opening(None, stopped, 250) == [first] and opening(None, None, 250) == []
    assert opening("J rose.", stopped, 250) == ["J rose.", first]
    assert f'<p class="lead"><b>{first}</b> Fine-tuning raised' in written(result, tmp_path)
    print_headline(result.summary, RunDirectory(tmp_path), tmp_path / "report.html")
    assert capsys.readouterr().out.startswith(first)
    ends = good.before, good.after, good.after
    advice = (headline(*ends, 99.0, advise=given).worse for given in (True, False))
    assert [" Try " in text for text in advice] == [True, False]


def test_pixels_out_of_range(good):
    bright = replace(good.after, samples=good.after.samples + 0.5)
    assert titles(replace(good, after=bright)) == ["Pixels left the range of an image"]


def test_a_lucky_bound(good):
    assert titles(replace(good, bound=replace(good.bound, effective_samples=1.3, trusted=False))) == [
        "The bound is uncertain"
    ]


@pytest.mark.parametrize(
    ("summary", "title"),
    [
        ({"stopped": "path KL 0.5 nats reached the target 0.5", "reached_target": True}, "The run stopped early"),
        ({"captured": None, "captured_unknown": "It may be nothing."}, "The captured share is unknown"),
        ({"quality_after": quality(mmd=0.2)}, "As a set, the samples are far from real digits"),
        ({"quality_after": quality(class_histogram=[0.9] + 9 * [0.1 / 9])}, "One class took over"),
        ({"clipping": ClippingEffect(0.01, 0.3, 36.0, 36.1)}, "Clipping is off"),
    ],
)
def test_notes_are_no_warnings(good, tmp_path, summary, title):
    result = changed(good, **summary)
    assert titles(result, warning=False) == [title] and titles(result) == []
    text = written(result, tmp_path)
    assert title in text and "No warnings" in text


def test_the_command_can_be_pasted():
    line = command(Config(model="my model", kl_weight=2.5, no_clip=True, out=Path("runs/x")))
    for words in ("--model 'my model' \\\n", "--kl-weight 2.5 \\\n", "--no-clip \\\n"):
        assert f"  {words}" in line
    assert line.startswith("implicit-diffusion finetune \\\n  ")
    assert not any(word in line for word in ("--out", "--plan", "--target-kl", "--compile", "None", "False"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.94412, 0.0061), "0.944 ±\u00a00.006"),
        ((-37.6, 0.07), "−37.60 ±\u00a00.07"),
        ((1234.5, 20.0), "1234 ±\u00a020"),
        ((0.000123,), "0.000123"),
        ((0.0,), "0"),
        ((None,), "—"),
        ((float("nan"), 1.0), "—"),
    ],
)
def test_numbers_are_written_to_their_error(arguments, text):
    assert number(*arguments) == text


def test_percent():
    assert (percent(0.5), percent(0.9731, 0.0068)) == ("50.0\u00a0%", "97.3 ±\u00a00.7\u00a0%")


def test_the_curve_is_exact_for_a_gaussian_reward():
    """There R = m + σ √(2 KL), a straight line in √KL with slope dR/dKL = β at KL = (σ/β)²/2."""
    m, sigma = 1.0, 0.5
    j = 0.0, 0.0
    bounds = [Bound(b, *j, m + sigma**2 / b, 0.0, (sigma / b) ** 2 / 2, 0.0, 9.0, True) for b in (2.0, 1.0, 0.25)]
    kl = np.linspace(0, 2, 50)
    assert tangent_curve(m, bounds, kl) == pytest.approx(m + sigma * np.sqrt(2 * kl))
    assert np.isnan(tangent_curve(m, bounds, np.array([2.1]))).all()


def test_curves_end_where_a_draining_queue_sees_no_batch_any_more(good):
    gone = {"reward": None, "path_kl": None, "objective": None, "phase": "draining"}
    drained = [m | gone if m["updates"] > 240 else m for m in good.metrics]
    lines = [{k: v for k, v in m.items() if v is not None} for m in drained]
    figure = training(replace(good, metrics=lines))[0]
    for axes in figure.axes:
        (curve,) = (line.get_xdata() for line in axes.lines if line.get_label() == "training noise, smoothed")
        assert list(curve) == list(range(1, 241))


def test_smooth_keeps_straight_lines_and_shortens_windows_at_the_ends():
    assert smooth(np.arange(9.0), 2)[2:-2] == pytest.approx(np.arange(2.0, 7.0))
    assert smooth(np.array([1.0, 3.0]), 5) == pytest.approx([2.0, 2.0])
