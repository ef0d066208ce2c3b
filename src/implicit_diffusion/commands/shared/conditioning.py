"""The conditions that a model is sampled under, from the command line to the chain: prompts or labels, and guidance.

    prompts of a file        →  table of embeddings, computed once  →  Embedded(network)  ┐
    classes of the network   →  network                                                   ┴→  ClassifierFree(…, w)
    reward(images, prompts)  →  R(x, condition) of the chain's states, decoded where they are latents

For every trajectory the chain draws the number of a prompt, or a class (`Drawn`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.shared.prompt_files import EXAMPLE, Prompt, read_prompts
from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.chain_file import read_chain
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.pipelines.cutting import CutPromptWarning
from implicit_diffusion.models.pipelines.denoiser import PipelineDenoiser, Plan
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.models.prompts import embed_prompts
from implicit_diffusion.reward_values import like, of_tensors, takes_condition, wants_metadata
from implicit_diffusion.showing import Shown

PROMPT, CLASS = "prompt", "class_labels"


@dataclass(frozen=True)
class ConditioningSpec:
    """What a command is asked to sample a model under.

    Args:
        model: its name, for messages.
        prompts: file with one prompt per line; None for a model without prompts.
        held_out: another one, whose prompts are not trained on; None for none.
        guidance: scale w of classifier-free guidance; None for that of the model's pipeline.
        null_class: the label that stands for no class; None where the model has none.
        student_guidance: scale of the network that is trained; None for `guidance`.
    """

    model: str
    prompts: Path | None = None
    guidance: float | None = None
    null_class: int | None = None
    held_out: Path | None = None
    student_guidance: float | None = None


@dataclass(frozen=True, repr=False)
class Conditioning(Shown):
    """The conditions that trajectories are sampled under.

    Args:
        drawn: the chain's condition; None for an unconditional model.
        prompts: those of the file, in its order, and behind them those that are not trained on.
        table: embeddings of the prompts, of their negative prompts and, as the last row, of the empty prompt.
        guidance: scale w of classifier-free guidance, of the pretrained network where another one is trained.
        student_guidance: scale of the network that is trained.
        null: the value of the condition that stands for none, or that for every prompt, where guidance needs it.
        held_out: the condition that draws from the prompts that are not trained on; None where there are none.
        inside: whether the network has embeddings and guidance in itself, as that of a pipeline that is read off.
        plans: how such a network is called under other scales of guidance than `guidance`.
    """

    drawn: Drawn | None = None
    prompts: tuple[Prompt, ...] = ()
    table: Mapping[str, Tensor] | None = None
    guidance: float = 1.0
    null: int | Tensor | None = None
    held_out: Drawn | None = None
    inside: bool = False
    student_guidance: float = 1.0
    plans: Mapping[float, Plan] = field(default_factory=dict)

    @property
    def trained_prompts(self) -> tuple[Prompt, ...]:
        """The prompts that are trained on."""
        return self.prompts[: len(self.drawn.values)] if self.prompts and self.drawn is not None else ()

    def around(self, network: nn.Module, guidance: float) -> nn.Module:
        """The denoiser that a chain runs: `network` within embeddings and guidance of this scale."""
        if self.inside:
            assert isinstance(network, PipelineDenoiser)
            return network.under(self.plans[guidance]) if guidance in self.plans else network
        if self.table is not None:
            network = Embedded(network, self.table, PROMPT)
        if self.drawn is not None and guidance != 1:
            assert self.null is not None
            network = ClassifierFree(network, guidance, {self.drawn.name: self.null})
        return network

    def of_states(self, reward: Callable[..., Any], decoder: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
        """R(x, condition) of the chain's states, from a reward of images, or of images and prompts or labels.

        It returns whatever the reward returns.

        Raises:
            InvalidInputError: a reward of images and prompts, but an unconditional model; one that takes metadata,
                which a prompt does not have.
        """
        if wants_metadata(reward):
            self._check_metadata()
        if self.drawn is None:
            if takes_condition(reward):
                raise InvalidInputError(
                    "reward takes two arguments, the samples and what they were sampled under (prompts, class labels), "
                    "but samples of this model come without a condition; use a reward of the samples alone (clip:MODEL "
                    'is one with a text of yours, clip:MODEL(text="…")), or a model that is sampled under a condition'
                )
            return reward if decoder is None else _decoded(reward, decoder)
        conditional, reward = takes_condition(reward), of_tensors(reward)

        def of_states(x: Tensor, condition: Mapping[str, Tensor]) -> Any:
            images = x if decoder is None else decoder(x)
            if not conditional:
                return reward(images)
            if self.prompts:
                return reward(images, [self.prompts[i] for i in condition[PROMPT].tolist()])
            return reward(images, condition[CLASS])

        return like(of_states, reward)

    def _check_metadata(self) -> None:
        without = next((i for i, prompt in enumerate(self.prompts) if prompt.metadata is None), None)
        if not self.prompts or without is not None:
            lacks = "samples of this model come without prompts"
            if without is not None:
                file = "--prompts" if without < len(self.trained_prompts) else "--held-out-prompts"
                lacks = f"line {self.prompts[without].line} of {file} has none"
            raise InvalidInputError(
                f"reward takes metadata, which stand beside the prompts in a file of JSON lines, and {lacks}; write "
                f"lines such as {EXAMPLE}"
            )


def _decoded(reward: Callable[..., Any], decoder: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """R(x) of states without a condition, from a reward of images."""
    score = of_tensors(reward)
    return like(lambda x: score(decoder(x)), score)


def conditioning(spec: ConditioningSpec, pretrained: Pretrained, device: torch.device) -> Conditioning:
    """The conditions that `spec` asks for, checked against the model.

    Raises:
        InvalidInputError: from `prompts_of`; guidance of an unconditional model, or without a class that stands for
            none; from `embed_prompts`.
    """
    kind, guidance = pretrained.condition, spec.guidance
    trained, held_out = prompts_of(spec, kind)
    if kind is None:
        for flag, asked in (("--guidance", guidance), ("--student-guidance", spec.student_guidance)):
            if asked is not None:
                raise InvalidInputError(f"{flag}: {spec.model} is unconditional, there is nothing to guide towards")
        return Conditioning()
    if guidance is None:
        guidance = pretrained.family.guidance if (usual := trained_guidance(pretrained.checkpoint)) is None else usual
    student = guidance if spec.student_guidance is None else spec.student_guidance
    if kind == "prompts":
        return replace(_of_prompts(trained, held_out, pretrained, device), guidance=guidance, student_guidance=student)
    classes, null = pretrained.num_classes or 0, spec.null_class
    if null is None and pretrained.family.condition == "classes":
        null = classes  # DiT was trained with this row for dropped labels
    elif null is not None and not 0 <= null < classes:
        raise InvalidInputError(f"--null-class must lie in 0..{classes - 1}, got {null}")
    if null is None and (guidance != 1 or student != 1):
        raise InvalidInputError(
            f"--guidance needs --null-class, the one of the {classes} labels that stood for no class in training"
        )
    labels = torch.tensor([label for label in range(classes) if label != null])
    return Conditioning(Drawn(CLASS, labels), guidance=guidance, null=null, student_guidance=student)


def trained_guidance(checkpoint: Checkpoint | None) -> float | None:
    """The guidance that a fine-tuned model says it was trained for; None for other models."""
    trained = None if checkpoint is None else read_chain(checkpoint.folder)
    return None if trained is None else trained.guidance


def prompts_of(spec: ConditioningSpec, kind: str | None) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and others, of a model that is sampled under `kind`: "prompts", "classes" or None.

    Raises:
        InvalidInputError: prompts for a model without a text encoder, or no prompts for a model with one; a class that
            stands for none, for a model without classes; from `read_prompts`.
    """
    if kind != "prompts" and (spec.prompts or spec.held_out):
        raise InvalidInputError(
            f"{'--prompts' if spec.prompts else '--held-out-prompts'}: {spec.model} has no text encoder, it is "
            + ("conditioned on class labels" if kind else "unconditional")
            + "; leave them out"
        )
    if kind != "classes" and spec.null_class is not None:
        raise InvalidInputError(f"--null-class: {spec.model} is not conditioned on classes; leave it out")
    if kind != "prompts":
        return [], []
    if spec.prompts is None:
        raise InvalidInputError(f"--model {spec.model} is text-conditional: give --prompts FILE, one per line")
    trained = read_prompts(spec.prompts)
    return trained, [] if spec.held_out is None else read_prompts(spec.held_out, "--held-out-prompts")


