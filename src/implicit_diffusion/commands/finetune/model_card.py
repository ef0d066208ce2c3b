"""The model card, README.md, of an exported pipeline."""

from __future__ import annotations

import math

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.guidance import in_words
from implicit_diffusion.commands.finetune.report.headline import opening_of, updates_in_words
from implicit_diffusion.commands.finetune.result import chain_in_words
from implicit_diffusion.commands.finetune.summary import Headline, ModelSummary, Summary
from implicit_diffusion.commands.rewards.weights import title
from implicit_diffusion.commands.shared.formatting import markdown, model_name, number
from implicit_diffusion.commands.shared.usage import PipelineUse, program
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.named import NAMED_SAMPLERS


def model_card(config: Config, summary: Summary, chain: Chain) -> str:
    """README.md; strings of the user have no effect in it as Markdown or HTML.

    Args:
        config: the resolved options of the run.
        summary: of the run.
        chain: that was trained.
    """
    own = summary.model.factory is not None
    given = (title(config.reward), model_name(config.model), chain.table.name, summary.model.pipeline)
    reward, model, table, pipeline = map(markdown, given)
    steps = markdown(chain_in_words(config, chain.table.name))
    rows = sorted(chain.pretrained_rows)
    kept = f"the pretrained network acted on rows {rows} (no noise there)" if rows else "the network acted on all rows"
    runs = f"During training {kept}; this {'model' if own else 'pipeline'} runs the trained network on all of them."
    if own:
        runs += f"""
`implicit-diffusion sample --model "this folder"` draws from it, on the machine that has {model}."""
    if not summary.model.pipeline_is_the_chain:
        runs = f"""**This pipeline samples another chain than the one that was trained**, which diffusers does not have:
it runs {pipeline} with the trained network; the table has its reward. The trained chain itself is
in `chain.json`; `implicit-diffusion sample --model "this folder"` draws from it. During training {kept}."""
    eta = f", eta={config.eta:g}" if config.eta is not None else ""
    scale = _guidance(config)
    guidance = f", guidance {scale:g}" if scale else ""
    untrained = summary.headline.untrained
    if untrained is not None:
        runs += f" {in_words(untrained)} It is sampled with guidance {scale:g}; that of the pretrained model was "
        runs += f"{config.guidance:g}."
    beta = summary.training.kl_weight
    if config.penalty == "drift":
        leash, judged = "the squared distance of the drifts from those of the pretrained model", ""
    else:
        leash, judged = "KL of the sampling path to the pretrained model", _judged(summary.headline, beta)
    worse = "".join(f"\n**{sentence}**\n" for sentence in opening_of(summary))
    adapter = ""
    if summary.model.adapter:
        loaded = "as the factory returns it" if own else "loaded as `pipeline`"
        adapter = f"""
The low-rank adapter is merged into these weights. By itself, of rank {config.lora_rank} and α = {config.lora_alpha:g},
it is in `lora/`, to be added to {model}, {loaded}: `{summary.model.adapter}`.
"""
    if summary.model.adapter_comfyui:
        adapter += f"`{summary.model.adapter_comfyui}` holds it in the layout that ComfyUI and kohya's tools read.\n"
    headline = summary.headline
    units = ", each in deviations of pretrained samples" * (len(summary.rewards) > 1)
    return f"""# {model} fine-tuned for {reward}
{worse}
Trained by implicit-diffusion: E[reward] against {beta:.4g} × {leash},
over a chain of {steps} ({table}).

| | before | after |
|---|---|---|
{_each(summary)}| reward, training chain | {headline.reward_before.mean:.4g} | {headline.reward_after.mean:.4g} |
| reward, this {"model" if own else "pipeline"} (network on all rows) | | {headline.reward_exported.mean:.4g} |
{judged}{_each_judge(summary)}
{runs}

```python
{program(pipeline_use(config, summary.model), "this folder")}
```
{adapter}
Chain: {config.scheduler or table}, N = {chain.num_steps}{eta}{guidance}, {_spacing(config)}.
β = {beta:.6g}, reward = {reward}{units}, {updates_in_words(summary)}, estimator {summary.training.estimator}, \
seed {config.seed}.
"""


def pipeline_use(config: Config, model: ModelSummary) -> PipelineUse:
    """What a program needs to know of the exported pipeline, from the resolved options and the summary of a run."""
    assert config.num_steps is not None
    return PipelineUse(
        num_steps=config.num_steps,
        condition=model.condition,
        pipeline_class=model.pipeline_class,
        event_shape=model.event_shape,
        eta=config.eta,
        guidance=_guidance(config),
        num_classes=model.num_classes,
        null_class=config.null_class,
        size=config.size,
        frames=config.frames,
        video=model.video,
        factory=model.factory,
    )


def _guidance(config: Config) -> float | None:
    """The scale of guidance that the trained network is sampled with."""
    return config.guidance if config.student_guidance is None else config.student_guidance


def _spacing(config: Config) -> str:
    """Where the rows of the chain are."""
    if config.scheduler is None:
        return "all rows of the model's own table"
    flow = NAMED_SAMPLERS[config.scheduler].flow
    return "the checkpoint's noise levels" if flow else "trailing spacing, clip_sample off"


def _each(summary: Summary) -> str:
    """The rows of the table for each of several rewards, whose weighted sum is the reward of the other rows."""
    rows = (
        f"| {markdown(each.name)} (weight {each.weight:g}, deviation {each.deviation:.4g}) | {each.before.mean:.4g} | "
        f"{each.after.mean:.4g} |\n"
        for each in summary.rewards
    )
    return "".join(rows) if len(summary.rewards) > 1 else ""


def _each_judge(summary: Summary) -> str:
    """A table of the judges, and which of them fell; empty without one."""
    if not summary.judges:
        return ""
    rows = "".join(
        f"| {markdown(each.name)} | {number(*each.before)} | {number(*each.after)} | "
        f"{number(*each.change, sign=True)} | {number(*each.exported)} |\n"
        for each in summary.judges
    )
    fell = ", ".join(markdown(each.name) for each in summary.judges if each.fell)
    warning = f" **{fell} fell: look at the pictures before you use the model.**" if fell else ""
    return f"""
Measured on the same samples, and never raised:

| judge | before | after | change | this pipeline |
|---|---|---|---|---|
{rows}
± is one standard error.{warning}
"""


def _judged(headline: Headline, beta: float) -> str:
    """The rows of the table that exist where the penalty is a path KL."""

    def mean(estimate: Estimate | None) -> float | None:
        return None if estimate is None else estimate.mean

    share, could = 0.0, headline.j_possible
    if headline.untrained is not None:  # J falls from there
        share = math.nan if could is None else headline.untrained.j_above.mean / could.mean
    return f"""| path KL (nats) | 0 | {number(mean(headline.path_kl), digits=4)} |
| J = {beta:.4g} × path KL − reward | {number(mean(headline.j_before), digits=4)} | {
        number(mean(headline.j_after), digits=4)
    } |
| share of the possible gain of J | {number(share)} | {number(mean(headline.captured))} |
"""
