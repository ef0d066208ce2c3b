"""The command line: one subcommand per experiment, its options the fields of a frozen Config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion import __version__
from implicit_diffusion.command_line import read
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.runs.console import unheard
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.runs.provenance import Change
from implicit_diffusion.runs.signals import exit_status, interruptible

DESCRIPTION = """Optimise samplers through the distributions that they produce.

Start here:
  implicit-diffusion finetune --plan               what each KL weight can buy
  implicit-diffusion finetune --kl-weight 2.5      fine-tune the shipped digits
  implicit-diffusion sample --model RUN/model      look at the result
  implicit-diffusion ebm --data moons              train an energy-based model
  implicit-diffusion sweep --kl-weights 1 2 4      one run per KL weight
  implicit-diffusion hexagon                       the paper's first experiment
  implicit-diffusion recovery --problem two-modes  why particles have weights
  implicit-diffusion COMMAND --help                all options of a command
  implicit-diffusion --version                     the version, and torch's"""


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted."""

    run: Path = field(metadata={"positional": True})
    """The folder of the run."""
    accept_changes: tuple[Change, ...] = ()
    """What may have changed since the run began; every other change is refused by name."""
    trust_reward: bool = False
    """Run the code of the reward that the folder names, though it lies there, has changed, or is not known here."""


@dataclass(frozen=True)
class Report:
    """Draw the figures of a finished run again, and write its report, from what is in its folder."""

    run: Path = field(metadata={"positional": True})
    """The folder of the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, dispatch, and turn our own errors into one line and exit status 2.

    What the system refuses is such a line as well; an interrupted command ends with 128 and the number of its signal.
    """
    with unheard(), interruptible():
        try:
            with naming_memory():
                _run(sys.argv[1:] if arguments is None else arguments)
        except ImplicitDiffusionError as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: the system refuses: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            return exit_status()
        return 0


def commands() -> dict[str, type]:
    """The configuration of every command."""
    from implicit_diffusion.commands.ebm import config as ebm_config
    from implicit_diffusion.commands.finetune import config as finetune_config
    from implicit_diffusion.commands.hexagon import config as hexagon_config
    from implicit_diffusion.commands.pretrain import config as pretrain_config
    from implicit_diffusion.commands.recovery import command as recovery
    from implicit_diffusion.commands.sample import command as sample
    from implicit_diffusion.commands.score import command as score
    from implicit_diffusion.commands.sweep import command as sweep
    from implicit_diffusion.commands.tilt import command as tilt

    return {
        "finetune": finetune_config.Config,
        "resume": Resume,
        "report": Report,
        "sweep": sweep.Config,
        "sample": sample.Config,
        "pretrain": pretrain_config.Config,
        "ebm": ebm_config.Config,
        "score": score.Config,
        "tilt": tilt.Config,
        "hexagon": hexagon_config.Config,
        "recovery": recovery.Config,
    }


def _run(arguments: Sequence[str]) -> None:
    from implicit_diffusion.commands import resuming
    from implicit_diffusion.commands.ebm import command as ebm
    from implicit_diffusion.commands.ebm import config as ebm_config
    from implicit_diffusion.commands.finetune import command as finetune
    from implicit_diffusion.commands.finetune import config as finetune_config
    from implicit_diffusion.commands.hexagon import command as hexagon
    from implicit_diffusion.commands.hexagon import config as hexagon_config
    from implicit_diffusion.commands.pretrain import command as pretrain
    from implicit_diffusion.commands.pretrain import config as pretrain_config
    from implicit_diffusion.commands.recovery import command as recovery
    from implicit_diffusion.commands.sample import command as sample
    from implicit_diffusion.commands.score import command as score
    from implicit_diffusion.commands.sweep import command as sweep
    from implicit_diffusion.commands.tilt import command as tilt

    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:  # neither JSON nor a report could hold it
            raise InvalidInputError(f"{argument!a} is not UTF-8; give the file or folder another name") from error
    if list(arguments[:1]) == ["--version"]:
        print(f"implicit-diffusion {__version__}, torch {torch.__version__}")
        return
    chosen: Any = read(arguments, commands(), prog="implicit-diffusion", description=DESCRIPTION)
    match chosen:
        case finetune_config.Config():
            finetune.run(chosen)
        case Resume():
            resuming.resume(chosen.run, chosen.accept_changes, trust_reward=chosen.trust_reward)
        case Report():
            resuming.report(chosen.run)
        case sweep.Config():
            sweep.run(chosen)
        case sample.Config():
            sample.run(chosen)
        case pretrain_config.Config():
            pretrain.run(chosen)
        case ebm_config.Config():
            ebm.run(chosen)
        case score.Config():
            score.run(chosen)
        case tilt.Config():
            tilt.run(chosen)
        case hexagon_config.Config():
            hexagon.run(chosen)
        case recovery.Config():
            recovery.run(chosen)