def of_read_prompts(
    trained: list[Prompt], held_out: list[Prompt], guidance: float, student: tuple[float, Plan] | None = None
) -> Conditioning:
    """The conditions of a pipeline that was read off under these prompts, in their order.

    Args:
        trained: the prompts to train on.
        held_out: others.
        guidance: that it was read under.
        student: another guidance, of the network that is trained, with how it is called then.
    """
    scale, plans = (guidance, {}) if student is None else (student[0], dict([student]))
    read = Conditioning(guidance=guidance, inside=True, student_guidance=scale, plans=plans)
    if not trained:
        return read
    seen, unseen = _numbers(trained, held_out)
    return replace(read, drawn=seen, prompts=(*trained, *held_out), held_out=unseen)


def _of_prompts(
    trained: list[Prompt], held_out: list[Prompt], pretrained: Pretrained, device: torch.device
) -> Conditioning:
    """Prompts by their numbers; behind their embeddings stand those of the negative ones, each once."""
    prompts = (*trained, *held_out)
    negatives = list(dict.fromkeys(prompt.negative for prompt in prompts if prompt.negative))
    assert pretrained.checkpoint is not None
    texts = [*map(str, prompts), *negatives]
    with printing_cuts():
        table = embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, texts, device)
    place = {"": len(texts)} | {text: len(prompts) + i for i, text in enumerate(negatives)}
    null = torch.tensor([place[prompt.negative] for prompt in prompts]) if negatives else len(texts)
    seen, unseen = _numbers(trained, held_out)
    return Conditioning(seen, prompts, table, null=null, held_out=unseen)


@contextmanager
def printing_cuts() -> Iterator[None]:
    """Context in which warnings of prompts that are cut are lines of the command's output."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CutPromptWarning)
        yield
    for each in caught:
        if issubclass(each.category, CutPromptWarning):
            print(f"prompts   {str(each.message).removeprefix('prompts: ')}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _numbers(trained: list[Prompt], held_out: list[Prompt]) -> tuple[Drawn, Drawn | None]:
    """The conditions that draw the numbers of the ones and of the others."""
    first = len(trained)
    seen = Drawn(PROMPT, torch.arange(first), _weights(trained))
    others = torch.arange(first, first + len(held_out))
    return seen, Drawn(PROMPT, others, _weights(held_out)) if held_out else None


def _weights(prompts: list[Prompt]) -> Tensor | None:
    """Their weights; None where all are the same."""
    weights = torch.tensor([prompt.weight for prompt in prompts], dtype=torch.float64)
    return None if (weights == weights[0]).all() else weights
