"""The command line: reads the command and its options, runs it, and turns errors into one line and a status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from implicit_diffusion import __version__
from implicit_diffusion.commands.command_line.flags import with_flags
from implicit_diffusion.commands.command_line.parsing import read
from implicit_diffusion.commands.registry import COMMANDS, CONFIGURATIONS
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, ProcessError
from implicit_diffusion.runs.console import never_failing_output
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.runs.parallel import End, joined
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
  implicit-diffusion --version                     version, and that of torch"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    An error that is raised on purpose, or by the operating system, is one line on stderr and status 2. A command that
    a signal interrupts ends with status 128 plus the number of the signal. Processes that a launcher has started run it
    together.

    Args:
        arguments: words after the name of the program; by default those that the program was called with.
    """
    words = sys.argv[1:] if arguments is None else arguments
    with never_failing_output():
        try:
            with joined() as group:
                return group.leave(_end(words))
        except InvalidInputError as error:  # of a launcher
            print(f"error: {error}", file=sys.stderr)
            return 2


def _end(words: Sequence[str]) -> End:
    """Run the command; how it ended."""
    try:
        with interruptible(), naming_memory():
            _run(words)
    except ImplicitDiffusionError as error:
        return End(2, f"error: {_with_flags(_one_line(error), words)}", lost=isinstance(error, ProcessError))
    except OSError as error:
        return End(2, f"error: the operating system refuses: {_one_line(error)}")
    except KeyboardInterrupt as error:
        return End(exit_status(), str(error) or "interrupted")
    return End()


def _run(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:  # neither JSON nor a report could hold it
            raise InvalidInputError(f"{word!a} is not UTF-8; give the file or folder another name") from error
    if list(words[:1]) == ["--version"]:
        print(f"implicit-diffusion {__version__}, torch {torch.__version__}")
        return
    config = read(words, CONFIGURATIONS, prog="implicit-diffusion", description=DESCRIPTION)
    COMMANDS[words[0]].run(config)


def _with_flags(message: str, words: Sequence[str]) -> str:
    """A message in the words of the command, where one was given."""
    return with_flags(message, COMMANDS[words[0]].config) if words and words[0] in COMMANDS else message


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).splitlines())
