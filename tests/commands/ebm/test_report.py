"""The report of an energy-based training: what it says first, what it shows, and that its commands run."""

import dataclasses
import html
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import judging, report
from implicit_diffusion.commands.ebm.curves import draw_curves
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.figures import draw
from implicit_diffusion.commands.ebm.judging import gaussian_scores, what_to_change
from implicit_diffusion.commands.ebm.report import command
from implicit_diffusion.commands.ebm.samples import Sides, distances, most_different, principal
from implicit_diffusion.commands.ebm.training import Gap
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory
from tests.helpers.energy_models import TINY, gaussian
from tests.helpers.energy_models import summary as summary_of

NAMES = ("length, in <mm>", "width", "weight")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a table of three columns, one of which has a name that is HTML, in a folder with a space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
        folder = tmp_path_factory.mktemp("a folder")
        x = np.random.default_rng(0).standard_normal((120, 3)) * [1, 5, 0.1] + [0, 100, 3]
        head = ",".join(f'"{name}"' for name in NAMES)
        np.savetxt(folder / "x.csv", x, delimiter=",", header=head, comments="", fmt="%.12g")
        config = dataclasses.replace(TINY, data=str(folder / "x.csv"), weighted=False, refresh=None, out=folder / "run")
        return ebm.run(config), folder / "run"


def text(path):
    return html.unescape(re.sub(r"<[^>]+>", " ", (path / "report.html").read_text(encoding="utf-8")))


