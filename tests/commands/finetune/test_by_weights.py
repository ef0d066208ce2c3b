"""The trained chain by the weights of its judged trajectories: summary, report, headline and picture."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from implicit_diffusion.commands.finetune.by_weights import NEARBY, by_weights
from implicit_diffusion.commands.finetune.report.frontier import frontier
from implicit_diffusion.commands.finetune.report.headline import print_headline
from implicit_diffusion.commands.finetune.report.reached import reached
from implicit_diffusion.commands.finetune.summary import Summary
from implicit_diffusion.evaluation import Estimate, judge
from implicit_diffusion.runs import RunDirectory
from tests.helpers.toy_result import BETA, STD, digits_result, evaluation


@pytest.fixture(scope="module")
def good():
    return digits_result()


def rows(page):
    """The cells of every row of the table, without the marks of numbers that are not trusted."""
    found = re.findall(r"<tr><th scope=.row.>(.*?)</th>(.*?)</tr>", page)
    return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in found}


def weighted_by_hand(result, **laws):
    """The result with other laws."""
    return replace(result, summary=replace(result.summary, by_weights=replace(result.summary.by_weights, **laws)))


def test_every_law_is_that_of_its_kl_weight(good):
    """In closed form: the tilt shifts z by σ/β, at the β of the run and at all others."""
    law = good.summary.by_weights
    assert [each.kl_weight / BETA for each in law.reweighted_nearby] == pytest.approx(NEARBY)
    for each in (law.reweighted, *law.reweighted_nearby):
        shift = STD / each.kl_weight
        for estimate, exact in (
            (each.reward_gain, STD * shift),
            (each.path_kl, shift**2 / 2),
            (each.j_fall, STD * shift / 2),
        ):
            if each.trusted:
                assert abs(estimate.mean - exact) < 4 * estimate.error < 0.5 * exact, each
    assert law.reweighted.trusted and not law.reweighted_nearby[-1].trusted
    share, error = law.reweighted_captured
    assert abs(share - 1) < 3 * error < 0.2


def test_the_result_ends_with_the_weighted_chain_and_the_bound(good, capsys, tmp_path):
    table = rows(reached(good))
    assert list(table) == ["pretrained", "trained", "trained and weighted", "bound"]
    law, captured = good.summary.by_weights.reweighted, good.summary.headline.captured
    values = [
        float(re.split("[\N{NO-BREAK SPACE} ]", cell)[0].replace("−", "-")) for cell in table["trained and weighted"]
    ]
    share = 100 * good.summary.by_weights.reweighted_captured.mean
    exact = law.reward.mean, law.reward_gain.mean, law.path_kl.mean, law.j.mean, law.j_fall.mean, share
    assert values == pytest.approx(exact, abs=0.6, rel=0.02)
    assert table["trained"][-1].startswith(f"{100 * captured.mean:.1f}") and table["bound"][-1].startswith("100")
    assert table["pretrained"][2] == "0" and "same trajectories" in reached(good)
    print_headline(good.summary, RunDirectory(tmp_path), tmp_path / "report.html")
    (line,) = re.findall("^weighted  .*$", capsys.readouterr().out, re.MULTILINE)
    assert "captured " in line and line.endswith(f"effective share {100 * law.effective_share:.1f}\N{NO-BREAK SPACE}%")


def test_what_is_not_trusted_is_marked(good, capsys, tmp_path):
    law = replace(good.summary.by_weights.reweighted, trusted=False)
    doubtful = weighted_by_hand(good, reweighted=law, reweighted_captured=None)
    page = reached(doubtful)
    assert all(cell.endswith(" ?") for cell in rows(page)["trained and weighted"]) and "too few" in page
    print_headline(doubtful.summary, RunDirectory(tmp_path), tmp_path / "report.html")
    assert re.search("^weighted  [^:]*; effective share .*, too small to trust$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("beta", "ratio", "why"),
    [(None, 0.0, "a penalty on drifts"), (0.0, 0.0, "a KL weight of 0"), (BETA, torch.nan, "adds no noise")],
)
def test_without_weights_a_sentence_says_why(good, beta, ratio, why, capsys, tmp_path):
    after = replace(good.after, log_ratio=good.after.log_ratio + ratio)
    missing = by_weights(good.before, after, judge(good.before, after, after, beta))
    assert missing.reweighted is None and missing.reweighted_nearby == [] and why in missing.reweighted_missing
    summary = replace(good.summary, by_weights=missing)
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    page = reached(replace(good, summary=summary))
    assert missing.reweighted_missing in page and "trained and weighted" not in rows(page)
    print_headline(summary, RunDirectory(tmp_path), tmp_path / "report.html")
    assert "weighted" not in capsys.readouterr().out
    assert "Triangles" not in frontier(replace(good, summary=summary))[2]


def test_a_ruined_chain_is_weighed_against_the_bound_of_the_pretrained_one(good):
    before, after = evaluation(repeats=8), evaluation(8.0, repeats=8)
    judgement = judge(before, after, after, BETA)
    assert judgement.bound_from == "pretrained"
    law = by_weights(before, after, judgement)
    assert not law.reweighted.trusted and law.reweighted.effective_share < 0.3
    json.dumps(replace(good.summary, by_weights=law).to_json(), allow_nan=False)


def test_the_share_has_a_number_where_the_judgement_sees_a_gain(good):
    judgement = judge(good.before, good.after, good.after, BETA)
    assert by_weights(good.before, good.after, judgement).reweighted_captured is not None
    nothing = replace(judgement, possible=Estimate(1.0, 0.6))
    assert by_weights(good.before, good.after, nothing).reweighted_captured is None


@pytest.mark.drawn
def test_the_frontier_has_hollow_triangles_where_weights_are_not_trusted(good):
    laws = sorted(
        [good.summary.by_weights.reweighted, *good.summary.by_weights.reweighted_nearby], key=lambda law: -law.kl_weight
    )
    figure, _, caption = frontier(good)
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "^"]
    assert [line.get_markerfacecolor() == "white" for line in lines] == [False, True]
    shown = np.concatenate([line.get_xydata() for line in lines])
    first = next(place for place, law in enumerate(laws) if not law.trusted)
    assert shown == pytest.approx(np.array([(law.path_kl.mean, law.reward_gain.mean) for law in laws[: first + 1]]))
    assert shown[:, 0].max() < figure.axes[0].get_xlim()[1] and shown[:, 1].max() < figure.axes[0].get_ylim()[1]
    assert f"from {laws[0].kl_weight:.3g} to {laws[first].kl_weight:.3g}" in caption
