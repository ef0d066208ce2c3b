"""The table of a comparison: on the terminal, and as a page with the figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from implicit_diffusion.commands.compare.methods import METHODS
from implicit_diffusion.commands.compare.summary import ProblemSummary, Quality, Reached, Summary
from implicit_diffusion.commands.shared import page
from implicit_diffusion.commands.shared.formatting import number, percent
from implicit_diffusion.commands.shared.page import Picture
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.extras import require
from implicit_diffusion.runs import RunDirectory

OF_GRADIENTS = ("bias along g", "squared bias", "variance", "cosine to g", "ms", "MB", "evaluations")
OF_TRAINING = ("setting", "fall of J", "captured", "path KL", "evaluations", "s", "calls/sample")
WIDTH = 120  # of the table, in characters
ROUNDING = 1e-5  # of gradients in single precision, as a share
EXPLAINED = (
    "Gradients are those of one batch at a fixed θ, beside the exact gradient g. Bias and variance are relative to ‖g‖ "
    "and ‖g‖². MB are states and activations beyond the weights. In training, the setting is the learning rate, the "
    "strength of guidance, or M, as the search found it. The fall of J = β path KL − E R is on held-out noise, and "
    "captured is its share of J before training less the bound J*. Evaluations are network calls × samples; ms and s "
    "are processor time. Each ± is one standard error."
)


def rows(problem: ProblemSummary, summary: Summary) -> Iterator[tuple[str, ...]]:
    """The lines of one problem: a method, the numbers of its gradients, and those of its training."""
    qualities = {each.method: each for each in summary.gradients if each.problem == problem.name}
    reached = {each.method: each for each in summary.reached if each.problem == problem.name}
    for method in METHODS:
        quality, end = qualities.get(method), reached.get(method)
        if quality or end:
            yield (method, *_of_gradients(quality), *_of_training(end))


def _of_gradients(quality: Quality | None) -> tuple[str, ...]:
    if quality is None:
        return ("",) * len(OF_GRADIENTS)
    return (
        _share(quality.bias, sign=True),
        _share(quality.squared_bias),
        number(quality.variance),
        number(*quality.cosine),
        number(1e3 * quality.seconds),
        number(quality.predicted_memory_bytes / 1e6),
        f"{quality.evaluations:.0f}",
    )


def _share(estimate: Estimate, *, sign: bool = False) -> str:
    """A share of the exact gradient; what is not more than rounding is zero."""
    return "0" if max(map(abs, estimate)) < ROUNDING else number(*estimate, sign=sign)


def _of_training(end: Reached | None) -> tuple[str, ...]:
    if end is None:
        return ("",) * len(OF_TRAINING)
    edge = "" if end.search.inside else " (edge)"
    failed = f" ({end.diverged} diverged)" if end.diverged else ""
    return (
        f"{end.search.best:.3g}{edge}",
        number(*end.fall or (None,)) + failed,
        percent(*end.captured or (None,)),
        number(end.path_kl),
        f"{end.evaluations:.0f}",
        number(end.seconds),
        f"{end.calls_per_sample}",
    )


def heading(problem: ProblemSummary) -> str:
    """One line about a problem."""
    return (
        f"{problem.name}: β {number(problem.beta)} per nat, J before training {_plain(problem.before)}, "
        f"bound J* {_plain(problem.best)}"
    )


def _plain(estimate: Estimate) -> str:
    return number(*estimate)


def show(summary: Summary, folder: Path) -> None:
    """Print the table, with a block for each problem, and the folder of the run."""
    require("rich")
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, WIDTH)
    for columns, part in ((OF_GRADIENTS, slice(1, 8)), (OF_TRAINING, slice(8, None))):
        for problem in summary.problems:
            lines = [line for line in rows(problem, summary) if any(line[part])]
            if not lines:
                continue
            table = Table(box=SIMPLE_HEAD, title=heading(problem))
            table.add_column("method", no_wrap=True)
            for column in columns:
                table.add_column(column, justify="right", no_wrap=True)
            for line in lines:
                table.add_row(line[0], *line[part])
            console.print(table)
    console.print(EXPLAINED)
    print(f"report    {folder / 'report.html'}")
    print(f"run       {folder}")


def write_report(summary: Summary, directory: RunDirectory) -> Path:
    """Write report.html: the figure, the table of every problem, and what the methods are."""
    picture = Picture(
        "comparison",
        directory.figure("comparison"),
        "Share of the possible fall of J",
        "Mean over the seeds with twice its standard error, on held-out noise. Dashed lines are without training.",
    )
    columns = ("method", *OF_GRADIENTS, *OF_TRAINING)
    body = ['<header><p class="kicker">implicit-diffusion · comparison</p><h1>Which estimator when</h1></header>']
    body += [page.figures([picture])] if picture.path.exists() else []
    for problem in summary.problems:
        lines = list(rows(problem, summary))
        body.append(f"<section><h2>{heading(problem)}</h2>{page.table(columns, lines)}</section>")
    body.append(f"<section><p>{EXPLAINED}</p>")
    body.append(page.table(("method", "what it is"), [(name, m.words) for name, m in METHODS.items()], cls="plain"))
    body.append("</section>")
    return page.write_page(directory.path / "report.html", "Which estimator when", body)
