"""The report of a training of an energy-based model, report.html."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import Data, column_name
from implicit_diffusion.commands.ebm.samples import distances, most_different, sides
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.commands.shared import ranges
from implicit_diffusion.commands.shared.arrays.array_files import place_of
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.page import Picture, configuration, duration, figure, table, tile, write_page
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.runs import RunDirectory

EXPECTED = "Γ is mostly noise"  # at the end of a training


def write_report(
    model: EnergyModel, data: Data, summary: Summary, pictures: Sequence[Picture], directory: RunDirectory
) -> Path:
    """Write report.html.

    Args:
        model: with its log Z.
        data: that it was trained on.
        summary: the headline numbers.
        pictures: from `figures.draw`.
        directory: of the run, with its config.json.

    Returns:
        The path of the report.
    """
    config = read_options(Config, directory)
    title = f"{_name(config.data)}, an energy-based model"
    body = [
        _headline(data, summary, config, title),
        _warning_cards(summary),
        *map(figure, pictures),
        _numbers(data, summary),
        _columns(model, data),
        _use(data, config, directory),
        configuration(vars(config).items()),
    ]
    return write_page(directory.path / "report.html", title, body)


def _headline(data: Data, s: Summary, config: Config, title: str) -> str:
    bound = "at least, as data are discrete and were dequantised" if data.dequantised else "per datum, in its own units"
    tiles = [
        tile("Held-out log-likelihood in nats", number(-s.nll_held_out, s.nll_held_out_se), bound),
        tile(
            "More than a Gaussian",
            number(s.gain_over_gaussian, s.gain_over_gaussian_se, sign=True),
            "nats per held-out datum, a Gaussian of the same mean and covariance",
        ),
    ]
    if s.kl is not None:
        tiles.append(tile("KL(data‖model)", number(s.kl), "nats, exact by quadrature"))
    if s.bits_per_dimension is not None:
        error = s.nll_held_out_se / math.prod(data.event_shape) / math.log(2)
        tiles.append(tile("Bits per dimension", number(s.bits_per_dimension, error), "held out, lower is better"))
    if s.log_z is not None:
        tiles.append(tile("log Z", number(s.log_z, digits=4), "exact, of the standardised model"))
    else:
        tiles.append(tile("log Z", number(s.log_z_estimate, s.log_z_estimate_se), "by annealing, standardised"))
    cost = f"{s.updates} updates, {s.gradient_evaluations:,} pulls through V at all particles"
    tiles.append(tile("Training time", duration(s.seconds), cost))
    shape = " × ".join(map(str, data.event_shape))
    events = f"images of {shape}" if len(data.event_shape) == 3 else f"{shape} column{'s' * (shape != '1')}"
    facts = [
        f"{len(data.once):,} data of the training, {len(data.held_out):,} held out",
        events,
        f"{config.potential} of width {config.width}",
        f"{'weighted ' * config.weighted}{config.sampler}",
        *([] if s.start is None else [f"started by {s.start.updates} updates of score matching"]),
        f"seed {config.seed}",
    ]
    return f"""<header>
