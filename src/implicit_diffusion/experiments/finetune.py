"""Fine-tune a diffusion model for a reward: from a diffusers checkpoint to a diffusers checkpoint.

    load → read the chain off the scheduler → plan → one loop of sampling, adjoint and update → judge → export → report

minimising J = −E R + β·KL(path) with the queue. Everything that can be wrong with the input is found before the loop
starts. Before and after are judged on the same held-out noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_diffusion.denoisers.kinds import clipped_for, default_kind, pipeline_for, scheduler_for, table_for
from implicit_diffusion.denoisers.pretrained import Pretrained, as_pipeline, load_pretrained, save_pipeline
from implicit_diffusion.denoisers.table import ChainTable
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import judging
from implicit_diffusion.experiments.plan import Plan, make_plan, plot, show
from implicit_diffusion.experiments.remembered import evaluate_pretrained
from implicit_diffusion.experiments.reward_names import load_reward
from implicit_diffusion.experiments.sample import write_chain
from implicit_diffusion.loops import Evaluation, Nested, Queue, Update, evaluate
from implicit_diffusion.loops.memory import check_memory, predict_memory
from implicit_diffusion.loops.on_chain import ChainLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, Objective, PathKL, Reward
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.fit import AdaptKL, Fit, HeldOut, StopAtKL, fit
from implicit_diffusion.samplers.chain import Chain

PLAN, DURING, AFTER = 1, 2, 3  # streams of noise apart from training's


@dataclass(frozen=True)
class Config:
    """Fine-tune a diffusion model for a reward, with a KL leash to the pretrained model.

    Minimises −E[reward] + kl_weight · KL(path). See what each kl_weight can buy first, with --plan.
    """

    model: str = "digits"
    """"digits" (shipped), a diffusers folder, or a hub id owner/name."""
    reward: str = "brightness"
    """"brightness", "darkness", "redness", "digit-0" … "digit-9", or your own FILE.py:function from (n, C, H, W) to
    (n,)."""
    kl_weight: float | None = None
    """β, in reward per nat. By default the plan's, for a gain of one standard deviation of the pretrained reward."""
    target_kl: float | None = None
    """Path KL in nats to aim at; see target_kl_mode."""
    target_kl_mode: Literal["adapt", "stop"] = "adapt"
    """Adapt β until the path KL sits at the target, or stop there."""
    plan: bool = False
    """Only print what each kl_weight can buy, from pretrained samples."""
    out: Path | None = None
    """Run directory, new or empty. By default runs/finetune-<time>."""
    loop: Literal["queue", "nested"] = "queue"
    """One pipelined loop, or sample-then-differentiate."""
    scheduler: (
        Literal["ddpm", "ddim", "euler", "euler-ancestral", "dpm-solver", "flow-euler", "flow-memoryless"] | None
    ) = None
    """The chain's sampler, on the checkpoint's noise schedule. By default the one that forgets its start: ddpm for
    diffusion models, flow-memoryless for flow models. euler and flow-euler have no noise and need --penalty drift."""
    eta: float = 1.0
    """Noise of DDIM; 0 is deterministic and needs --penalty drift."""
    penalty: Literal["path-kl", "drift"] = "path-kl"
    """What kl_weight weighs: the path KL (rows without noise keep the pretrained network), or the drifts' distance."""
    num_steps: int = 10
    """Steps of the chain, N."""
    batch: int = 16
    """Trajectories injected per iteration."""
    stride: int | None = None
    """Rows that each trajectory in the queue moves per iteration; by default N/10, so that ten batches are in flight
    each way. More needs less memory and is less stale."""
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
        for name in ("num_steps", "batch", "updates", "accumulate", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"--{name.replace('_', '-')} must be an integer ≥ 1, got {value}")
        for name in ("lr", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InvalidInputError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
        if self.kl_weight is not None and not 0 <= self.kl_weight < float("inf"):
            raise InvalidInputError(f"--kl-weight must be finite and ≥ 0, got {self.kl_weight}")
        if self.target_kl is not None and self.kl_weight == 0:
            raise InvalidInputError("--target-kl needs a path KL in the objective, but --kl-weight is 0; leave it out")
        if self.target_kl is not None and self.penalty == "drift":
            raise InvalidInputError("--target-kl needs --penalty path-kl: a drift penalty is not measured in nats")
        if self.starts < 4:
            raise InvalidInputError(f"--starts must be ≥ 4 for standard errors, got {self.starts}")


@dataclass(frozen=True)
class Problem:
    """A checkpoint, its chain and the reward: all that does not depend on β."""

    pretrained: Pretrained
    kind: str
    chain: Chain
    reward: Callable[[Tensor], Tensor]
    clipping: dict[str, float] | None
    exported: tuple[Any, ChainTable]  # the scheduler of the exported pipeline, and the chain that it runs


def build(config: Config) -> Problem:
    """Load everything, try the reward on two pretrained samples.

    Raises:
        InvalidInputError: from any of the parts; see `load_pretrained`, `read_table`, `load_reward`, `Reward.check`.
    """
    reward = load_reward(config.reward)
    pretrained = load_pretrained(config.model)
    pretrained.denoiser.to(_device(config.device))
    torch.nn.utils.convert_conv2d_weight_memory_format(pretrained.denoiser, torch.channels_last)  # a third faster
    clip = False if config.no_clip else None
    kind = config.scheduler or default_kind(pretrained.scheduler)
    scheduler = scheduler_for(pretrained.scheduler, kind, clip=clip)
    table = table_for(scheduler, kind, config.num_steps, eta=config.eta)
    saved, its_kind = pipeline_for(scheduler, kind)
    as_pipeline(pretrained.denoiser, saved)
    exported = saved, table_for(saved, its_kind, config.num_steps, eta=config.eta if kind == "ddim" else 0.0)
    rows: Literal["noiseless"] | tuple[()] = "noiseless" if config.penalty == "path-kl" else ()
    chain = Chain(pretrained.denoiser, table, pretrained.event_shape, pretrained_rows=rows)
    if not chain.trained_rows:
        raise InvalidInputError(
            f"no row of {table.name} has noise, so a path KL leaves nothing to train; take a --scheduler with noise "
            "(ddpm, ddim with --eta 1, euler-ancestral, flow-memoryless), or --penalty drift"
        )
    Reward(reward).check(judging.particles(chain))
    clipping = None
    if config.no_clip and pretrained.scheduler.config.get("clip_sample", False):
        clipped, options = clipped_for(pretrained.scheduler, kind, noisy=bool(table.s.any()), eta=config.eta)
        clipping = judging.effect_of_clipping(chain, clipped, reward, Noise(config.seed).stream(PLAN), options)
    return Problem(pretrained, kind, chain, reward, clipping, exported)


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """The whole experiment; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted run to go on with; None begins a new one.
    """
    config.check()
    config = replace(config, stride=config.stride or -(-config.num_steps // 10))
    out = config.out or Path(f"runs/finetune-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    if directory is None:
        RunDirectory.check(out)
    problem, noise = build(config), Noise(config.seed)
    loop = make_loop(config, problem, noise)
    memory = predict_memory(loop)
    check_memory(memory, problem.chain.device)
    samples = _pretrained_samples(config, problem, noise)
    plan = make_plan(samples)
    directory = directory or RunDirectory.create(out)  # from here on, nothing is refused
    show(plan)
    plot(plan, samples, directory.figure("plan"))
    if config.plan:
        return plan.summary()
    started = plan_beta(plan) if config.kl_weight is None else config.kl_weight
    scale(loop, started, config.max_grad_norm * plan.reward_std)
    resolved_kind: Any = problem.kind
    config = replace(config, scheduler=resolved_kind)
    directory.write_config(replace(config, kl_weight=started, out=out, device=str(problem.chain.device)))
    print(f"memory predicted: {memory}")
    state = fit(loop, config.updates, callbacks=_callbacks(config, problem, noise), directory=directory)
    if state.stopped == "interrupted":
        raise KeyboardInterrupt(f"interrupted; go on with `implicit-diffusion resume {directory.path}`")

    from implicit_diffusion.experiments.figures import Outcome, draw
    from implicit_diffusion.experiments.report import write_report

    beta = loop.objective.weight(PathKL) or loop.objective.weight(DriftPenalty)
    before, after, exported = _judge(config, problem, state, noise)
    found = judging.judge(before, after, exported, beta)
    summary = found.summary | {
        "kl_weight": beta,
        "kl_weight_at_start": started,
        "seconds": state.seconds,
        "network_evaluations": loop.chain.evaluations,
        "updates": state.updates,
        "stopped": state.stopped,
        "staleness_max": state.metrics.get("staleness_max"),
        "predicted_memory_bytes": memory.total,
        "clipping": problem.clipping,
        "pipeline": problem.exported[1].name,
        "pipeline_is_the_chain": loop.chain.table.agrees_with(problem.exported[1]),
        "memory": {"share": plan.memory, "se": plan.memory_se},
        "plan": plan.summary()["rows"],
        **judging.digits_quality(before, after, exported),
    }
    resolved = json.loads((directory.path / "config.json").read_text())
    card = judging.model_card(resolved, summary, loop.chain)
    save_pipeline(directory.model, state.model, problem.exported[0], card)
    write_chain(directory.model, loop.chain.table, **({"eta": config.eta} if problem.kind == "ddim" else {}))
    directory.write_summary(summary)
    outcome = Outcome(resolved, summary, plan, before, after, found.bound, directory.read_metrics())
    report = write_report(outcome, draw(outcome, directory), directory)
    judging.print_headline(summary, directory, report)
    return summary


def plan_beta(plan: Plan) -> float:
    """The β whose bound promises about one standard deviation of reward."""
    return min(plan.rows(), key=lambda row: abs(row["reward_gain_in_std"] - 1))["kl_weight"]


def make_loop(config: Config, problem: Problem, noise: Noise) -> ChainLoop:
    """The loop that `config` asks for, before β and the clip are known; `scale` sets them."""
    penalty: Objective = PathKL() if config.penalty == "path-kl" else DriftPenalty()
    objective = Reward(problem.reward) + (1.0 if config.kl_weight is None else config.kl_weight) * penalty
    optimizer = torch.optim.Adam(problem.pretrained.denoiser.parameters(), lr=config.lr)
    update = Update(
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates),
        ema_decay=config.ema,
        accumulate=config.accumulate,
    )
    if config.loop == "nested":
        return Nested(problem.chain, objective, update, batch=config.batch, noise=noise)
    return Queue(problem.chain, objective, update, batch=config.batch, noise=noise, stride=config.stride or 1)


def scale(loop: ChainLoop, beta: float, max_grad_norm: float) -> None:
    """Set what the plan decides: β, and the clip, since the norm of Γ is in units of the reward."""
    loop.objective = loop.objective.with_weight(PathKL, beta).with_weight(DriftPenalty, beta)
    loop.update.max_grad_norm = max_grad_norm


def _callbacks(config: Config, problem: Problem, noise: Noise) -> list[Callable[[Fit], str | None]]:
    held_out = HeldOut(problem.reward, noise.stream(DURING), every=max(1, config.updates // 10))
    if config.target_kl is None:
        return [held_out]
    reached = StopAtKL(config.target_kl) if config.target_kl_mode == "stop" else AdaptKL(config.target_kl)
    return [reached, held_out]


def _pretrained_samples(config: Config, problem: Problem, noise: Noise) -> Evaluation:
    with progress(16 * config.starts, "planning") as bar:
        return evaluate_pretrained(
            problem.chain,
            problem.reward,
            noise.stream(PLAN),
            name=config.reward,
            starts=config.starts,
            repeats=16,
            progress=lambda done: bar.update(advance=done),
        )


def _judge(config: Config, problem: Problem, state: Fit, noise: Noise) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Before, after, and the exported pipeline with the trained network on all rows, on the same noise."""
    chain, reward, noise = state.chain, problem.reward, noise.stream(AFTER)
    everywhere = Chain(chain.denoiser, problem.exported[1], chain.event_shape, reference=chain.denoiser)
    with progress(3 * 8 * config.starts, "judging") as bar:
        sizes: dict[str, Any] = {"starts": config.starts, "repeats": 8}
        sizes["progress"] = lambda done: bar.update(advance=done)
        before = evaluate_pretrained(chain, reward, noise, name=config.reward, **sizes)
        after, exported = (evaluate(judged, reward, noise, **sizes) for judged in (chain, everywhere))
    return before, after, exported


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
