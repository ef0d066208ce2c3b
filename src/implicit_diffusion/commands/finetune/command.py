"""Fine-tune a diffusion model for a reward: from a diffusers checkpoint to a diffusers checkpoint.

    setup → plan → one loop of sampling, adjoint and update → judge → export → report

minimising J = −E R + β·KL(path) with the queue. Everything that can be wrong with the input is reported before the loop
starts. Before and after are judged on the same held-out noise.

This file alone sees all options: it tells each stage what that stage needs (`specs`), and records the options as the
stages resolve them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from implicit_diffusion.commands.finetune import guidance, judging, planning
from implicit_diffusion.commands.finetune.by_weights import by_weights
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.export import export, model_summary
from implicit_diffusion.commands.finetune.held_out_prompts import HeldOutPrompts, evaluate_held_out
from implicit_diffusion.commands.finetune.model_card import model_card
from implicit_diffusion.commands.finetune.problem import estimators
from implicit_diffusion.commands.finetune.problem.adapters import for_comfyui
from implicit_diffusion.commands.finetune.problem.compiling import compile_networks
from implicit_diffusion.commands.finetune.problem.setup import PLAN, Setup, build
from implicit_diffusion.commands.finetune.problem.weighing import in_units, weighed
from implicit_diffusion.commands.finetune.report.headline import headline_of, print_headline
from implicit_diffusion.commands.finetune.result import Result, keep_result, read_result
from implicit_diffusion.commands.finetune.specs import plan_spec, setup_spec, training_spec
from implicit_diffusion.commands.finetune.summary import MemoryOfStart, Summary, TrainingSummary
from implicit_diffusion.commands.finetune.training import (
    held_out_checks,
    judges_of,
    make_loop,
    pictures,
    scale,
    train,
    weight_of_penalty,
)
from implicit_diffusion.commands.rewards.weights import judge_labels
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.commands.shared.inputs import absolute, begin, inputs, record_inputs
from implicit_diffusion.commands.shared.models.by_name import check_weights
from implicit_diffusion.commands.shared.opening import continuing, dated
from implicit_diffusion.commands.shared.prompt_files import write_prompts
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.denoisers.low_rank import rank_and_alpha
from implicit_diffusion.denoisers.sharded import whole_copy
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.each_reward import judge_rewards
from implicit_diffusion.evaluation.judging import judge
from implicit_diffusion.evaluation.plans import Plan
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.loops import memory
from implicit_diffusion.processes import everywhere, from_main, main_only
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.judges import Judges
from implicit_diffusion.runs.callbacks.targets import StopAtKL
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.runs.provenance import is_recorded
from implicit_diffusion.runs.trackers.opening import tracked
from implicit_diffusion.scorers import closing


def run(
    config: Config, directory: RunDirectory | None = None, *, pretrained: Evaluation | None = None
) -> dict[str, Any]:
    """The whole command; returns the summary, as summary.json holds it, or that of the plan with --plan.

    Args:
        config: the options.
        directory: of an interrupted run to continue; None begins a new one.
        pretrained: the trajectories of the plan, where they have been drawn and shown before.
    """
    config.check()
    resumed = directory is not None
    config = absolute(replace(config, out=directory.path if directory else config.out or dated("finetune")))
    assert config.out is not None
    directory = RunDirectory(config.out)
    with directory.held(), clock.run(), closing(), tracked(directory, config.track) as directory:
        return _run(config, directory, resumed, pretrained)


def _run(config: Config, directory: RunDirectory, resumed: bool, pretrained: Evaluation | None) -> dict[str, Any]:
    """The same in a directory that is held."""
    if resumed:
        config = config.with_own_prompts(directory.path)
    if not resumed:
        directory.check_start("finetune", planning.FILES)
    clock.keep(directory.path)
    fingerprints = inputs(config)
    setup = build(setup_spec(config))
    if resumed:
        check_weights(directory, setup.weights)
    fingerprints |= setup.weights
    num_steps = setup.chain.num_steps
    stride = config.stride or -(-num_steps // 10) if config.loop == "queue" else None
    config = replace(config, num_steps=num_steps, stride=stride)
    config = replace(config, guidance=setup.guidance, eta=setup.eta, estimator=setup.estimator.name)
    if (known := rank_and_alpha(setup.pretrained.denoiser)) is not None:
        config = replace(config, lora_rank=known[0], lora_alpha=known[1])
    if setup.estimator.why is not None:
        print(f"estimator {setup.estimator.name}: {setup.estimator.why}")
    spec, device = training_spec(config), setup.chain.device
    with GlobalGenerators(setup.spec.noise, PLAN, 1, device=device):
        loop = make_loop(spec, setup, config.kl_weight)
        predicted = memory.predict_memory(loop)
    everywhere(lambda: memory.check_memory(predicted, device))
    if setup.conditioning.prompts:  # from here on, nothing is refused
        fingerprints |= {"prompts": _keep_prompts(config, setup.conditioning, directory, resumed)}
    trained = directory.has_state
    with continuing(directory):
        if not trained:
            begin(directory, "finetune", config, fingerprints, device)
        elif not is_recorded(directory):
            record_inputs(directory, config, fingerprints, device=device)
        plan, samples = planning.planned(plan_spec(config), setup, directory, fingerprints, pretrained)
        beta = plan.beta_for_gain(1.0) if config.kl_weight is None else config.kl_weight
        clip = config.max_grad_norm * plan.reward_std
        if not trained:
            guidance.shown(spec, in_units(setup, plan), beta, clip, directory)
    if config.plan:
        return planning.plan_as_json(plan, config.reward)
    setup = weighed(setup, plan)
    scale(loop, setup.reward, beta, clip)
    if not trained:
        estimators.begin(loop.estimator, setup.chain, samples, setup.spec.noise.stream(PLAN))
    config = replace(config, scheduler=setup.sampler, kl_weight=beta, device=str(device))  # type: ignore[arg-type]
    print(f"memory predicted: {predicted}")
    with continuing(directory):
        if not trained:
            begin(directory, "finetune", config, fingerprints, device)
        if config.compile:
            setup = replace(setup, compiled=compile_networks(loop, directory, resumed=trained))
        held_out = held_out_checks(spec, setup)
        judges = judges_of(spec, setup, held_out)
        state = train(spec, loop, held_out, samples, plan.reward_std, directory, pictures(setup), judges)
        facts = _training_summary(config, state, held_out, weight_of_penalty(loop, spec.penalty), predicted.total)
        finish(setup, state, plan, facts, judges, directory)
        return report(directory)


@main_only
def _keep_prompts(config: Config, conditions: Conditioning, directory: RunDirectory, resumed: bool) -> list[Path]:
    """The run's own copies of its prompts, which a resumed run reads."""
    trained = conditions.trained_prompts
    own, kept = config.with_own_prompts(directory.path), []
    for path, prompts in ((own.prompts, trained), (own.held_out_prompts, conditions.prompts[len(trained) :])):
        if path is not None:
            kept.append(path)
            if not resumed:
                write_prompts(prompts, path)
    return kept


