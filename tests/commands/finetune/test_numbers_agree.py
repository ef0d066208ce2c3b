"""Wherever J, a path KL and a reward stand together, J = β·KL − reward holds for the numbers as they are printed."""

import inspect
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from implicit_diffusion.commands.finetune.by_weights import by_weights
from implicit_diffusion.commands.finetune.model_card import model_card
from implicit_diffusion.commands.finetune.report import plan_table
from implicit_diffusion.commands.finetune.report.frontier import frontier
from implicit_diffusion.commands.finetune.report.headline import headline_of, print_headline
from implicit_diffusion.commands.finetune.report.report import write_report
from implicit_diffusion.commands.finetune.report.training import cost, training
from implicit_diffusion.commands.sweep import command as sweep
from implicit_diffusion.commands.sweep.summary import SweepRow, SweepSummary
from implicit_diffusion.evaluation import judge
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.runs import RunDirectory
from tests.helpers.toy_result import BETA, changed, digits_result, evaluation

NUMBER = r"([+−-]?\d+(?:\.\d+)?)"


class Printed:
    """A number as it was printed: its value, and by how much the digits that are not there may change it."""

    def __init__(self, text, value=None, off=None):
        self.value = float(text.replace("−", "-").replace(",", "")) if value is None else value
        self.off = 0.5 * 10.0 ** -len(text.partition(".")[2]) if off is None else off

    def __add__(self, other):
        return Printed("", self.value + other.value, self.off + other.off)

    def __sub__(self, other):
        return Printed("", self.value - other.value, self.off + other.off)

    def __neg__(self):
        return Printed("", -self.value, self.off)

    def __mul__(self, other):
        off = abs(self.value) * other.off + abs(other.value) * self.off + self.off * other.off
        return Printed("", self.value * other.value, off)


def agree(one, other):
    """Whether two numbers may be the same, and are known well enough to say so."""
    return abs(one.value - other.value) <= one.off + other.off + 1e-9 and one.off + other.off < 0.2


def weight(beta):
    """A KL weight, which is printed to four significant digits without the zeros at its end."""
    return Printed("", beta.value, 5e-5 * beta.value)


def numbers(pattern, text):
    match = re.search(pattern.replace("#", NUMBER), text)
    assert match, f"{pattern!r} is not in {text}"
    return [Printed(group) for group in match.groups()]


