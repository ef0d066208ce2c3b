"""Fine-tune a diffusion model for a reward: from a diffusers checkpoint to a diffusers checkpoint.

    load → read the chain off the scheduler → plan → one loop of sampling, adjoint and update → judge → export → report

minimising J = −E R + β·KL(path) with the queue. Everything that can be wrong with the input is found before the loop
starts. Before and after are judged on the same held-out noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from implicit_diffusion.commands.finetune import judging, planning, stored
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.evaluation_cache import evaluate_pretrained
from implicit_diffusion.commands.finetune.plan import Plan
from implicit_diffusion.commands.finetune.planning import PROMPTS, planned
from implicit_diffusion.commands.finetune.problem import AFTER, DURING, PLAN, Problem, build, ddim_eta, make_loop, scale
from implicit_diffusion.commands.finetune.result import Outcome, keep_outcome, read_outcome
from implicit_diffusion.commands.sample.command import write_chain
from implicit_diffusion.commands.shared.inputs import absolute, begin, inputs, record_inputs
from implicit_diffusion.denoisers.lora import merged
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.files.atomic import replacing, writing
from implicit_diffusion.global_generators import Draws
from implicit_diffusion.loops.memory import Memory, check_memory, predict_memory
from implicit_diffusion.loops.on_chain import ChainLoop
from implicit_diffusion.models.adapter_files import adapter_usage, save_adapter
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL
from implicit_diffusion.runs import RunDirectory, clock, progress
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.rise import Rise
from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
from implicit_diffusion.runs.callbacks.watch import Runaway
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.runs.provenance import is_recorded
from implicit_diffusion.samplers.chain import Chain


def run(
    config: Config, directory: RunDirectory | None = None, *, pretrained: Evaluation | None = None
) -> dict[str, Any]:
    """The whole command; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted run to go on with; None begins a new one.
        pretrained: what the plan is made of, where it has been drawn and shown before.
    """
    config.check()
    begun = directory is not None
    config = absolute(replace(config, out=directory.path if directory else config.out or dated("finetune")))
    assert config.out is not None
    directory = RunDirectory(config.out)
    with directory.held(), clock.run():
        return _run(config, directory, begun, pretrained)


def _run(config: Config, directory: RunDirectory, begun: bool, pretrained: Evaluation | None) -> dict[str, Any]:
    """The same in a directory that is held."""
    if begun and config.prompts is not None and (directory.path / PROMPTS).is_file():
        config = replace(config, prompts=directory.path / PROMPTS)
    if config.loop == "queue":
        config = replace(config, stride=config.stride or -(-config.num_steps // 10))
    if not begun:
        directory.check_start("finetune", planning.FILES)
    clock.keep(directory.path)
    noise, rests_on = Noise(config.seed), inputs(config)
    problem = build(config)
    config = replace(config, guidance=problem.conditioning.guidance if problem.chain.condition else None)
    config = replace(config, eta=ddim_eta(config) if problem.kind == "ddim" else None)
    with Draws(noise, PLAN, 1, device=problem.chain.device):
        loop = make_loop(config, problem, noise)
        memory = predict_memory(loop)
    check_memory(memory, problem.chain.device)
    if problem.conditioning.prompts and not begun:  # from here on, nothing is refused
        with replacing(directory.path / PROMPTS) as file:
            file.write_text("\n".join(problem.conditioning.prompts) + "\n", encoding="utf-8")
    if problem.conditioning.prompts:
        rests_on |= {"prompts": directory.path / PROMPTS}
    trained = directory.has_state
    if not trained:
        begin(directory, "finetune", config, rests_on, problem.chain.device)
    elif not is_recorded(directory):
        record_inputs(directory, config, rests_on, device=problem.chain.device)
    with directory.resumable():
        plan, samples = planned(config, problem, directory, rests_on, pretrained)
    if config.plan:
        return plan.summary()
    started = plan_beta(plan) if config.kl_weight is None else config.kl_weight
    scale(loop, started, config.max_grad_norm * plan.reward_std)
    resolved_kind: Any = problem.kind
    config = replace(config, scheduler=resolved_kind, kl_weight=started, device=str(problem.chain.device))
    if not trained:
        begin(directory, "finetune", config, rests_on, problem.chain.device)
    print(f"memory predicted: {memory}")
    with directory.resumable():
        state = train(config, problem, loop, plan, samples, noise, directory)
        finish(config, problem, state, plan, noise, directory, memory)
        return report(directory)


def train(
    config: Config,
    problem: Problem,
    loop: ChainLoop,
    plan: Plan,
    samples: Evaluation,
    noise: Noise,
    directory: RunDirectory,
) -> Fit:
    """Train, until all updates are made or the run stops by itself.

    Raises:
        KeyboardInterrupt: interrupted; the checkpoint is there.
    """
    callbacks: list[Callable[[Fit], str | None]] = [
        *_callbacks(config, problem, noise, samples),
        Runaway(plan.reward_std),
    ]
    state = fit(loop, config.updates, callbacks=callbacks, directory=directory)
    if state.stopped == "interrupted":
        raise KeyboardInterrupt
    return state


@part("judging")
def finish(
    config: Config, problem: Problem, state: Fit, plan: Plan, noise: Noise, directory: RunDirectory, memory: Memory
) -> None:
    """Judge, export, and write the summary, after which only the report is left to be made."""
    loop, evaluations = state.loop, problem.chain.evaluations  # of the training: the judges sample from the same chain
    drift = config.penalty == "drift"
    beta = loop.objective.weight(DriftPenalty if drift else PathKL)
    before, after, exported = _judge(config, problem, state, noise, directory)
    advise = "Try " not in (state.stopped or "")
    found = judging.judge(before, after, exported, None if drift else beta, lr=config.lr, advise=advise)
    with Draws(noise, DURING, 0, device=problem.chain.device):
        held_out = evaluate_pretrained(
            problem.chain, problem.reward, noise.stream(DURING), name=config.reward, starts=_held_out(config), repeats=1
        )
    summary = found.summary | {
        "held_out_reward_before": held_out.reward.mean().item(),
        "kl_weight": beta,
        "kl_weight_at_start": config.kl_weight,
        "seconds": state.seconds,
        "network_evaluations": evaluations,
        "updates": state.updates,
        "stopped": state.stopped,
        "kept": state.kept,
        "staleness_max": state.metrics.get("staleness_max"),
        "predicted_memory_bytes": memory.total,
        "condition": problem.pretrained.condition,
        "pipeline_class": (problem.pretrained.family.pipelines or (None,))[0],
        "event_shape": problem.chain.event_shape,
        "num_classes": problem.pretrained.num_classes,
        "compiled": problem.compiled,
        "adapter": None if config.lora_rank is None else adapter_usage(problem.pretrained.family),
        **({"reward_std_before": plan.reward_std} if plan.conditional else {}),
        "clipping": problem.clipping,
        "pipeline": problem.exported[1].name,
        "pipeline_is_the_chain": problem.chain.table.agrees_with(problem.exported[1]),
        "memory": {"share": plan.memory, "se": plan.memory_se},
        "plan": plan.summary()["rows"],
        **judging.digits_quality(before, after, exported),
    }
    resolved = directory.read_config() or {}
    card = judging.model_card(resolved, summary, problem.chain)
    with writing(directory.model):
        _export(config, problem, state, directory, card)
    decoded: Any = problem.decoded(before, after)
    keep_outcome(Outcome(resolved, summary, plan, before, after, found.bound, [], decoded), directory)
    stored.forget(directory)
    directory.write_summary(summary)


@part("drawing")
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures and write report.html, from what is on disk; prints the headline and returns the summary.

    Raises:
        InvalidInputError: a run that is not finished, or of another release.
    """
    from implicit_diffusion.commands.finetune.report.figures import draw
    from implicit_diffusion.commands.finetune.report.report import write_report

    outcome = read_outcome(directory)
    page = write_report(outcome, draw(outcome, directory), directory)
    judging.print_headline(outcome.summary, directory, page)
    return outcome.summary


