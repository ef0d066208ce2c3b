"""Reports from what is on disk: of a finished run again, of an unfinished one so far, and of several side by side."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.registry import COMMANDS
from implicit_diffusion.commands.reporting.comparison import Run, write_comparison
from implicit_diffusion.commands.reporting.course import Files
from implicit_diffusion.commands.reporting.curves import MOST
from implicit_diffusion.commands.reporting.unfinished import write_so_far
from implicit_diffusion.commands.resuming import check_no_plan, command_of, open_run, report
from implicit_diffusion.commands.shared.opening import dated
from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.atomic import check_place, make_folder
from implicit_diffusion.processes import main_only

SO_FAR = "so-far.html"  # in the folder of an unfinished run


@dataclass(frozen=True)
class Report:
    """Draw the figures of a run again and write its report, or show how far it has come, or compare several runs."""

    run: tuple[Path, ...] = field(metadata={"positional": True})
    """The folder of the run, finished or not, or the folders of several runs of one command, to compare them."""
    out: Path | None = None
    """File for the page of an unfinished run or of a comparison, ending in .html; an old one is replaced.
    By default it is so-far.html in the folder of the run, or a new file in runs/ for a comparison."""


@main_only
def run(config: Report) -> dict[str, Any]:
    """The command `report`; of several processes, the main one draws.

    Returns:
        The summary of a finished run; otherwise the path of the page.

    Raises:
        InvalidInputError: there is no such run; runs of several commands; a run given twice; an `out` that cannot be
            the page.
    """
    paths = [check_path("the folder of a run", path) for path in config.run]
    runs = [_read(path) for path in paths]
    if len(runs) == 1 and runs[0].files.finished:
        if config.out is not None:
            raise InvalidInputError(
                f"--out is for an unfinished run, or for several; {paths[0]} is finished, and its report belongs into "
                "its folder"
            )
        summary = report(paths[0])
        with suppress(OSError):
            (paths[0] / SO_FAR).unlink(missing_ok=True)
        return summary
    page = config.out or (paths[0] / SO_FAR if len(runs) == 1 else dated("comparison").with_suffix(".html"))
    _check_page(page, None if config.out else paths[0])
    _check_comparable(runs)
    make_folder(page.parent)
    if len(runs) > 1:
        write_comparison(runs, page)
    else:
        write_so_far(runs[0], page)
    print(f"report    {page}")
    return {"page": str(page)}


def _read(path: Path) -> Run:
    """What is in the folder of a run now."""
    directory = open_run(path)
    if not (path / "config.json").exists():
        raise InvalidInputError(f"{path} is not a run: no run has begun in it; name the folder that --out named")
    command, options = command_of(directory)
    check_no_plan(path, options)
    origin = directory.read_origin()
    assert origin is not None  # or `command_of` refuses
    files = Files.read(directory, origin, options)
    return Run(files, COMMANDS[command.name].course(files))


def _check_page(page: Path, of_run: Path | None) -> None:
    """Refuse a page that would replace something else, or lie where nothing can be written."""
    if page.suffix != ".html" or page.is_dir():
        raise InvalidInputError(f"--out {page} must be a file that ends in .html")
    if of_run is None and (page.parent / "config.json").exists():
        raise InvalidInputError(f"--out {page} lies in the folder of a run; name a file elsewhere")
    check_place(page.parent)


def _check_comparable(runs: list[Run]) -> None:
    kinds: dict[str, Run] = {}
    for run in runs:
        kinds.setdefault(run.course.kind, run)
    if len(kinds) > 1:
        (kind, one), (other_kind, other) = list(kinds.items())[:2]
        raise InvalidInputError(
            f"only runs of one command are compared, but {one.path} is of `{kind}` and {other.path} of `{other_kind}`"
        )
    for number, one in enumerate(runs):
        if one.path.resolve() in [other.path.resolve() for other in runs[:number]]:
            raise InvalidInputError(f"{one.path} is given twice; name every run once")
    if len(runs) > MOST:
        raise InvalidInputError(f"at most {MOST} runs are compared on one page, got {len(runs)}")