<p class="kicker">implicit-diffusion · report of an energy-based model</p>
<h1>{escape(title)}</h1>
<p class="facts">{escape(" · ".join(facts))}</p>
</header>
<section class="tiles">{"".join(tiles)}</section>
<p class="lead">{_in_words(data, s)}</p>
"""


def _in_words(data: Data, s: Summary) -> str:
    gain, error = s.gain_over_gaussian, s.gain_over_gaussian_se
    warnings = _warnings(s)
    held_out = f"a held-out datum has a log-likelihood of {number(-s.nll_held_out, s.nll_held_out_se)} nats"
    if data.dequantised:
        held_out += " or more (a bound, since the data are discrete)"
    beside = f"{number(abs(gain), error)} nats"
    if gain < -2 * error:
        text = f"The model is worse than a Gaussian, by {beside} per datum: {held_out}."
    elif gain <= 2 * error:
        text = f"The model is no better than a Gaussian within the error ({number(gain, error, sign=True)} nats per "
        text += f"datum): {held_out}."
    else:
        text = f"The model has learned more than mean and covariance: {held_out}, {beside} more than under a Gaussian "
        text += "that has these."
    if warnings:
        text = f"<b>Something looks wrong: {escape(_short(warnings[0]))}.</b> {text}"
    elif gain > 2 * error:
        text += " Nothing looks wrong."
    if s.kl is not None:
        text += f" The law of the data is known: KL(data‖model) is {number(s.kl)} nats, exactly."
    return text + " Every ± here is one standard error."


def _short(sentence: str) -> str:
    """What is wrong, without the advice after a full stop or a colon."""
    return re.split(r"\. |: (?:take|use) ", sentence)[0]


def _warnings(s: Summary) -> list[str]:
    return [line for line in s.advice if not line.startswith(EXPECTED)]


def _warning_cards(s: Summary) -> str:
    warnings = _warnings(s)
    cards = [f'<div class="concern warning"><p>{escape(line[0].upper() + line[1:])}.</p></div>' for line in warnings]
    if not warnings:
        checked = "log Z at half the annealing, effective particles, acceptance, memorised data, discrete values"
        cards.append(f'<div class="concern fine"><p><b>No warnings.</b> Checked: {checked}.</p></div>')
    cards += [
        f'<div class="concern info"><p>{escape(line)}. At the end of a training this is expected.</p></div>'
        for line in s.advice
        if line not in warnings
    ]
    return f'<section class="concerns">{"".join(cards)}</section>'


def _numbers(data: Data, s: Summary) -> str:
    """The table of figures, each with its error and what it means."""
    per = "lower is better, in nats per datum" + (", an upper bound" if data.dequantised else "")
    rows = [
        (
            "−log-likelihood, held out",
            "nll_held_out",
            f"of data that training did not see; {per}. The error counts log Z",
        ),
        ("the same, of the training", "nll_train", "of data that it saw, lower if it memorised them"),
        ("the same, of a Gaussian", "nll_gaussian", "mean and covariance of the training data, on the held-out ones"),
        ("the same, of the law itself", "nll_law", "the best that any model can do"),
        ("KL(data‖model)", "kl", "exact, by quadrature: the distance from the best"),
        ("log Z, exact", "log_z", "by quadrature, in standardised coordinates"),
        (
            "log Z by annealing",
            "log_z_estimate",
            "after the training, from the Gaussian; if it is wrong, it is too low",
        ),
        ("log Z, half the steps", "log_z_half", "if lower by more than the errors, the line above is too low as well"),
        (
            "log Z by training's weights",
            "log_z_particles",
            "the difference to annealing is the error that the weights have accumulated",
        ),
        ("effective particles", "ess", "how many the weighted ones are worth"),
        ("MMD² to held-out data", "mmd2", "of the particles; zero for equal laws"),
        ("error of the modes' masses", "mode_error", "total variation, exact"),
        ("bits per dimension", "bits_per_dimension", "−log-likelihood held out, over dimensions and log 2"),
    ]
    shown = [
        [label, number(getattr(s, key), getattr(s, f"{key}_se", None)), meaning]
        for label, key, meaning in rows
        if getattr(s, key) is not None
    ]
    if s.start is not None:
        shown += [
            [
                "log Z after the start",
                number(s.start.log_z, s.start.log_z_se, digits=4),
                f"by annealing, when particles took over from score matching: {s.start.updates} updates, "
                f"{s.start.gradient_evaluations:,} pulls and {duration(s.start.seconds)}, counted above",
            ],
            ["effective particles then", number(s.start.ess), "how many of the weighted ones the start was worth"],
        ]
    for name, baseline in (s.baselines or {}).items():
        value = number(baseline.nll, baseline.nll_se)
        shown.append(
            [f"−log-likelihood, {name.replace('_', ' ')}", value, "of scikit-learn, on the same held-out data"]
        )
    for name, share in (s.auroc or {}).items():
        meaning = "chance that a held-out datum has the larger likelihood; one is best"
        shown.append([f"AUROC against {name}", number(share), meaning])
    return (
        f"<section><h2>Numbers</h2>\n{table(('', 'value', 'what it means'), shown, cls='plain meanings')}</section>\n"
    )


def _columns(model: EnergyModel, data: Data) -> str:
    """Column by column: means, deviations, distances."""
    if len(data.event_shape) == 3:
        return ""
    shown = sides(model, data)
    apart, by_chance = distances(shown.data, shown.draws)
    chosen = most_different(shown)
    rows = []
    for i in chosen:
        x, y = shown.data[:, i], shown.draws[:, i]
        rows.append(
            [
                column_name(data.names[i]),
                *(number(part.mean().item(), part.std().item() / math.sqrt(len(part))) for part in (x, y)),
                *(number(part.std().item()) for part in (x, y)),
                f"{apart[i]:.3f}",
                f"{by_chance[i]:.3f}",
            ]
        )
    head = ("column", "mean of data", "of model", "deviation", "of model", "distance", "by chance")
    which = "Columns" if len(chosen) == len(data.names) else f"The {len(chosen)} columns that differ most"
    return f"""<section><h2>{which}</h2>
<p>The distance is Wasserstein’s, between {escape(shown.words)} and the model’s particles, in deviations of the data.
Two samples of one law have less than the last number in 95 of 100 cases.</p>
{table(head, rows)}</section>
"""


def _use(data: Data, config: Config, directory: RunDirectory) -> str:
    model = str(directory.model)
    shape = ", ".join(map(str, data.event_shape))
    if data.dequantised:
        likelihood = "log_p = model.log_likelihood(x, Noise(0))  # nats, a lower bound for discrete x"
        draws = "draws = model.lattice.quantise(model.sample(100, Noise(1)))  # discrete again"
    else:
        likelihood = "log_p = model.log_density(x)  # nats"
        draws = "draws = model.sample(100, Noise(1))"
    code = f"""from implicit_diffusion import Noise
from implicit_diffusion.commands.shared.arrays.data_arrays import read_array
from implicit_diffusion.models.energy_model import load_energy_model

model = load_energy_model({model!r})
x = read_array("FILE.csv")  # (m, {shape}), in the units of the training data
{likelihood}
{draws}
V = model.potential  # the energy, of (x − model.shift)/model.scale"""
    if len(data.event_shape) == 3:
        code = code.replace("FILE.csv", "FILE.npy")
    quoted = shlex.quote(model)
    shell = f"""implicit-diffusion score --model {quoted} --data FILE.npy --out scores.npy
implicit-diffusion sample --model {quoted} --num 1000 --out draws.npy"""
    return f"""<section><h2>Use the model</h2>
<p>It is in <code>{escape(model)}</code>. From the command line:</p>
<pre><code>{escape(shell)}</code></pre>
<p>From Python:</p>
<pre><code>{escape(code)}</code></pre>
<h2>Run it again</h2>
<pre><code>{escape(command(config))}</code></pre></section>
"""


def command(config: Config) -> str:
    """The command line with these options, without the run directory and without options at their defaults."""
    given = {name: value for name, value in vars(config).items() if name != "out"}
    defaults = {field.name: field.default for field in fields(Config)}
    return ranges.command("ebm", {k: v for k, v in given.items() if v is not None and v != defaults[k]})


def _name(data: str) -> str:
    """The law, or the file without its folders."""
    file, key = place_of(data)
    return Path(file).name + (f":{key}" if key else "")
