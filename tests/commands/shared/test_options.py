"""What `--help` says of an option keeps the line breaks of the source: these must not split a sentence."""

import ast
import inspect

import pytest

from implicit_diffusion.commands.ebm import config as ebm_config
from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.commands.hexagon import config as hexagon_config
from implicit_diffusion.commands.pretrain import config as pretrain_config
from implicit_diffusion.commands.recovery import config as recovery_config
from implicit_diffusion.commands.sample import command as sample
from implicit_diffusion.commands.score import config as score_config
from implicit_diffusion.commands.sweep import command as sweep
from implicit_diffusion.commands.tilt import config as tilt_config
from implicit_diffusion.errors import InvalidInputError

MODULES = [
    finetune_config,
    pretrain_config,
    sample,
    sweep,
    ebm_config,
    tilt_config,
    hexagon_config,
    score_config,
    recovery_config,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_descriptions_break_after_sentences_only_and_none_is_missing(module):
    (config,) = (node for node in ast.parse(inspect.getsource(module)).body if getattr(node, "name", "") == "Config")
    for option, text in zip(config.body, config.body[1:]):
        if isinstance(option, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{option.target.id} has no description"
            first_lines = text.value.value.split("\n")[:-1]
            assert all(line.rstrip().endswith(".") for line in first_lines), text.value.value


def test_numbers_that_no_machine_counts_to_are_refused():
    for config, option in (
        (finetune_config.Config(batch=2**31), "--batch"),
        (pretrain_config.Config(batch=10**30), "--batch"),
        (pretrain_config.Config(seed=2**63), "--seed"),
    ):
        with pytest.raises(InvalidInputError, match=f"{option} must be an integer ≤ "):
            config.check()
