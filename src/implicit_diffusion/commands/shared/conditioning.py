"""The conditions that a model is sampled under, from the command line to the chain: prompts or labels, and guidance.

    prompts of a file        →  table of embeddings, computed once  →  Embedded(network)  ┐
    classes of the network   →  network                                                   ┴→  ClassifierFree(…, w)
    reward(images, prompts)  →  R(x, condition) of the chain's states, decoded where they are latents

For every trajectory the chain draws the number of a prompt, or a class (`Drawn`).
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.reading import read_bytes
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.models.prompts import embed_prompts
from implicit_diffusion.reward_values import like, of_tensors, takes_condition
from implicit_diffusion.showing import Shown

PROMPT, CLASS = "prompt", "class_labels"
MOST = 2**24  # largest size of a file of prompts, in bytes
MARKS = {  # byte order marks, with the encodings that they announce
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, since it begins with the mark of that
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
UNSEEN = ("Cc", "Zl", "Zp")  # control characters, and separators of lines and paragraphs


@dataclass(frozen=True)
class ConditioningSpec:
    """What a command is asked to sample a model under.

    Args:
        model: its name, for messages.
        prompts: text file with one prompt per line; None for a model without prompts.
        guidance: scale w of classifier-free guidance; None for that of the model's pipeline.
        null_class: the label that stands for no class; None where the model has none.
    """

    model: str
    prompts: Path | None = None
    guidance: float | None = None
    null_class: int | None = None


@dataclass(frozen=True, repr=False)
class Conditioning(Shown):
    """The conditions that trajectories are sampled under.

    Args:
        drawn: the chain's condition; None for an unconditional model.
        prompts: the prompts, in the order of the file.
        table: their embeddings; the last row is that of the empty prompt.
        guidance: scale w of classifier-free guidance.
        null: the value of the condition that stands for none, where guidance needs it.
    """

    drawn: Drawn | None = None
    prompts: tuple[str, ...] = ()
    table: Mapping[str, Tensor] | None = None
    guidance: float = 1.0
    null: int | None = None

    def around(self, network: nn.Module) -> nn.Module:
        """The denoiser that the chain runs: `network` within embeddings and guidance."""
        if self.table is not None:
            network = Embedded(network, self.table, PROMPT)
        if self.drawn is not None and self.guidance != 1:
            assert self.null is not None
            network = ClassifierFree(network, self.guidance, {self.drawn.name: self.null})
        return network

    def of_states(self, reward: Callable[..., Any], decoder: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
        """R(x, condition) of the chain's states, from a reward of images, or of images and prompts or labels.

        It returns whatever the reward returns.

        Raises:
            InvalidInputError: a reward of images and prompts, but an unconditional model.
        """
        if self.drawn is None:
            if takes_condition(reward):
                raise InvalidInputError(
                    "reward takes two arguments, the samples and what they were sampled under (prompts, class labels), "
                    "but samples of this model come without a condition; use a reward of the samples alone (clip:MODEL "
                    'is one with a text of yours, clip:MODEL(text="…")), or a model that is sampled under a condition'
                )
            return reward
        conditional, reward = takes_condition(reward), of_tensors(reward)

        def of_states(x: Tensor, condition: Mapping[str, Tensor]) -> Any:
            images = x if decoder is None else decoder(x)
            if not conditional:
                return reward(images)
            if self.prompts:
                return reward(images, [self.prompts[i] for i in condition[PROMPT].tolist()])
            return reward(images, condition[CLASS])

        return like(of_states, reward)


def conditioning(spec: ConditioningSpec, pretrained: Pretrained, device: torch.device) -> Conditioning:
    """The conditions that `spec` asks for, checked against the model.

    Raises:
        InvalidInputError: prompts for a model without a text encoder, or no prompts for a model with one; guidance of
            an unconditional model, or without a class that stands for none; from `embed_prompts`.
    """
    kind, guidance = pretrained.condition, spec.guidance
    if kind != "prompts" and spec.prompts is not None:
        raise InvalidInputError(
            f"--prompts: {spec.model} has no text encoder, it is "
            + ("conditioned on class labels" if kind else "unconditional")
            + "; leave them out"
        )
    if kind != "classes" and spec.null_class is not None:
        raise InvalidInputError(f"--null-class: {spec.model} is not conditioned on classes; leave it out")
    if kind is None:
        if guidance is not None:
            raise InvalidInputError(f"--guidance: {spec.model} is unconditional, there is nothing to guide towards")
        return Conditioning()
    guidance = pretrained.family.guidance if guidance is None else guidance
    if kind == "prompts":
        if spec.prompts is None:
            raise InvalidInputError(f"--model {spec.model} is text-conditional: give --prompts FILE, one per line")
        prompts = read_prompts(spec.prompts)
        assert pretrained.checkpoint is not None
        table = embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, prompts, device)
        count = len(prompts)
        return Conditioning(Drawn(PROMPT, torch.arange(count)), tuple(prompts), table, guidance, null=count)
    classes, null = pretrained.num_classes or 0, spec.null_class
    if null is None and pretrained.family is not PIXELS:
        null = classes  # DiT was trained with this row for dropped labels
    elif null is not None and not 0 <= null < classes:
        raise InvalidInputError(f"--null-class must lie in 0..{classes - 1}, got {null}")
    if null is None and guidance != 1:
        raise InvalidInputError(
            f"--guidance needs --null-class, the one of the {classes} labels that stood for no class in training"
        )
    labels = torch.tensor([label for label in range(classes) if label != null])
    return Conditioning(Drawn(CLASS, labels), guidance=guidance, null=null)


def read_prompts(path: str | PathLike[str]) -> list[str]:
    r"""The prompts of a file, one per line; blank lines are skipped.

    A line ends where a text editor ends it: at \n, \r\n or \r. The file is UTF-8, or begins with the byte order mark of
    UTF-8, UTF-16 or UTF-32. Other characters that may be read as the end of a line (a form feed, U+0085, U+2028, …),
    and other control characters, which editors do not show, are refused.

    Raises:
        InvalidInputError: there is no such file, it is not a regular file, has more than `MOST` bytes, another
            encoding, such a character (the message names the line), or no prompts.
    """
    try:
        contents = read_bytes(check_path("--prompts", path), MOST)
    except InvalidInputError as error:
        raise InvalidInputError(f"--prompts: {error}; it must be a text file with one prompt per line") from error
    encoding = next((name for mark, name in MARKS.items() if contents.startswith(mark)), "utf-8")
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        at = contents.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"--prompts {path} cannot be read: line {at} is not {encoding} ({error.reason}); save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        for character in line:
            if (unicodedata.category(character) in UNSEEN and character != "\t") or character == MARK:
                raise InvalidInputError(
                    f"--prompts {path}: line {number} contains the character U+{ord(character):04X}, which editors do "
                    "not show as it is read; remove it, or begin a new line there"
                )
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidInputError(f"--prompts {path} holds no prompts; write one per line")
    return prompts
