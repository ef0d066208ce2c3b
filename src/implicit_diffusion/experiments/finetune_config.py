"""What a fine-tuning run can be asked for: all of its options, with their defaults, on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments.ranges import at_least, not_negative, positive


@dataclass(frozen=True)
class Config:
    """Fine-tune a diffusion model for a reward, with a KL leash to the pretrained model.

    Minimises −E[reward] + β · KL(path). See what each --kl-weight β can buy first, with --plan.
    """

    model: str = "digits"
    """"digits" (shipped), a diffusers folder, or a hub id owner/name."""
    reward: str = "brightness"
    """"brightness", "darkness", "redness", "digit-0" … "digit-9", or your own "FILE.py:function".
    A class or factory takes literal arguments, "FILE.py:Class(weight=2)".
    It is called with one argument, images (n, C, H, W), decoded where the model's are latents, or with two:
    images and their prompts, a list of strings, or images and their class labels (n,).
    It returns one number per image: (n,), (n, 1), or these in a pair (scores, info) or a dict."""
    prompts: Path | None = None
    """Text file with a prompt per line, for text-conditional models."""
    guidance: float | None = None
    """Scale of classifier-free guidance, part of the trained chain; by default that of the model's pipeline."""
    null_class: int | None = None
    """The label that stands for no class in the guidance of a class-conditional U-Net."""
    kl_weight: float | None = None
    """β, in reward per nat. By default the plan's, for a gain of one standard deviation of the pretrained reward.
    The weight of --penalty drift, which has no plan, must be named."""
    target_kl: float | None = None
    """Path KL in nats to aim at; see --target-kl-mode."""
    target_kl_mode: Literal["adapt", "stop"] | None = None
    """Adapt β until the path KL sits at the target (the default), or stop there."""
    reference: str | None = None
    """The model that the KL is taken to, by default --model itself. Name the original when going on from RUN/model."""
    plan: bool = False
    """Only say what each --kl-weight can buy, from pretrained samples, and show some of these."""
    out: Path | None = None
    """Run directory: new, empty, or with a plan alone. By default runs/finetune-<time>."""
    loop: Literal["queue", "nested"] = "queue"
    """One pipelined loop, or sample-then-differentiate."""
    scheduler: (
        Literal["ddpm", "ddim", "euler", "euler-ancestral", "dpm-solver", "flow-euler", "flow-memoryless"] | None
    ) = None
    """The chain's sampler, on the checkpoint's noise schedule.
    By default the one that forgets its start: ddpm for diffusion models, flow-memoryless for flow models.
    euler and flow-euler have no noise and need --penalty drift."""
    eta: float | None = None
    """Noise of --scheduler ddim, by default 1; 0 is deterministic and needs --penalty drift."""
    penalty: Literal["path-kl", "drift"] = "path-kl"
    """What --kl-weight weighs: the path KL, or the distance of the drifts.
    Under a path KL, rows without noise keep the pretrained network."""
    num_steps: int = 10
    """Steps of the chain, N."""
    batch: int = 16
    """Trajectories injected per iteration."""
    stride: int | None = None
    """Rows that each trajectory in the queue moves per iteration; more needs less memory and is less stale.
    By default N/10, so that ten batches are in flight each way."""
    updates: int = 250
    """Optimizer steps."""
    lr: float = 5e-5
    """Adam's learning rate at the start; cosine decay to zero."""
    max_grad_norm: float = 1.0
    """Γ is clipped to this norm, in deviations of the pretrained reward."""
    accumulate: int = 1
    """Gradients averaged per update."""
    ema: float | None = None
    """Decay of an average of the weights, which is then what is judged and exported."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank in place of all weights; the frozen reference then costs no memory."""
    lora_targets: str | None = None
    """Layers that get adapters, by the ends of their names, "to_q,to_v".
    By default the projections of attention, or the convolutions of a network without attention."""
    gradient_checkpointing: bool = False
    """Keep less of the network's activations, and compute it once more on the way back."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the network alone, by autocast; states, adjoints, path KL and weights stay in float32.
    fp16 is for devices without bfloat16: its gradients are scaled into float16's range, call by call."""
    compile: bool = False
    """torch.compile the network; what stands in the way is said, and it runs as it is."""
    no_clip: bool = False
    """Switch off the scheduler's clip_sample, which no adjoint passes; what that changes is reported."""
    seed: int = 0
    """Of all noise."""
    starts: int = 256
    """Initial noises for the plan, 16 trajectories from each, and for judging before and after, 8 from each."""
    device: str = "auto"
    """"cpu", "cuda", …; auto takes an accelerator where there is one."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, num_steps=1, batch=1, updates=1, accumulate=1, stride=1, lora_rank=1)
        positive(self, "lr", "max_grad_norm", "target_kl")
        not_negative(self, "kl_weight", "guidance", "eta")
        if self.eta is not None and self.scheduler != "ddim":
            raise InvalidInputError(
                f"--eta is the noise of --scheduler ddim; {self.scheduler or 'the default'} has none"
            )
        if self.stride is not None and self.loop != "queue":
            raise InvalidInputError(f"--stride is for --loop queue; a {self.loop} loop has no batches in flight")
        if self.target_kl_mode is not None and self.target_kl is None:
            raise InvalidInputError("--target-kl-mode needs a --target-kl, in nats")
        if self.target_kl is not None and self.kl_weight == 0:
            raise InvalidInputError("--target-kl needs a path KL in the objective, but --kl-weight is 0; leave it out")
        if self.target_kl is not None and self.penalty == "drift":
            raise InvalidInputError("--target-kl needs --penalty path-kl: a drift penalty is not measured in nats")
        if self.penalty == "drift" and (self.kl_weight is None or self.plan):
            raise InvalidInputError("--penalty drift is no KL, and has no plan: name its --kl-weight, without --plan")
        if self.lora_rank is None and self.lora_targets is not None:
            raise InvalidInputError("--lora-targets needs --lora-rank, e.g. 8")
        if self.starts < 4:
            raise InvalidInputError(f"--starts must be ≥ 4 for standard errors, got {self.starts}")
