"""The evaluation cache: evaluations of pretrained chains, kept between runs.

The plan and the judgement of the pretrained chain cost as much as some training, and are the same for every β, learning
rate and loop. They are kept as safetensors under IMPLICIT_DIFFUSION_CACHE (by default ~/.cache/implicit-diffusion;
"off" keeps nothing), one folder per key, which may be deleted at any time. The key is a hash of everything that decides
the numbers: the network's weights, configuration and precision, the chain's table, the name of the reward, the noise,
the sizes, device and dtype, the versions of torch, diffusers and NumPy, and every file of this package. Rewards without
a name are not kept, because it is not known what their code depends on; neither are evaluations of chains under
conditions, or evaluations larger than `LIMIT`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.sharded import is_sharded
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Evaluation, evaluate, moved, weighed
from implicit_diffusion.evaluation.stored import Stored
from implicit_diffusion.extras import require
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.processes import from_main
from implicit_diffusion.samplers.chain import Chain

LIMIT = 64_000_000  # largest size of one evaluation, in bytes


def evaluate_pretrained(
    chain: Chain,
    reward: Callable[..., Tensor] | Reward,
    noise: Noise,
    *,
    name: str | None,
    starts: int,
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
    skip: Callable[[int], None] = lambda done: None,
    stored: Stored | None = None,
) -> Evaluation:
    """`evaluate(chain.pretrained(), …)`, read from the cache where it is there.

    Args:
        chain: the chain whose reference is evaluated.
        reward: R, (n, *event) → (n,).
        noise: of the evaluation.
        name: of the reward, which must decide what it computes; None for a reward that is never kept. Coefficients of
            several rewards are not part of it: R is added up again.
        starts: number of independent x_0.
        repeats: number of trajectories from each x_0.
        progress: called with the number of trajectories just completed.
        skip: called with the number of trajectories that need not be drawn.
        stored: a run's own copy, which holds the evaluation afterwards; an interrupted one is continued from it.
    """

    def make() -> Evaluation:
        sizes: dict[str, Any] = {"starts": starts, "repeats": repeats, "progress": progress}
        if stored is None:
            return evaluate(chain.pretrained(), reward, noise, **sizes)
        return stored.evaluate(chain.pretrained(), reward, noise, skip=skip, **sizes)

    cache_folder = from_main(_folder)
    size = 4 * starts * repeats * torch.Size(chain.event_shape).numel()
    too_large = size > LIMIT or is_sharded(chain.reference)
    if cache_folder is None or name is None or chain.condition is not None or too_large:
        return make()
    network = chain.reference
    if type(network) is not DiffusersDenoiser:  # its config says what it computes
        return make()
    samples = "all" if stored is None else "first" if stored.shown is None else f"first of {stored.shown} starts"
    what = {"reward": name, "seed": noise.seed, "stream": noise.prefix, "starts": starts, "repeats": repeats}
    folder = cache_folder / _key(chain, network, what | {"samples": samples})
    with suppress(InvalidInputError, OSError, TypeError):  # not there, or damaged
        saved = from_main(lambda: load_state(folder))
        kept = weighed(moved(Evaluation(**saved), chain.device), reward)
        skip(starts * repeats)
        if stored is not None:
            stored.write(kept)
        return kept
    made = make()
    with suppress(OSError):  # a disk that is full or read-only
        from_main(lambda: save_state(folder, vars(made)))
    return made


def _folder() -> Path | None:
    """The folder of all keys; None where nothing is to be kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicit-diffusion"
    chosen = os.environ.get("IMPLICIT_DIFFUSION_CACHE", str(default))
    return None if chosen in ("", "off") else Path(chosen) / "pretrained"


def _key(chain: Chain, network: DiffusersDenoiser, what: Mapping[str, Any]) -> str:
    """The key of an evaluation: everything that decides its numbers; `what` holds plain values."""
    config: Any = network.model.config
    described = {
        "software": _software(),
        "evaluation": dict(what),
        "device": str(chain.device),
        "dtype": str(chain.dtype),
        "event_shape": list(chain.event_shape),
        "precision": str(network.precision),
        "compiled": network.compiled is not None,
        "table": chain.table.to_dict(),
        "network": dict(config),
    }
    digest = hashlib.sha256(json.dumps(described, default=str, sort_keys=True).encode())
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
    """sha256 of all files of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
