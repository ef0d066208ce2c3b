"""A model of the user's own on disk: its weights, and which function makes the network that they belong to.

    model.safetensors   the state_dict of the denoiser
    factory.json        {"factory": "/…/FILE.py:function"}
    chain.json          the chain that it was fine-tuned for (`chain_file`)
    README.md           its card

The folder holds no code. The function runs only where its user has named it (`commands.rewards.trust`); it returns the
denoiser, and the weights of the file are put in place of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import unwrapped
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.files.tensors import load_tensors, save_tensors
from implicit_diffusion.processes import main_only

WEIGHTS = "model.safetensors"
FACTORY = "factory.json"
NAMED = 4  # keys in a message


@main_only
def save_own_model(folder: Path, denoiser: nn.Module, factory: str, card: str) -> None:
    """Write weights, factory and card.

    Args:
        folder: created if missing.
        denoiser: a `ModuleDenoiser`, or guidance around one; without adapters.
        factory: "/…/FILE.py:function", which makes the denoiser.
        card: Markdown of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = unwrapped(denoiser).model
    assert isinstance(network, nn.Module)
    # clones, since tied weights share their memory, and safetensors writes none that is shared
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    save_tensors(folder / WEIGHTS, state, {"format": "pt"})
    (folder / FACTORY).write_text(json.dumps({"factory": factory}, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def is_own_model(folder: Path) -> bool:
    """Whether a folder holds a model of somebody's own."""
    return (folder / FACTORY).is_file()


def read_factory(folder: Path) -> str:
    """The name of the function that makes the model in a folder; nothing of it is run.

    Raises:
        InvalidInputError: the file is damaged, or leads out of the folder.
    """
    content = read_json(inside(folder, folder / FACTORY))
    name = content.get("factory")
    if not isinstance(name, str):
        raise InvalidInputError(f'{folder / FACTORY} must hold {{"factory": "FILE.py:function"}}, got {name!r}')
    return name


def load_own_weights(folder: Path, denoiser: nn.Module) -> None:
    """Put the weights of a folder in place of those of the denoiser that its factory has made.

    Raises:
        InvalidInputError: the file is missing or damaged, or its names, shapes or numbers are not those of the network.
    """
    path = inside(folder, folder / WEIGHTS)
    weights, _ = load_tensors(path)
    state = denoiser.state_dict()
    missing, unknown = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    if missing or unknown:
        parts = [
            f"{what} {', '.join(names[:NAMED])}{'…' * (len(names) > NAMED)}"
            for what, names in (("lacks", missing), ("also has", unknown))
            if names
        ]
        raise InvalidInputError(
            f"{path} does not belong to the network that its factory returns, a {type(denoiser).__name__}: it "
            f"{' and '.join(parts)}; return the network that was trained"
        )
    for name, value in weights.items():
        if value.shape != state[name].shape or value.dtype != state[name].dtype:
            ours, theirs = (f"{v.dtype} {tuple(v.shape)}" for v in (state[name], value))
            raise InvalidInputError(
                f"{path}: {name} is {theirs}, and that of the network that its factory returns is {ours}; return the "
                "network that was trained"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise InvalidInputError(f"{path}: {name} holds NaN or infinity")
    denoiser.load_state_dict(weights)