def plan_beta(plan: Plan) -> float:
    """The β whose bound promises about one standard deviation of reward."""
    return min(plan.rows(), key=lambda row: abs(row["reward_gain_in_std"] - 1))["kl_weight"]


@part("saving")
def _export(config: Config, problem: Problem, state: Fit, directory: RunDirectory, card: str) -> None:
    """The pipeline with the trained network, adapters merged; and the adapters by themselves."""
    save_pipeline(directory.model, merged(state.model), problem.exported[0], card, original=problem.pretrained)
    if config.lora_rank is not None:
        save_adapter(directory.model / "lora", state.model, problem.pretrained)
    options = {"eta": config.eta if problem.kind == "ddim" else None}
    options |= {"guidance": config.guidance, "null_class": config.null_class}
    given = {name: value for name, value in options.items() if value is not None}
    write_chain(directory.model, problem.chain.table, **given)


def _held_out(config: Config) -> int:
    """Trajectories that are judged during training."""
    return min(64, 8 * config.starts)


def _callbacks(
    config: Config, problem: Problem, noise: Noise, samples: Evaluation
) -> list[Callable[[Fit], str | None]]:
    every = max(1, config.updates // 10)
    held_out = HeldOut(problem.reward, noise.stream(DURING), every=every, starts=_held_out(config))
    if config.penalty == "drift":
        return [held_out]

    def rate(factor: int) -> str:
        return f"--lr {config.lr / factor:.1g}, {factor} times smaller"

    rise = Rise(held_out, pretrained=samples, rate=rate)
    if config.target_kl is None:
        return [held_out, rise]
    if config.target_kl_mode == "stop":
        return [held_out, StopAtKL(config.target_kl, held_out=held_out), rise]
    return [AdaptKL(config.target_kl), held_out, rise]


def _judge(
    config: Config, problem: Problem, state: Fit, noise: Noise, directory: RunDirectory
) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Before, after, and the exported pipeline with the trained network on all rows, on the same noise."""
    chain, reward, noise = state.chain, problem.reward, noise.stream(AFTER)
    network: Any = chain.denoiser
    condition = chain.condition
    everywhere = Chain(network, problem.exported[1], chain.event_shape, reference=network, condition=condition)
    draws = Draws(noise, 0, device=chain.device)
    parts = stored.judgements(directory, network.state_dict().values(), config.starts, draws)
    with progress(3 * 8 * config.starts, "judging") as bar:
        sizes: dict[str, Any] = {"starts": config.starts, "repeats": 8, "skip": bar.skip, "progress": bar.advance}
        before = evaluate_pretrained(chain, reward, noise, name=config.reward, stored=parts[0], **sizes)
        after, exported = (
            part.evaluate(judged, reward, noise, **sizes) for part, judged in zip(parts[1:], (chain, everywhere))
        )
    return before, after, exported