class Tags(HTMLParser):
    """Opened and closed in order, and what refers to elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone_and_shows_what_there_is(run):
    _, out = run
    page = (out / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.outside == [] and "<script" not in page and "default-src 'none'" in page
    assert [image["alt"] for image in tags.images] == [
        "Columns in pairs", "Log-likelihoods, one by one", "How training went",
    ]  # fmt: skip
    assert {path.name for path in (out / "figures").iterdir()} == {"pairs.png", "scores.png", "training.png"}
    assert "length, in &lt;mm&gt;" in page and "in <mm>" not in page
    assert all(name in text(out) for name in NAMES)


def test_numbers_are_those_of_the_summary_with_their_errors(run):
    summary, out = run
    said = " ".join(text(out).split())
    for key in ("nll_held_out", "nll_gaussian", "nll_train", "log_z_estimate", "log_z_half"):
        assert report.number(summary[key], summary[f"{key}_se"]).replace("\xa0", " ") in said
    assert report.number(-summary["nll_held_out"], summary["nll_held_out_se"]).replace("\xa0", " ") in said
    assert "Every ± here is one standard error" in said


def test_its_command_trains_the_same_model(run, tmp_path, monkeypatch):
    """As it stands in the page, with quotes and line ends."""
    _, out = run
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
    shown = text(out).split("Run it again")[1].split("Configuration")[0].strip()
    words = shlex.split(shown.replace("\\\n", ""))  # as a shell reads it
    assert words[:2] == ["implicit-diffusion", "ebm"] and "--no-weighted" in words and "--out" not in words
    assert cli.main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    files = [(path / "model" / "model.safetensors").read_bytes() for path in (out, tmp_path / "again")]
    assert files[0] == files[1]


def test_its_lines_of_python_run(run, tmp_path, monkeypatch):
    _, out = run
    code = text(out).split("From Python:")[1].split("Run it again")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE.csv").write_text("1,100,3\n2,101,3.1\n")
    names: dict = {}
    exec(code.strip(), names)
    assert names["log_p"].shape == (2,) and names["draws"].shape == (100, 3)


def test_report_draws_it_again_from_what_is_on_disk(run, capsys):
    """And resume makes it where only it is missing."""
    summary, out = run
    page = (out / "report.html").read_bytes()
    for command_line in ("report", "resume"):
        (out / "report.html").unlink()
        assert cli.main([command_line, str(out)]) == 0
        assert (out / "report.html").read_bytes() == page
    assert cli.main(["resume", str(out)]) == 2
    assert "it is finished" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text()) == summary


def test_commands_leave_out_defaults():
    config = dataclasses.replace(TINY, data="a b.npy", dequantise=True, seed=3, out=Path("run"))
    said = shlex.split(command(config).replace("\\\n", ""))
    assert said[:4] == ["implicit-diffusion", "ebm", "--data", "a b.npy"] and "--dequantise" in said
    assert "--weighted" not in said and said[said.index("--seed") + 1] == "3" and "run" not in said


def lead(changes):
    numbers = {"nll_held_out": 2.0, "nll_held_out_se": 0.1, "gain_over_gaussian": 0.5, "gain_over_gaussian_se": 0.1}
    return report._in_words(SimpleNamespace(dequantised=False), summary_of(**numbers | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The model has learned more than mean and covariance: a held-out datum has a log-likelihood of −2.0 ±"),
        ({"gain_over_gaussian": 0.15}, "The model is no better than a Gaussian within the error (+0.1 ±"),
        ({"gain_over_gaussian": -0.15}, "The model is no better than a Gaussian within the error (−0.1 ±"),
        ({"gain_over_gaussian": -0.5}, "The model is worse than a Gaussian, by 0.5 ±"),
        ({"advice": ["log Z rises. Take more"]}, "<b>Something looks wrong: log Z rises.</b> The model has learned"),
        ({"advice": ["a & b: take less"]}, "<b>Something looks wrong: a &amp; b.</b>"),
        ({"advice": ["Γ is mostly noise (0.4): θ may have arrived. If"]}, "The model has learned more"),
    ],
)
def test_the_first_sentence_says_whether_it_is_sound(changes, said, as_users_run):
    assert lead(changes).replace("\xa0", " ").startswith(said.replace("\xa0", " "))
    assert ("Nothing looks wrong" in lead(changes)) == (not changes or "mostly noise" in str(changes))


def test_a_model_worse_than_a_gaussian_and_one_that_learned_by_heart_are_said(monkeypatch, as_users_run):
    monkeypatch.setattr(judging, "advice", lambda *arguments, **options: [])
    trained = SimpleNamespace(fit=SimpleNamespace(metrics={}), loop=SimpleNamespace(weighted=False))

    def advice(**changes):
        errors = ("log_z_estimate_se", "log_z_half_se", "gain_over_gaussian_se", "overfit_se")
        sound = {"log_z_estimate": 1.0, "log_z_half": 1.0} | dict.fromkeys(errors, 0.1)
        return what_to_change(trained, summary_of(**sound | changes), step_size_given=False)

    assert advice(gain_over_gaussian=-0.15, overfit=0.25) == []
    (worse,) = advice(gain_over_gaussian=-0.4, overfit=0.0)
    assert worse.startswith("held-out data are less likely than under a Gaussian") and "by 0.4 ± 0.1 nats" in worse
    (heart,) = advice(gain_over_gaussian=1.0, overfit=0.4)
    assert "partly memorised" in heart and "by 0.4 ± 0.1 nats" in heart


def test_the_gaussian_is_that_of_maximum_likelihood_for_many_data():
    """Against torch's own density, whose parameters are the sample's: the shrinkage of 20000 data is small."""
    mixing = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    x = Noise(0).normal((20_000, 2)) @ mixing.mT + torch.tensor([10.0, -3.0])
    train, held_out = x[:19_000], x[19_000:]
    scores = gaussian_scores(Data(train, held_out, train.mean(0), train.std(0)))
    law = torch.distributions.MultivariateNormal(train.double().mean(0), train.double().mT.cov())
    torch.testing.assert_close(scores, law.log_prob(held_out.double()), rtol=0.01, atol=0.02)


def test_the_gaussian_of_more_coordinates_than_data(monkeypatch):
    """Shrunk it exists; and the diagonal one of very many coordinates is a product, of images as of vectors."""
    x = Noise(0).normal((60, 100))
    data = Data(x[:40], x[40:], x[:40].mean(0), x[:40].std(0))
    assert abs(gaussian_scores(data).mean().item() + 100 * 1.42) < 15
    monkeypatch.setattr(judging, "LARGEST_COVARIANCE", 50)
    images = dataclasses.replace(
        data,
        **{name: getattr(data, name).unflatten(-1, (1, 10, 10)) for name in ("train", "held_out", "shift", "scale")},
    )
    normal = torch.distributions.Normal(data.shift, data.scale * math.sqrt(1 + 1e-4))
    product = normal.log_prob(data.held_out).sum(1).double()
    torch.testing.assert_close(gaussian_scores(images), product, rtol=1e-5, atol=1e-3)


def test_distances_of_columns_are_wasserstein():
    """By quantiles where sizes agree, in deviations of the first; and a shift of one deviation has distance one."""
    x, y = Noise(0).normal((400, 3)).double(), Noise(1).normal((400, 3)).double()
    y[:, 1] = x[:, 1] + 2
    apart, chance = distances(x, y)
    by_quantiles = (x.sort(0)[0] - y.sort(0)[0]).abs().mean(0) / x.std(0)
    torch.testing.assert_close(apart, by_quantiles)
    assert apart[1].item() == pytest.approx(2 / x[:, 1].std().item())
    assert apart[1] > chance[1] and (apart[[0, 2]] < 2 * chance[[0, 2]]).all()
    unequal, _ = distances(x, y[:100])
    repeated, _ = distances(x, y[:100].repeat_interleave(4, 0))  # the same law
    torch.testing.assert_close(unequal, repeated)
    assert most_different(Sides(x, y, ("a", "b", "c"), ""))[0] == 1


def test_chance_covers():
    """Of 200 pairs of samples of one law about 5 % are further apart than chance says: 10 ± 4 · 3.1."""
    x, y = Noise(0).normal((60, 200)).double(), Noise(1).normal((90, 200)).double()
    apart, chance = distances(x, y)
    assert 0 < (apart > chance).sum().item() < 23


def test_principal_components_are_uncorrelated_and_in_order():
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    x = Noise(0).normal((300, 5)).double() @ Noise(2).normal((5, 5)).double()
    components = principal(Sides(x, x[:50], tuple("abcde"), "data"), scale)
    assert components.data.shape == (300, 4) and torch.equal(components.draws, components.data[:50])
    covariance = components.data.mT.cov()
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-8
    variances = covariance.diagonal()
    assert (variances.diff() < 0).all()
    share = variances[0] / ((x / scale).var(0).sum())
    assert components.names[0] == f"component 1 ({share.item():.0%})"


def drawn(event, tmp_path, law=None):
    model = gaussian(event, torch.zeros(event), torch.ones(event), kind="conv" if len(event) == 3 else "mlp")
    x = Noise(0).normal((60, *event))
    data = Data(x[:40], x[40:], torch.zeros(event), torch.ones(event))
    return [picture.name for picture in draw(model, data, summary_of(), RunDirectory(tmp_path))]


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("event", "pictures"),
    [
        ((1,), ["marginals", "scores"]),
        ((2,), ["density", "scores"]),
        pytest.param((3,), ["pairs", "scores"], marks=pytest.mark.slow),
        pytest.param((11,), ["marginals", "components", "scores"], marks=pytest.mark.slow),
        ((1, 4, 4), ["particles", "components", "scores"]),
    ],
    ids=str,
)
def test_every_kind_of_data_has_pictures(event, pictures, tmp_path):
    assert drawn(event, tmp_path) == pictures
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == sorted(pictures)


def test_curves_end_at_the_judged_numbers_in_the_units_of_the_data():
    """−log-likelihoods of the training are standardised ones: curves are shifted by Σ log scale."""
    x = Noise(0).normal((60, 2)) * torch.tensor([10.0, 0.1])
    data = Data(x[:40], x[40:], torch.zeros(2), torch.tensor([10.0, 0.1]))
    lines = [{"updates": k, "nll": 3.0, "log_z": 1.0, "ess": 50.0, "acceptance": 0.9} for k in (1, 2, 3)]
    summary = summary_of(nll_held_out=3.1, nll_held_out_se=0.1)
    figure = draw_curves(lines, summary, dataclasses.replace(data, scale=torch.tensor([10.0, 0.5])), 100)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "−log-likelihood (nats per datum)",
        "log Z",
        "effective particles, share of all",
        "proposals accepted",
    ]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([3 + math.log(5)] * 3)
    assert figure.axes[2].lines[0].get_ydata() == pytest.approx([0.5] * 3)
    assert draw_curves([], summary, data, 100) is None


def test_the_gap_of_energies_is_that_of_the_weights(as_users_run):
    data, x = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0], [4.0]])
    log_weights = torch.tensor([0.5, 0.25, 0.25]).log()

    class Model(torch.nn.Module):
        def forward(self, x):
            return x[:, 0]

    loop = SimpleNamespace(model=Model(), weighted_state=SimpleNamespace(x=x), particles=Particles(x, log_weights))
    fit = SimpleNamespace(updates=20, loop=loop, metrics={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("implicit_diffusion.commands.ebm.training.ParticleLoop", SimpleNamespace)
        Gap(data)(fit)
        assert fit.metrics["energy_gap"] == pytest.approx(2 - 1.5)
        spread = 0.5 * 1.5**2 + 0.25 * 0.5**2 + 0.25 * 2.5**2
        assert fit.metrics["energy_gap_se"] == pytest.approx(math.sqrt(spread * 0.375 + 2 / 2))
        fit.updates, fit.metrics = 21, {}
        Gap(data)(fit)
        assert fit.metrics == {}
