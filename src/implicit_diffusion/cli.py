"""The command line: one subcommand per experiment, its options the fields of a frozen Config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.runs.console import unheard
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.runs.provenance import Change
from implicit_diffusion.runs.signals import exit_status, interruptible


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    accept_changes: tuple[Change, ...] = ()
    """What may be another one than when the run began; other differences are refused, by name."""
    trust_reward: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run the code of the reward that the directory names, though it lies there, has changed, or is not known here."""


@dataclass(frozen=True)
class Report:
    """Draw the figures of a finished run again, and write its report, from what is in its directory."""

    run: tyro.conf.Positional[Path]
    """The run directory."""


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


def _run(arguments: Sequence[str]) -> None:
    from implicit_diffusion.experiments import (
        ebm,
        finetune,
        finetune_config,
        hexagon,
        pretrain,
        pretrain_config,
        recovery,
        resuming,
        sample,
        score,
        sweep,
        tilt,
    )

    commands = (
        Annotated[tyro.conf.FlagCreatePairsOff[finetune_config.Config], tyro.conf.subcommand("finetune")]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[tyro.conf.FlagCreatePairsOff[sweep.Config], tyro.conf.subcommand("sweep")]
        | Annotated[sample.Config, tyro.conf.subcommand("sample")]
        | Annotated[tyro.conf.FlagCreatePairsOff[pretrain_config.Config], tyro.conf.subcommand("pretrain")]
        | Annotated[ebm.Config, tyro.conf.subcommand("ebm")]
        | Annotated[score.Config, tyro.conf.subcommand("score")]
        | Annotated[tilt.Config, tyro.conf.subcommand("tilt")]
        | Annotated[hexagon.Config, tyro.conf.subcommand("hexagon")]
        | Annotated[recovery.Config, tyro.conf.subcommand("recovery")]
    )
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:  # neither JSON nor a report could hold it
            raise InvalidInputError(f"{argument!a} is not UTF-8; give the file or folder another name") from error
    chosen = tyro.cli(
        commands,
        prog="implicit-diffusion",
        description="Optimise samplers through the distributions that they produce.\n\n"
        "Start here:\n"
        "  implicit-diffusion finetune --plan                 what each KL weight can buy\n"
        "  implicit-diffusion finetune --kl-weight 2.5        fine-tune the shipped digits for brightness\n"
        "  implicit-diffusion sample --model RUN/model        look at the result\n"
        "  implicit-diffusion ebm --data moons                train an energy-based model and its likelihood\n"
        "  implicit-diffusion sweep --kl-weights 1 2 4        reward against KL, one run per weight\n"
        "  implicit-diffusion hexagon                         the paper's first experiment, in all its arms\n"
        "  implicit-diffusion recovery --problem two-modes    why weighted particles",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
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
        case ebm.Config():
            ebm.run(chosen)
        case score.Config():
            score.run(chosen)
        case tilt.Config():
            tilt.run(chosen)
        case hexagon.Config():
            hexagon.run(chosen)
        case recovery.Config():
            recovery.run(chosen)
