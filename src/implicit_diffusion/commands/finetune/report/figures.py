"""The pictures of a fine-tuning run, in one style.

A picture is five inches wide, so that its ten-point type is about ten pixels high on a phone. Colours are those of
Okabe and Ito, which the colour-blind can tell apart: grey is before, blue is after, vermilion is the bound, green is
real data. Error bars are two standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import STYLE, save, sheet
from implicit_diffusion.commands.shared.page import Picture
from implicit_diffusion.extras import require
from implicit_diffusion.runs import RunDirectory

WIDTH = 5.0  # inches
BEFORE, AFTER, BOUND, REAL, EXPORTED = "#7d838c", "#0072B2", "#D55E00", "#009E73", "#CC79A7"

Drawing = Callable[[Result], tuple[Any, str, str] | None]


def draw(result: Result, directory: RunDirectory) -> list[Picture]:
    """Draw what the result has data for into figures/.

    Returns:
        The pictures in the order of the report: samples, frontier, training, rewards, judges, course, hacking, cost,
        staleness. There are no samples where they are neither images (C, H, W) nor points of the plane, no course
        where they are not images, no frontier without a finite
        path KL, no rewards where there is a single one, no judges and no course of the samples without a judge, and no
        staleness of a nested loop.
    """
    require("matplotlib")
    import matplotlib

    from implicit_diffusion.commands.finetune.report.frontier import frontier
    from implicit_diffusion.commands.finetune.report.judges import course, judges
    from implicit_diffusion.commands.finetune.report.rewards import rewards
    from implicit_diffusion.commands.finetune.report.samples import hacking, samples
    from implicit_diffusion.commands.finetune.report.training import cost, staleness, training

    pictures = []
    for drawing in (samples, frontier, training, rewards, judges, course, hacking, cost, staleness):
        with matplotlib.rc_context(STYLE):
            drawn = drawing(result)
            if drawn is None:
                continue
            figure, title, caption = drawn
            path = directory.figure(drawing.__name__)
            save(figure, path)
            pictures.append(Picture(drawing.__name__, path, title, caption))
    return pictures


def canvas(height: float) -> Any:
    """An empty figure, as wide as all of them."""
    return sheet(WIDTH, height)
