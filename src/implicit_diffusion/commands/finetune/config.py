"""The options of `finetune`, with their defaults, on one screen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from implicit_diffusion.commands.rewards.elsewhere import check_python
from implicit_diffusion.commands.rewards.weights import check_judges, weighted
from implicit_diffusion.commands.shared.prompt_files import HELD_OUT, TRAINED, copy_of
from implicit_diffusion.commands.shared.ranges import at_least, check_size, not_negative, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName
from implicit_diffusion.scorers import TIMEOUT

STEPS = 10  # N by default


@dataclass(frozen=True)
class Config:
    """Fine-tune a diffusion model for a reward, with a penalty on the KL divergence from the pretrained model.

    It minimises −E[reward] + β · KL(path). Begin with --plan, which shows what each --kl-weight β can buy.
    """

    model: str = "digits"
    """The pretrained model: "digits" (shipped), a diffusers folder, or a hub id owner/name.
    A network of your own is "FILE.py:factory", a function that returns an implicit_diffusion.DiffusionModel."""
    reward: tuple[str, ...] | str = field(default=("brightness",), metadata={"repeatable": True})
    """The reward: a name, or your own "FILE.py:function".
    Names: "brightness", "darkness", "redness", "sharpness", "jpeg-size", "compressibility", "digit-0" … "digit-9".
    "clip:MODEL" says how well images match their prompts.
    MODEL is the folder or hub id of a CLIP-like model of transformers; 'clip:MODEL(text="…")' compares with one text.
    Several rewards are raised together, by their weights, as in --reward brightness --reward "FILE.py:function=2".
    Weights, by default 1, are in units of each reward's standard deviation under the pretrained model.
    A class, or a function that makes the reward, may be given literal arguments, as in "FILE.py:Class(weight=2)".
    The reward is called with images of shape (n, C, H, W), which are decoded first if the model works on latents.
    If its first argument is annotated as list[PIL.Image.Image] or np.ndarray, it gets 8-bit pictures or arrays.
    If it takes two arguments, the second is the list of prompts, or the class labels of shape (n,).
    An argument called metadata, in its place or behind it, is the list of records that --prompts has.
    It returns one number per image: shape (n,) or (n, 1), a list, or a pair (scores, info) or a dict with these."""
    judge: tuple[str, ...] = field(default=(), metadata={"repeatable": True})
    """A function of images that is measured and never raised, in any form of --reward; may be repeated.
    It scores the samples on which the reward is checked during training, and those on which the run is judged.
    A clear fall is reported while the run goes on: the reward may be raised by what the judge does not like."""
    export: Literal["last", "best"] = "last"
    """The model to judge and export: the "last" one, or the "best".
    The best is that of the ten checks during training at which the first --judge was highest."""
    reward_python: Path | None = None
    """The python of another environment, such as ENVIRONMENT/bin/python, to compute your own rewards and judges with.
    It runs in a process of its own, needs NumPy and safetensors, and passes no gradient on."""
    reward_timeout: float = TIMEOUT
    """Seconds that the process of --reward-python may take to load, and to score a batch, before it is restarted."""
    prompts: Path | None = None
    """File with one prompt per line; for models that are conditioned on text.
    If its name ends in .jsonl, each line is a JSON object with the keys prompt, negative_prompt, weight, metadata.
    All but the prompt may be left out. Prompts are drawn in proportion to their weights.
    A reward with an argument called metadata is given the list of these records."""
    held_out_prompts: Path | None = None
    """Another such file, of prompts that are not trained on; the gain under them is reported as well."""
    guidance: float | None = None
    """Scale of classifier-free guidance during training.
    By default that of the model's pipeline, or the one that a fine-tuned model was trained for."""
    student_guidance: float | None = None
    """Scale of guidance of the network that is trained, by default --guidance; with 1 it learns to need none.
    The KL divergence is measured from the model under --guidance, and begins at what that guidance costs."""
    size: tuple[int, int] | None = None
    """Height and width of the samples in pixels; by default those of the model."""
    frames: int | None = None
    """Number of frames of a video; by default that of the model's pipeline."""
    null_class: int | None = None
    """Class label that means "no class"; the guidance of a class-conditional U-Net needs it."""
    kl_weight: float | None = None
    """Weight β of the KL divergence, in units of reward per nat; of several rewards, in deviations per nat.
    By default it is chosen so that the reward can rise by about one standard deviation of the pretrained reward.
    With --penalty drift it must be given."""
    target_kl: float | None = None
    """Path KL to aim at, in nats; --target-kl-mode says how."""
    target_kl_mode: Literal["adapt", "stop"] | None = None
    """Whether to adapt β until the path KL stays at --target-kl (the default), or to stop training there."""
    reference: str | None = None
    """The model that the KL divergence is measured from; by default it is --model itself.
    Name the original model here if --model has been fine-tuned before."""
    plan: bool = False
    """Do not train; sample the pretrained model, and report what reward each --kl-weight can buy."""
    out: Path | None = None
    """Folder for the run: new, empty, or with nothing but a plan in it. By default runs/finetune-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""
    estimator: Literal["auto", "adjoint", "truncated", "adjoint-matching", "score", "surrogate"] = "auto"
    """How the gradient of the reward is estimated.
    By "auto" it is "adjoint" if the reward has a gradient, and "surrogate" if it has none.
    The exact gradient is "adjoint"; "truncated" follows the last sampling steps alone.
    What vanishes at the optimum is left out by "adjoint-matching".
    Values alone are followed by "score"; "surrogate" follows a network that is fitted to them, corrected by "score"."""
    depth: int | None = None
    """Number of last sampling steps that --estimator truncated follows; by default as few as reach a trained one."""
    loop: Literal["queue", "nested"] = "queue"
    """The algorithm: "queue" samples and trains in one pipelined loop; "nested" samples each batch to the end first."""
    scheduler: (
        Literal["ddpm", "ddim", "euler", "euler-ancestral", "dpm-solver", "flow-euler", "flow-memoryless"] | None
    ) = None
    """The sampler that is trained, on the noise schedule of the model.
    By default its samples do not depend on its initial noise: ddpm for diffusion, flow-memoryless for flow models.
    The samplers euler and flow-euler add no noise, and need --penalty drift."""
    eta: float | None = None
    """Amount of noise in --scheduler ddim, by default 1; 0 is deterministic and needs --penalty drift."""
    penalty: Literal["path-kl", "drift"] = "path-kl"
    """What --kl-weight weighs: the path KL, or the squared distance between the drifts of the two models.
    With the path KL, steps that add no noise keep the pretrained network."""
    num_steps: int | None = None
    """Number N of sampling steps, by default 10.
    A network of your own that comes with a table has one step for each of its rows."""
    batch: int = 16
    """Number of samples per gradient: so many trajectories start in each iteration."""
    stride: int | None = None
    """Number of sampling steps that each trajectory in the queue makes per iteration.
    More steps need less memory, and gradients are less out of date. By default N/10."""
    updates: int = 250
    """Number of optimizer steps."""
    lr: float = 5e-5
    """Learning rate of Adam at the start; it decays to zero along a cosine."""
    max_grad_norm: float = 1.0
    """Largest norm of a gradient, in standard deviations of the pretrained reward; a larger gradient is scaled down."""
    accumulate: int = 1
    """Number of gradients that are averaged for each update."""
    ema: float | None = None
    """Decay rate, below 1, of a moving average of the weights; with it, the average is judged and exported."""
    lora_rank: int | None = None
    """Rank of low-rank adapters (LoRA) to train in place of all weights; this saves memory."""
    lora_alpha: float | None = None
    """The α in W + (α/R) B A, by default --lora-rank R, so that the factor is 1; a larger one makes larger steps."""
    lora_targets: str | None = None
    """Layers that get adapters, by the ends of their names, such as "to_q,to_v".
    By default the projections of attention layers, or the convolutions of a network without attention."""
    init_lora: Path | None = None
    """Folder, or .safetensors file, of low-rank adapters to go on from; rank, alpha and layers are theirs.
    The KL divergence is measured from the model without them, or from --reference."""
    gradient_checkpointing: bool = False
    """Save memory: store fewer activations of the network, and compute them again for the gradient."""
    shard: bool = False
    """Share out the weights of the network over all processes (FSDP2), for a model that does not fit one device."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision that the network computes in; samples, adjoints, path KL and weights stay in float32.
    Use fp16 on devices without bfloat16 only; its gradients are scaled so that they do not underflow."""
    compile: bool = False
    """Compile the network with torch.compile, and keep that if it is faster; both times are printed.
    If it fails, the reason is printed, and training runs uncompiled."""
    no_clip: bool = False
    """Switch off clip_sample of the model's scheduler, which blocks gradients; the report says what that changes."""
    seed: int = 0
    """Seed of all random numbers."""
    starts: int = 256
    """Number of initial noises for evaluation: 16 samples of each make the plan, 8 judge the model before and after."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    device: str = "auto"
    """Device to compute on, such as "cpu" or "cuda"; "auto" uses an accelerator if there is one."""

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):  # as a single one may be written in Python
            object.__setattr__(self, "reward", (self.reward,))

    def with_own_prompts(self, folder: Path) -> Config:
        """The same options with a run's own copies of the prompts, which lie in its folder."""
        named = {"prompts": TRAINED, "held_out_prompts": HELD_OUT}
        own: dict[str, Any] = {
            option: folder / copy_of(path, name)
            for option, name in named.items()
            if (path := getattr(self, option)) is not None
        }
        return replace(self, **own)

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        names = [name for name, _ in weighted(self.reward)]
        check_judges(self.reward, self.judge)
        if self.export == "best" and not self.judge:
            raise InvalidInputError("export must be 'last' without a `judge`, which says which model is the best")
        check_python([*names, *self.judge], self.reward_python)
        at_least(
            self,
            num_steps=1,
            batch=1,
            updates=1,
            accumulate=1,
            stride=1,
            lora_rank=1,
            seed=0,
            keep=1,
            depth=1,
            frames=1,
        )
        check_size(self.size)
        positive(self, "lr", "max_grad_norm", "target_kl", "reward_timeout", "lora_alpha")
        not_negative(self, "kl_weight", "guidance", "student_guidance", "eta")
        if self.student_guidance is not None and self.penalty == "drift":
            raise InvalidInputError(
                "--student-guidance needs --penalty path-kl, which measures how far it is from the guided model"
            )
        if self.student_guidance is not None and self.target_kl_mode == "stop":
            raise InvalidInputError(
                "--target-kl-mode stop waits for a path KL that grows, and with --student-guidance it begins at what "
                "guidance costs and falls; use --target-kl-mode adapt"
            )
        if self.held_out_prompts is not None and self.prompts is None:
            raise InvalidInputError("--held-out-prompts needs --prompts, which the model is trained on")
        if self.eta is not None and self.scheduler != "ddim":
            raise InvalidInputError(
                f"--eta is the noise of --scheduler ddim; {self.scheduler or 'the default'} has none"
            )
        if self.depth is not None and self.estimator != "truncated":
            raise InvalidInputError(f"--depth is for --estimator truncated; {self.estimator} has none")
        if self.stride is not None and self.loop != "queue":
            raise InvalidInputError(f"--stride is for --loop queue; a {self.loop} loop has no batches in flight")
        if self.target_kl_mode is not None and self.target_kl is None:
            raise InvalidInputError("--target-kl-mode needs a --target-kl, in nats")
        if self.target_kl is not None and self.kl_weight == 0:
            raise InvalidInputError("--target-kl needs a path KL in the objective, but --kl-weight is 0; leave it out")
        if self.target_kl is not None and self.penalty == "drift":
            raise InvalidInputError("--target-kl needs --penalty path-kl: a drift penalty is not measured in nats")
        truncated = self.estimator == "truncated" and (self.depth or 1) < (self.num_steps or STEPS)
        if self.target_kl is not None and self.target_kl_mode != "stop" and truncated:
            raise InvalidInputError(
                "--target-kl adapts β to the path KL of all steps, and --estimator truncated follows the last ones "
                "alone; use --target-kl-mode stop, or another --estimator"
            )
        if self.penalty == "drift" and (self.kl_weight is None or self.plan):
            raise InvalidInputError("--penalty drift is not a KL and has no plan: name its --kl-weight, without --plan")
        if self.shard and (self.ema is not None or self.compile):
            which = "--compile" if self.compile else "--ema"
            raise InvalidInputError(
                f"--shard shares out the weights, and {which} needs all of them; leave one of them out"
            )
        for option, value in (("--lora-targets", self.lora_targets), ("--lora-alpha", self.lora_alpha)):
            if value is not None and self.lora_rank is None and self.init_lora is None:
                raise InvalidInputError(f"{option} needs --lora-rank, e.g. 8, or --init-lora")
        if self.starts < 4:
            raise InvalidInputError(f"--starts must be ≥ 4 for standard errors, got {self.starts}")
