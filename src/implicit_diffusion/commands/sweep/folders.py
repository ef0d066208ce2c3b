"""The folder of a sweep: one subfolder per β, each a fine-tuning run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.finetune.planning import PLANNED
from implicit_diffusion.commands.shared.prompt_files import COPIES
from implicit_diffusion.commands.sweep.config import OF_ONE_RUN, Config
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import UNFINISHED
from implicit_diffusion.files.lock import LOCK
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.provenance import PROVENANCE_FILE
from implicit_diffusion.runs.records import as_json

LEFT_BY_AN_EARLY_END = {
    LOCK,
    PROVENANCE_FILE,
    clock.SECONDS_FILE,
    "config.json",
    "plan.json",
    PLANNED,
    "figures",
    *COPIES,
    "checkpoint",
}


def settings(config: Config) -> dict[str, Any]:
    """What must agree between two parts of a sweep: all but the β's, the folder, the device, the checkpoints."""
    agreed = asdict(config.each)
    for name in (*OF_ONE_RUN, "out", "device", "keep"):
        del agreed[name]
    values: dict[str, Any] = as_json(agreed)
    return values


@main_only
def check_folder(directory: RunDirectory, config: Config) -> None:
    """Refuse a folder that is neither new nor empty, and does not hold a sweep of the same options.

    Raises:
        InvalidInputError: it holds something else.
    """
    out, saved, asked = directory.path, directory.read_config(), settings(config)
    if not (out / "config.json").is_file():
        directory.check(out)
        return
    if saved is None or saved.keys() != asked.keys():
        raise InvalidInputError(f"--out {out} holds something else than a sweep of this release; choose another --out")
    different = sorted(key for key in saved if saved[key] != asked[key])
    if different:
        what = ", ".join(f"{key} was {saved[key]!r} and is {asked[key]!r}" for key in different)
        raise InvalidInputError(f"--out {out} holds a sweep of other options: {what}; choose another --out")


@main_only
def holds_little(folder: Path) -> bool:
    """Whether a run's folder holds nothing but what an early end leaves."""
    return {path.name.removesuffix(UNFINISHED) for path in folder.glob("*")} <= LEFT_BY_AN_EARLY_END


@main_only
def folder_of(out: Path, beta: float) -> Path:
    """The folder of the run at β: the one that holds it, or a new one whose name has β to the last digit."""
    for folder in sorted(out.glob("beta-*/")):
        if beta_of(folder) == beta:
            return folder
    short = f"{beta:.6g}"
    return out / f"beta-{short if float(short) == beta else repr(float(beta))}"


def beta_of(folder: Path) -> float | None:
    """The KL weight that a run's folder was begun with; None where it did not come that far."""
    try:
        value = read_json(folder / "config.json")["kl_weight"]
    except (InvalidInputError, KeyError):
        return None
    return float(value) if isinstance(value, int | float) else None


def finished(out: Path) -> dict[float, Path]:
    """The folders of all finished runs by their β, in increasing order, those of earlier calls among them."""
    folders = [path.parent for path in out.glob("beta-*/summary.json")]
    return dict(sorted((beta, folder) for folder in folders if (beta := beta_of(folder)) is not None))