def _training_summary(config: Config, state: Fit, held_out: HeldOut, beta: float, predicted: int) -> TrainingSummary:
    """What the training did, with resolved options."""
    assert config.kl_weight is not None
    with part("judging"):
        before = held_out.pretrained(state)
    return TrainingSummary(
        kl_weight=beta,
        kl_weight_at_start=config.kl_weight,
        held_out_reward_before=before.reward.mean().item(),
        seconds=state.seconds,
        network_evaluations=state.loop.cost()["network_evaluations"],
        updates=state.updates,
        stopped=state.stopped,
        reached_target=state.verdict is not None and state.verdict[0] == StopAtKL.__name__,
        kept=state.kept,
        staleness_max=state.metrics.get("staleness_max"),
        predicted_memory_bytes=predicted,
        estimator=config.estimator,
        held_out_rewards_before=[values.mean().item() for values in before.each_reward[: len(config.reward)]],
    )


@part("judging")
def finish(
    setup: Setup,
    state: Fit,
    plan: Plan,
    training: TrainingSummary,
    judges: Sequence[Judges],
    directory: RunDirectory,
) -> None:
    """Judge, export, and write the summary, after which only the report is left to be made.

    Args:
        setup: of the run.
        state: at the end of the training.
        plan: of the run.
        training: what the training did.
        judges: that watched it, if any.
        directory: of the run, with its resolved options.
    """
    config = read_options(Config, directory)
    stored = judging.storage(directory, state.chain, config.starts)
    judged = judging.evaluate_all(setup, state.chain, config.starts, stored)
    untrained = judging.evaluate_untrained(setup, config.starts, stored)
    unseen = evaluate_held_out(setup, state.chain, judged[:2], stored, judging.REPEATS)
    model = whole_copy(state.model)
    of = judged, untrained, judges, unseen, directory
    from_main(lambda: _conclude(config, setup, state, model, plan, training, *of))


def _conclude(
    config: Config,
    setup: Setup,
    state: Fit,
    model: nn.Module,
    plan: Plan,
    training: TrainingSummary,
    judged: judging.Judged,
    untrained: Evaluation | None,
    judges: Sequence[Judges],
    unseen: HeldOutPrompts | None,
    directory: RunDirectory,
) -> None:
    """What follows from the evaluations; arguments as in `finish`, and the trained model in one place."""
    beta = None if config.penalty == "drift" else training.kl_weight
    judgement = judge(*judged, beta, untrained)
    headline = headline_of(
        judgement,
        lr=config.lr,
        advise=state.advice is None,
        reward_std=plan.reward_std if plan.conditional else None,
    )
    each = judge_rewards(*judged, beta)
    rewards = judging.each_reward(config.reward, plan, each)
    by = judge_labels(config.reward, config.judge)
    judged_by = [row for watched in judges for row in judging.each_judge(by, judged.before, each, watched)]
    weighted = by_weights(judged.before, judged.after, judgement, untrained)
    comfyui = for_comfyui(model, setup.pretrained.family)
    facts = (
        weighted,
        training,
        model_summary(setup, comfyui=comfyui is not None),
        MemoryOfStart(plan.memory_of_start, plan.memory_of_start_se),
    )
    summary = Summary(headline, *facts, plan.rows(), *judging.qualities(judged), rewards, judged_by, unseen)
    with writing(directory.model):
        export(setup, model, directory, model_card(config, summary, setup.chain), comfyui)
    images = setup.decoded(judged.before, judged.after)
    result = Result(config, summary, plan, judged.before, judged.after, judgement.bound, [], images)
    keep_result(result, directory)
    judging.forget(directory)
    directory.write_summary(summary.to_json())


@main_only
@part("drawing")
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures and write report.html, from what is on disk; prints the headline and returns the summary.

    Raises:
        InvalidInputError: the run is not finished, or of another release.
    """
    from implicit_diffusion.commands.finetune.report.figures import draw
    from implicit_diffusion.commands.finetune.report.report import write_report

    result = read_result(directory)
    page = write_report(result, draw(result, directory), directory)
    print_headline(result.summary, directory, page)
    return result.summary.to_json()
