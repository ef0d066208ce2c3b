"""What fine-tuning runs begin with and leave behind, for tests that compare them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers import tiny, toy_model

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


def home(folder, functions):
    """The folder, with a model in it, a class-conditional one, and r.py, which holds the functions."""
    toy_model.folder(folder / "model", tiny.scheduler())
    tiny.class_conditional(folder / "classes")
    (folder / "r.py").write_text(functions)
    return folder


def summary_of(run):
    return json.loads((Path(run) / "summary.json").read_text())


def same_weights(one, other):
    """Whether two runs have the same model, to the bit."""
    ours, theirs = (load_file(Path(run) / WEIGHTS) for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
