"""Every family of pipelines with an adapter away from zero, and how its file is read elsewhere.

`markdown` prints the table of the documentation from what is saved.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from implicit_diffusion.denoisers.lora import add_lora
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.adapters.saving import adapter_usage, save_comfyui_adapter
from implicit_diffusion.noise import Noise
from tests.helpers import tiny, tiny_pipelines

RANK, ALPHA = 3, 4.5  # α/r is not one, and no power of two


@dataclass(frozen=True)
class Case:
    """A network with an adapter, and what its pipeline calls it with.

    Args:
        pipeline: with the original network.
        part: the network's name.
        adapted: a copy of the network with an adapter away from zero.
        arguments: of one call of the network.
        keywords: of the same call.
    """

    pipeline: Any
    part: str
    adapted: Any
    arguments: tuple
    keywords: dict

    @property
    def original(self):
        return getattr(self.pipeline, self.part)

    def fresh(self):
        """The pipeline with a copy of its original network."""
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**{self.part: copy.deepcopy(self.original)})
        return pipeline

    def answer(self, network):
        """What a network answers to the call."""
        with torch.no_grad():
            answer = network.eval()(*self.arguments, **self.keywords)[0]
        return torch.stack(list(answer)) if isinstance(answer, list) else answer


class _CalledError(Exception):
    """Stops a pipeline at the first call of its network."""


def first_call(pipeline, network, family):
    """The arguments of the first call that a pipeline makes."""
    calls = []

    def keep(module, arguments, keywords):
        calls.append((arguments, keywords))
        raise _CalledError

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    given = {"prompt": family.prompts} if family.prompts else {}
    try:
        pipeline(**given | family.call, num_inference_steps=2, generator=generator)
    except _CalledError:
        return calls[0]
    finally:
        handle.remove()
    raise AssertionError("the network was not called")


def cog_video_x(folder):
    """CogVideoX, whose call is written down: it has no chain yet among the pipelines that are read."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    network = tiny.seeded(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    pipeline = CogVideoXPipeline(None, None, None, network, CogVideoXDDIMScheduler())
    normal = tiny_pipelines.normal
    given = {"hidden_states": normal(1, 2, 4, 4, 4), "encoder_hidden_states": normal(1, 6, 16, seed=1)}
    return pipeline, ((), given | {"timestep": torch.tensor([500]), "return_dict": False})


FAMILIES = [*tiny_pipelines.FAMILIES, "CogVideoX"]


def made(name, folder, targets=None):
    """The case of a family."""
    if name == "CogVideoX":
        pipeline, call = cog_video_x(folder)
        part = "transformer"
    else:
        family = tiny_pipelines.FAMILIES[name](folder)
        pipeline = family.pipeline
        part = "unet" if hasattr(pipeline, "unet") else "transformer"
        call = first_call(pipeline, getattr(pipeline, part), family)
    adapted = copy.deepcopy(getattr(pipeline, part))
    add_lora(adapted, RANK, Noise(0), targets, alpha=ALPHA)
    move(adapted)
    return Case(pipeline, part, adapted, *call)


def move(network):
    """Add normal numbers to the matrices of its adapter."""
    generator = torch.Generator().manual_seed(5)
    for p in network.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)


def markdown(cases, folder):
    """How each family's adapters are loaded, as the table of the documentation; `cases` makes the case of a name."""
    from safetensors import safe_open

    lines = ["| family | loaded by | a key of the file for ComfyUI | α there |", "|---|---|---|---|"]
    for name in FAMILIES:
        case = cases(name)
        usage = adapter_usage(type(case.pipeline), case.part).replace('"lora"', '"…/lora"')
        try:
            path = save_comfyui_adapter(folder / "file.safetensors", case.adapted, type(case.pipeline), case.part)
            with safe_open(path, "pt") as file:
                keys = sorted(key for key in file.keys() if not key.endswith(".alpha"))  # noqa: SIM118
                alphas = len(keys) < len(file.keys())
            row = f"`{keys[0]}` | {'entries' if alphas else 'in B'}"
        except InvalidInputError:
            row = "none known |"
        lines.append(f"| {name} | `{usage}` | {row} |")
    return "\n".join(lines)