def noisy(judged):
    """The toy's drift shifts rewards and path KLs by the same everywhere, without an error."""
    w, v = torch.randn(2, *judged.reward.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return replace(judged, reward=judged.reward + 0.4 * w, path_kl=judged.path_kl * (0.1 * v).exp())


@pytest.fixture(scope="module")
def result():
    """A run that was judged, trained well but not to the end, with a KL weight of many digits."""
    made, beta = digits_result(), BETA * 1.0372915
    made = replace(made, after=noisy(made.after))
    judgement = judge(made.before, made.after, made.after, beta)
    headline = headline_of(judgement, lr=1e-4, advise=True)
    made = replace(made, summary=replace(made.summary, headline=headline), bound=judgement.bound)
    return changed(made, kl_weight=beta)


def test_the_headline(result, tmp_path, capsys):
    print_headline(result.summary, RunDirectory(tmp_path), tmp_path / "report.html")
    text = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    before, after, gain = numbers(r"reward +# → # \(#", text)
    (kl,) = numbers("path KL +# ±", text)
    j0, j, beta, fell = numbers("J +# → #, # × path KL − reward: fell by #", text)
    least, could = numbers("bound +#: J could fall by #", text)
    (share,) = numbers("captured #", text)
    assert agree(j0, -before) and agree(j, weight(beta) * kl - after) and agree(gain, after - before)
    assert agree(fell, j0 - j) and agree(could, j0 - least)
    assert abs(share.value / 100 - fell.value / could.value) < share.off / 100 + 2 * fell.off / could.value


def test_the_report(result, tmp_path):
    text = write_report(result, [], RunDirectory.create(tmp_path)).read_text().replace("\N{NO-BREAK SPACE}", " ")
    (kl,) = numbers("path KL of # nats", text)
    (after,) = numbers("<td>[^<]*</td><td># ± [^<]*</td><td>[^<]*</td></tr>", text.partition("mean reward</th>")[2])
    beta, fell, j0, j, least, could = numbers(
        r"\(# × path KL − reward, lower is better\)\. It fell by # ± [\d.]+, from # to #; .* below #, a fall of # ±",
        text,
    )
    assert agree(j, weight(beta) * kl - after) and agree(fell, j0 - j) and agree(could, j0 - least)


def test_the_model_card(result):
    chain = SimpleNamespace(pretrained_rows=(), num_steps=10, table=SimpleNamespace(name="DDPM"))
    text = inspect.unwrap(model_card)(result.config, result.summary, chain)
    before, after = numbers(r"reward, training chain \| # \| #", text)
    (kl,) = numbers(r"path KL \(nats\) \| 0 \| #", text)
    beta, j0, j = numbers(r"J = # × path KL − reward \| # \| #", text)
    assert agree(j, weight(beta) * kl - after) and agree(j0, -before)


def test_the_tables_of_a_plan_and_of_a_sweep(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    plan_table.show(result.plan)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == len(result.plan.bounds)
    for row in rows:
        beta, gain, _, kl, gain_of_j = (numbers("#", cell)[0] for cell in row)
        assert agree(gain_of_j, gain - weight(beta) * kl)
    row = SweepRow.of(result.summary, result.beta, "beta")
    sweep.show(SweepSummary("brightness", Estimate(0.0, 1.0), [row], []))
    text = capsys.readouterr().out
    (row,) = (line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│"))
    beta, reward, kl, j, least, share = (numbers("#", cell)[0] for cell in row)
    (before,) = numbers("pretrained reward #", text)
    assert agree(j, weight(beta) * kl - reward)
    fell, could = -before - j, -before - least
    assert abs(share.value / 100 - fell.value / could.value) < share.off / 100 + 2 * fell.off / could.value


@pytest.fixture(scope="module")
def guided(result):
    """A run whose pretrained model is guided: training began below its reward, at a path KL of two nats."""
    untrained, made = noisy(evaluation(-0.3, 2.0)), replace(result, config=replace(result.config, guidance=3.0))
    judgement = judge(made.before, made.after, made.after, result.beta, untrained)
    headline = headline_of(judgement, lr=1e-4, advise=True)
    weighted = by_weights(made.before, made.after, judgement, untrained)
    made = replace(made, config=replace(made.config, student_guidance=1.0))
    return replace(made, summary=replace(made.summary, headline=headline, by_weights=weighted))


def test_where_training_began_below_a_guided_model(guided, tmp_path, capsys):
    """J falls from the untrained network, and both stand beside the guided model, in print and in the report."""
    print_headline(guided.summary, RunDirectory(tmp_path), tmp_path / "report.html")
    text = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    before, after = numbers("reward +# → #", text)
    first, kl_first, above = numbers(
        r"untrained reward # ±.*path KL # ±.*; J # ± [\d.]+ above that of the guided", text
    )
    (kl,) = numbers(r"\npath KL +# ±", text)
    j0, j, beta, fell = numbers("J +# → #, # × path KL − reward: fell by #", text)
    least, could = numbers("bound +#: J could fall by #", text)
    (share,) = numbers("captured #", text)
    assert agree(j0, weight(beta) * kl_first - first) and agree(j, weight(beta) * kl - after)
    assert agree(above, j0 + before) and agree(fell, j0 - j) and agree(could, j0 - least)
    assert abs(share.value / 100 - fell.value / could.value) < share.off / 100 + 2 * fell.off / could.value
    page = write_report(guided, [], RunDirectory.create(tmp_path)).read_text().replace("\N{NO-BREAK SPACE}", " ")
    row = r"<th scope=.row.>{}</th><td>#</td><td>[^<]*</td><td>#[^<]*</td><td>#</td><td>#[^<]*</td><td>#[^<]*</td>"
    for name, values in (
        ("pretrained, guided", (before, None, -before, above)),
        ("untrained", (first, kl_first, j0)),
        ("trained", (after, kl, j, fell)),
    ):
        for ours, theirs in zip(numbers(row.format(name), page), values):
            assert theirs is None or agree(ours, theirs)
    (beta, fell_too, start) = numbers(
        r"\(# × path KL − reward, lower is better\)\. It fell by # ± [\d.]+, from #", page
    )
    assert agree(start, j0) and agree(fell_too, fell)
    chain = SimpleNamespace(pretrained_rows=(), num_steps=10, table=SimpleNamespace(name="DDPM"))
    card = inspect.unwrap(model_card)(guided.config, guided.summary, chain)
    share0, share1 = numbers(r"share of the possible gain of J \| # \| #", card)
    assert abs(share0.value - above.value / could.value) < 0.01 and abs(share1.value - share.value / 100) < 0.01
    assert "sampled with guidance 1; that of the pretrained model was 3" in card


def test_pictures_show_where_training_began(guided):
    for drawing in (frontier, training, cost):
        figure, _, _ = drawing(guided)
        labels = {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}
        assert ("untrained" in labels) is (drawing is not cost)
    _, y = figure.axes[0].lines[-3].get_data()  # of the cost: the curve of J begins where training began
    assert y[0] == pytest.approx(guided.summary.headline.untrained.j.mean)


def test_where_the_bound_is_from_the_pretrained_chain(result, tmp_path, capsys):
    """A chain far beyond the optimum: its J rose, and the bound and what could be gained are those of the other."""
    before, after = evaluation(repeats=8), noisy(evaluation(8.0, repeats=8))
    headline = headline_of(judge(before, after, after, BETA), lr=1e-4, advise=True)
    summary = changed(replace(result, summary=replace(result.summary, headline=headline)), kl_weight=BETA).summary
    print_headline(summary, RunDirectory(tmp_path), tmp_path / "report.html")
    text = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    (after,), (kl,) = numbers("reward +[^ ]+ → #", text), numbers(r"path KL +#", text)
    j0, j, beta, rose = numbers(r"J +# → #, # × path KL − reward: rose by #", text)
    least, could = numbers("bound +#, from the pretrained chain: J could fall by #", text)
    assert agree(j, weight(beta) * kl - after) and agree(rose, j - j0) and agree(could, j0 - least)
