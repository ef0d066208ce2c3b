"""What the pretrained chain earns, remembered between runs.

The plan and the judgement "before" cost as much as some training, and are the same for every β, learning rate and loop.
They are kept as safetensors under IMPLICIT_DIFFUSION_CACHE ("off" keeps nothing; by default
~/.cache/implicit-diffusion), one folder per key, which may be deleted at any time. The key hashes all that decides the
numbers: the network's weights, configuration and precision, the chain's table, the reward, the noise, the sizes, device
and dtype, the versions of torch, diffusers and NumPy, and every file of this package. Rewards of the user's own are not
remembered, for what their code depends on is not known, and neither are chains under conditions or evaluations too
large for a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.stored import Stored
from implicit_diffusion.commands.rewards.trust import is_own
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation, evaluate
from implicit_diffusion.extras import require
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.samplers.chain import Chain

LIMIT = 64_000_000  # bytes of one evaluation


def evaluate_pretrained(
    chain: Chain,
    reward: Callable[..., Tensor] | Reward,
    noise: Noise,
    *,
    name: str,
    starts: int,
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
    skip: Callable[[int], None] = lambda done: None,
    stored: Stored | None = None,
) -> Evaluation:
    """`evaluate(chain.pretrained(), …)`, from disk where it was made before.

    Args:
        chain: whose reference is evaluated.
        reward: R, (n, *event) → (n,).
        noise: of the evaluation.
        name: of the reward; numbers of the user's own are not kept.
        starts: independent x_0.
        repeats: trajectories from each x_0.
        progress: called with the number of trajectories just done.
        skip: called with the number of those that are there already.
        stored: the same in the run's own folder, which holds it afterwards, and from which it is gone on with.
    """

    def make() -> Evaluation:
        sizes: dict[str, Any] = {"starts": starts, "repeats": repeats, "progress": progress}
        if stored is None:
            return evaluate(chain.pretrained(), reward, noise, **sizes)
        return stored.evaluate(chain.pretrained(), reward, noise, skip=skip, **sizes)

    folder = _cache() if chain.condition is None else None
    size = 4 * starts * repeats * torch.Size(chain.event_shape).numel()
    if folder is None or is_own(name) or size > LIMIT or not isinstance(chain.reference, DiffusersDenoiser):
        return make()
    shown = None if stored is None else stored.shown
    folder = folder / _key(chain, chain.reference, name, noise, starts, repeats, stored is not None, shown)
    with suppress(InvalidInputError, OSError, TypeError):  # not there, or damaged
        found = Evaluation(**{column: value.to(chain.device) for column, value in load_state(folder).items()})
        skip(starts * repeats)
        if stored is not None:
            stored.write(found)
        return found
    made = make()
    with suppress(OSError):  # a disk that is full or read-only
        save_state(folder, vars(made))
    return made


def _cache() -> Path | None:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicit-diffusion"
    chosen = os.environ.get("IMPLICIT_DIFFUSION_CACHE", str(default))
    return None if chosen in ("", "off") else Path(chosen) / "pretrained"


def _key(chain: Chain, network: DiffusersDenoiser, *others: object) -> str:
    """The key of an evaluation; `others` are told apart by their repr."""
    parts = [_software(), repr(others), str(chain.device), str(chain.dtype), str(chain.event_shape)]
    parts += [str(network.precision), str(network.compiled is not None)]
    config: Any = network.model.config
    parts += [json.dumps(chain.table.to_dict()), json.dumps(dict(config), default=str, sort_keys=True)]
    digest = hashlib.sha256("\n".join(parts).encode())
    for name, weight in network.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def _software() -> str:
    require("diffusers")
    import diffusers

    versions = (torch.__version__, diffusers.__version__, np.__version__, platform.platform(), platform.processor())
    return " ".join((*versions, code_digest()))


@cache
def code_digest() -> str:
    """sha256 of every file of this package."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
