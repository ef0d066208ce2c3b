"""What a model is sampled under, from the command line to the chain: prompts or class labels, guidance, images.

    prompts of a file        →  table of embeddings, computed once  →  Embedded(network)  ┐
    classes of the network   →  network                                                   ┴→  ClassifierFree(…, w)
    reward(images, prompts)  →  R(x, condition) of the chain's states, decoded where they are latents

The chain draws the number of a prompt, or a class, for every trajectory (`Drawn`).
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.reading import read_bytes
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.models.prompts import embed_prompts
from implicit_diffusion.reward_values import takes_condition
from implicit_diffusion.showing import Shown

PROMPT, CLASS = "prompt", "class_labels"
MOST = 2**24  # bytes of a file of prompts
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
UNSEEN = ("Cc", "Zl", "Zp")  # control characters, and separators of lines and paragraphs


@dataclass(frozen=True, repr=False)
class Conditioning(Shown):
    """What trajectories are sampled under.

    Args:
        drawn: the chain's condition; None for an unconditional model.
        prompts: the file's lines.
        table: their embeddings, and those of the empty prompt in its last row.
        guidance: w.
        null: the value of the condition that stands for none, where guidance needs it.
    """

    drawn: Drawn | None = None
    prompts: tuple[str, ...] = ()
    table: Mapping[str, Tensor] | None = None
    guidance: float = 1.0
    null: int | None = None

    def around(self, network: nn.Module) -> nn.Module:
        """The denoiser that the chain runs on: `network` with embeddings and guidance around it."""
        if self.table is not None:
            network = Embedded(network, self.table, PROMPT)
        if self.drawn is not None and self.guidance != 1:
            assert self.null is not None
            network = ClassifierFree(network, self.guidance, {self.drawn.name: self.null})
        return network

    def of_states(self, reward: Callable[..., Any], decoder: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
        """R(x, condition) of the chain's states, from a reward of images, or of images and prompts or labels.

        It returns what the reward does, in whatever form that is.
        """
        if self.drawn is None:
            return reward
        wants = takes_condition(reward)

        def of_states(x: Tensor, condition: Mapping[str, Tensor]) -> Any:
            images = x if decoder is None else decoder(x)
            if not wants:
                return reward(images)
            if self.prompts:
                return reward(images, [self.prompts[i] for i in condition[PROMPT].tolist()])
            return reward(images, condition[CLASS])

        return of_states


def conditioning(config: Config, pretrained: Pretrained, device: torch.device) -> Conditioning:
    """What `config` samples this model under.

    Raises:
        InvalidInputError: prompts for a model without text encoder, or none for one that has them; guidance of an
            unconditional model, or without a class that stands for none; from `embed_prompts`.
    """
    kind, guidance = pretrained.condition, config.guidance
    if kind != "prompts" and config.prompts is not None:
        raise InvalidInputError(
            f"--prompts: {config.model} has no text encoder, it is "
            + ("conditioned on class labels" if kind else "unconditional")
            + "; leave them out"
        )
    if kind != "classes" and config.null_class is not None:
        raise InvalidInputError(f"--null-class: {config.model} is not conditioned on classes; leave it out")
    if kind is None:
        if guidance is not None:
            raise InvalidInputError(f"--guidance: {config.model} is unconditional, there is nothing to guide towards")
        return Conditioning()
    guidance = pretrained.family.guidance if guidance is None else guidance
    if kind == "prompts":
        if config.prompts is None:
            raise InvalidInputError(f"--model {config.model} is text-conditional: give --prompts FILE, one per line")
        prompts = read_prompts(config.prompts)
        assert pretrained.checkpoint is not None
        table = embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, prompts, device)
        count = len(prompts)
        return Conditioning(Drawn(PROMPT, torch.arange(count)), tuple(prompts), table, guidance, null=count)
    classes, null = pretrained.num_classes or 0, config.null_class
    if null is None and pretrained.family is not PIXELS:
        null = classes  # the row that DiT's training dropped labels to
    elif null is not None and not 0 <= null < classes:
        raise InvalidInputError(f"--null-class must lie in 0..{classes - 1}, got {null}")
    if null is None and guidance != 1:
        raise InvalidInputError(
            f"--guidance needs --null-class, the one of the {classes} labels that stood for no class in training"
        )
    labels = torch.tensor([label for label in range(classes) if label != null])
    return Conditioning(Drawn(CLASS, labels), guidance=guidance, null=null)


def read_prompts(path: str | PathLike[str]) -> list[str]:
    r"""The prompts of a file, one per line; blank lines do not count.

    A line ends where a text editor ends it: at \n, \r\n or \r. The file is UTF-8, or begins with the byte order mark of
    UTF-8, UTF-16 or UTF-32. What else may be taken for the end of a line (a form feed, U+0085, U+2028, …), and other
    control characters, which no editor shows as they are, are refused.

    Raises:
        InvalidInputError: no such file, none that is regular, one of more than `MOST` bytes, in another encoding, with
            such a character (the message names the line), or with nothing in it.
    """
    try:
        contents = read_bytes(check_path("--prompts", path), MOST)
    except InvalidInputError as error:
        raise InvalidInputError(f"--prompts: {error}; it is a text file, a prompt a line") from error
    encoding = next((name for mark, name in MARKS.items() if contents.startswith(mark)), "utf-8")
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        at = contents.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"--prompts {path} cannot be read: line {at} is no {encoding} ({error.reason}); save it as UTF-8"
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
