"""The options of `sweep`: those of `finetune`, except for a few, and the KL weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs.provenance import Change

OF_ONE_RUN = ("kl_weight", "target_kl", "plan")  # options of finetune that a sweep decides
NOT_IN_SWEEP = {
    name: f"--{name.replace('_', '-')} is for one run; in a sweep, use --kl-weights"
    for name in (*OF_ONE_RUN, "target_kl_mode")
} | {"penalty": "a sweep compares path KLs: it has no --penalty"}
TEXTS = {  # of options that mean something else than in `finetune`
    "out": "Folder for the sweep, with one subfolder per run: new, empty, or that of a sweep with the same options, "
    "which is continued. By default runs/sweep-<time>.",
    "scheduler": "The sampler that is trained, on the noise schedule of the model. By default its samples do not "
    "depend on its initial noise: ddpm for diffusion, flow-memoryless for flow models. A sweep needs a sampler that "
    "adds noise, which euler and flow-euler do not.",
    "eta": "Amount of noise in --scheduler ddim, by default 1; a sweep needs some.",
}


@dataclass(frozen=True)
class Config:
    """Fine-tune once for every KL weight, and plot reward against KL divergence beside the best possible curve."""

    kl_weights: tuple[float, ...] = ()
    """KL weights β to train with, in units of reward per nat.
    By default they are chosen for gains of ¼ to 2 standard deviations of the pretrained reward."""
    each: finetune_config.Config = field(
        default_factory=finetune_config.Config, metadata={"without": NOT_IN_SWEEP, "texts": TEXTS}
    )
    """Options of every run; --out is the folder of the sweep."""
    accept_changes: tuple[Change, ...] = ()
    """Changes to accept since the sweep began, as for `resume`; any other change is refused by name."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or an option belongs to a single run."""
        for beta in self.kl_weights:
            if not 0 < beta < float("inf"):
                raise InvalidInputError(f"--kl-weights must be positive and finite, got {beta}")
        if len(set(self.kl_weights)) < len(self.kl_weights):
            raise InvalidInputError(f"--kl-weights must differ, got {' '.join(f'{b:g}' for b in self.kl_weights)}")
        for name in OF_ONE_RUN:
            if getattr(self.each, name) not in (None, False):
                raise InvalidInputError(NOT_IN_SWEEP[name])
        if self.each.penalty != "path-kl":
            raise InvalidInputError(NOT_IN_SWEEP["penalty"])
        self.each.check()
