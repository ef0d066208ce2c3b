"""What a fine-tuning run can be asked for: all of its options, with their defaults, on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.shared.ranges import at_least, not_negative, positive
from implicit_diffusion.errors import InvalidInputError


@dataclass(frozen=True)
class Config:
    """Fine-tune a diffusion model for a reward, with a KL leash to the pretrained model.

    It minimises −E[reward] + β · KL(path). See first what each --kl-weight β can buy, with --plan.
    """

    model: str = "digits"
    """The pretrained model: "digits" (shipped), a diffusers folder, or a hub id owner/name."""
    reward: str = "brightness"
    """The reward: "brightness", "darkness", "redness", "digit-0" … "digit-9", or your own "FILE.py:function".
    A class or factory takes literal arguments, as in "FILE.py:Class(weight=2)".
    It is called with the images (n, C, H, W), decoded where the model's are latents.
    If it takes two arguments, the second is the list of prompts, or the class labels (n,).
    It returns one number per image: (n,), (n, 1), or these in a pair (scores, info) or a dict."""
    prompts: Path | None = None
    """Text file with one prompt per line, for text-conditional models."""
    guidance: float | None = None
    """Scale of classifier-free guidance in the trained chain; by default that of the model's pipeline."""
    null_class: int | None = None
    """The label that stands for no class in the guidance of a class-conditional U-Net."""
    kl_weight: float | None = None
    """Weight β of the KL, in reward per nat.
    By default the plan chooses it, for a gain of one standard deviation of the pretrained reward.
    With --penalty drift, which has no plan, it must be given."""
    target_kl: float | None = None
    """Path KL to aim at, in nats; see --target-kl-mode."""
    target_kl_mode: Literal["adapt", "stop"] | None = None
    """Whether to adapt β until the path KL sits at --target-kl (the default), or to stop there."""
    reference: str | None = None
    """The model that the KL is taken to, by default --model itself.
    Name the original model here when you go on training from RUN/model."""
    plan: bool = False
    """Do not train; only say what each --kl-weight can buy, from pretrained samples, and show some of these."""
    out: Path | None = None
    """Folder for the run: new, empty, or with a plan alone. By default runs/finetune-<time>."""
    loop: Literal["queue", "nested"] = "queue"
    """The algorithm: sample and train in one pipelined loop, or sample every batch first, then differentiate it."""
    scheduler: (
        Literal["ddpm", "ddim", "euler", "euler-ancestral", "dpm-solver", "flow-euler", "flow-memoryless"] | None
    ) = None
    """The sampler that is trained, on the checkpoint's noise schedule.
    By default the one that forgets its start: ddpm for diffusion models, flow-memoryless for flow models.
    euler and flow-euler have no noise and need --penalty drift."""
    eta: float | None = None
    """Amount of noise in --scheduler ddim, by default 1; 0 is deterministic and needs --penalty drift."""
    penalty: Literal["path-kl", "drift"] = "path-kl"
    """What --kl-weight weighs: the path KL, or the squared distance of the drifts.
    With the path KL, steps without noise keep the pretrained network."""
    num_steps: int = 10
    """Number N of steps of the sampler."""
    batch: int = 16
    """Number of trajectories that start in each iteration."""
    stride: int | None = None
    """Number of steps that each trajectory in the queue moves per iteration; more needs less memory and is less stale.
    By default N/10, so that ten batches are in flight in each direction."""
    updates: int = 250
    """Number of optimizer steps."""
    lr: float = 5e-5
    """Learning rate of Adam at the start; it decays to zero along a cosine."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient, in standard deviations of the pretrained reward; larger ones are clipped."""
    accumulate: int = 1
    """Number of gradients that are averaged for one update."""
    ema: float | None = None
    """Decay rate of a moving average of the weights, below 1; the average is then what is judged and exported."""
    lora_rank: int | None = None
    """Rank of low-rank adapters to train in place of all weights; the frozen reference then costs no memory."""
    lora_targets: str | None = None
    """Layers that get adapters, by the ends of their names, such as "to_q,to_v".
    By default these are the projections of attention, or the convolutions of a network without attention."""
    gradient_checkpointing: bool = False
    """Save memory: keep fewer activations of the network, and compute them again for the gradient."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of the network alone, by autocast; states, adjoints, path KL and weights stay in float32.
    fp16 is for devices without bfloat16: its gradients are scaled into float16's range, call by call."""
    compile: bool = False
    """Compile the network with torch.compile; where that fails, it says why and runs uncompiled."""
    no_clip: bool = False
    """Switch off the scheduler's clip_sample, through which no gradient can pass; the report says what that changes."""
    seed: int = 0
    """Seed of all random numbers."""
    starts: int = 256
    """Number of initial noises: 16 trajectories start from each for the plan, 8 for judging before and after."""
    device: str = "auto"
    """Device to compute on: "cpu", "cuda", …; "auto" takes an accelerator where there is one."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, num_steps=1, batch=1, updates=1, accumulate=1, stride=1, lora_rank=1, seed=0)
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
