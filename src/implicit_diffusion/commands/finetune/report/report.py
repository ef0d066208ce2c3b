"""The report of a fine-tuning run, report.html."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

from implicit_diffusion.commands.finetune import guidance, held_out_prompts
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.model_card import pipeline_use
from implicit_diffusion.commands.finetune.report.headline import opening_of, updates_in_words
from implicit_diffusion.commands.finetune.report.judges import judges_at_the_end
from implicit_diffusion.commands.finetune.report.reached import reached
from implicit_diffusion.commands.finetune.report.rewards import rewards_at_the_end, rewards_of_the_plan
from implicit_diffusion.commands.finetune.report.run_warnings import run_warnings
from implicit_diffusion.commands.finetune.result import Result, outside
from implicit_diffusion.commands.rewards.weights import title as titled
from implicit_diffusion.commands.shared import page, ranges
from implicit_diffusion.commands.shared.formatting import beside, decimals, distinct, model_name, number, percent
from implicit_diffusion.commands.shared.page import Picture, duration, table, tile, write_page
from implicit_diffusion.commands.shared.usage import program
from implicit_diffusion.digits import Appearance
from implicit_diffusion.runs import RunDirectory, clock

NOT_IN_COMMAND = ("out", "plan")
REPEATED = [field.name for field in fields(Config) if field.metadata.get("repeatable")]


def write_report(result: Result, figures: Sequence[Picture], directory: RunDirectory) -> Path:
    """Write report.html.

    Args:
        result: of the run.
        figures: from `implicit_diffusion.commands.finetune.report.figures.draw`.
        directory: of the run.

    Returns:
        The path of the report.
    """
    title = f"{model_name(result.config.model)}, fine-tuned for {titled(result.config.reward)}"
    body = [
        _headline(result, title),
        _warnings(result),
        reached(result),
        page.figures(figures),
        rewards_at_the_end(result),
        judges_at_the_end(result),
        _held_out_prompts(result),
        _quality(result),
        guidance.section(guidance.read(directory)),
        _time(directory),
        _plan(result),
        _use(result, directory),
        page.configuration(_settings(result)),
    ]
    return write_page(directory.path / "report.html", title, body)


def _headline(result: Result, title: str) -> str:
    config = result.config
    weight = f"{'drift' if result.drift else 'KL'} weight {result.beta:.4g}"
    if result.adapted:
        weight += f" (adapted, {result.summary.training.kl_weight_at_start:.4g} at the start)"
    facts = [result.chain, f"{config.loop} loop", f"estimator {config.estimator}", weight, f"seed {config.seed}"]
    return f"""<header>
<p class="kicker">implicit-diffusion · fine-tuning report</p>
<h1>{escape(title)}</h1>
<p class="facts">{escape(" · ".join(facts))}</p>
</header>
<section class="tiles">{"".join(_tiles(result))}</section>
<p class="lead">{_in_words(result)}</p>
"""


def _tiles(result: Result) -> Iterator[str]:
    """The largest numbers."""
    headline, training, best = result.summary.headline, result.summary.training, result.bound
    before, after, gain = headline.reward_before.mean, headline.reward_after.mean, headline.reward_gain
    spread = f"{number(headline.gain_in_std, sign=True, digits=2)} standard deviations of the pretrained samples"
    yield tile(
        "Mean reward",
        f'<span class="from">{_short(before, gain.mean)} →</span> {_short(after, gain.mean)}',
        f"{number(*gain, sign=True)}, or {spread}",
    )
    if headline.worse and headline.j_begun is not None:
        j_after = None if headline.j_after is None else headline.j_after.mean
        yield tile("J rose", f"{number(headline.j_begun.mean)} → {number(j_after)}", "lower is better")
    if headline.captured is not None:
        share = min(1.0, max(0.0, headline.captured.mean))
        bar = f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
        yield tile("Captured", percent(*headline.captured), f"{bar}of the gain in J that this KL weight allows")
    if headline.path_kl is not None:
        optimum = "" if best is None else f"the optimum is at {number(best.path_kl, best.path_kl_se)}"
        if headline.untrained is not None:
            optimum = f"{number(*headline.untrained.path_kl)} before training; {optimum}"
        yield tile("Path KL in nats", number(*headline.path_kl), optimum)
    cost = f"{updates_in_words(result.summary)}, {training.network_evaluations:,} network evaluations"
    yield tile("Training time", duration(training.seconds), cost)


def _in_words(result: Result) -> str:
    headline, best = result.summary.headline, result.bound
    verb = "raised" if headline.reward_after.mean > headline.reward_before.mean else "lowered"
    text = "".join(f"<b>{escape(sentence)}</b> " for sentence in opening_of(result.summary))
    text += (
        f"Fine-tuning {verb} the mean reward on unseen noise by {number(abs(headline.gain_in_std), digits=2)} standard "
        "deviations of what the pretrained model earns."
    )
    if headline.path_kl is not None:
        text += (
            f" The price is a path KL of {number(headline.path_kl.mean)} nats, the mean square of the steps' shifts: "
            "how far sampling moved from the pretrained model."
        )
    if headline.untrained is not None:
        text += f" {guidance.in_words(headline.untrained)}"
    if best is not None and headline.captured is not None:
        before, after, fall, could = headline.j_begun, headline.j_after, headline.j_fall, headline.j_possible
        assert before is not None and after is not None and fall is not None and could is not None
        text += (
            f" J weighs one against the other ({result.beta:.4g} × path KL − reward, lower is better). It fell by "
            f"{number(*fall)}, from {beside(before.mean, fall.error)} to {beside(after.mean, fall.error)}; no sampler "
            f"of this chain can bring it below {beside(best.j, could.error)}, a fall of {number(*could)}."
        )
    return text + " Every ± here is one standard error."


def _warnings(result: Result) -> str:
    warnings = run_warnings(result)
    cards = [
        f'<div class="concern {"warning" if warning.serious else "info"}">'
        f"<p><b>{escape(warning.title)}.</b> {escape(warning.text)}</p></div>"
        for warning in warnings
    ]
    if not any(warning.serious for warning in warnings):
        checked = "the gain, " + ("" if result.drift else "the KL, ") + "the pixels' range, the exported model"
        if result.summary.quality_after is not None:
            checked += ", the second classifier's confidence, the distance to real digits, copies of training data"
        cards.insert(0, f'<div class="concern fine"><p><b>No warnings.</b> Checked: {checked}.</p></div>')
    return f'<section class="concerns">{"".join(cards)}</section>'


def _held_out_prompts(result: Result) -> str:
    headline = result.summary.headline
    ends = headline.reward_before, headline.reward_after
    return held_out_prompts.section(result.summary.held_out_prompts, *ends, headline.reward_gain)


def _quality(result: Result) -> str:
    summary, headline = result.summary, result.summary.headline
    rewards = (headline.reward_before, headline.reward_after, headline.reward_exported)
    rows = [["mean reward", "", *(number(*reward) for reward in rewards)]]
    if result.images is not None:
        before, after = result.images
        rows.append(["pixels outside [−1, 1]", "", percent(outside(before)), percent(outside(after)), ""])
    if summary.quality_before is not None:
        looks = (summary.quality_before, summary.quality_after, summary.quality_exported)
        held_out = summary.quality_before.held_out
        for label, name in QUALITY.items():
            rows.append([label, *(_look(look, name) for look in (held_out, *looks))])
        by_chance = f"up to {_two_digits(summary.quality_before.mmd_reference.quantile_95)}"
        rows.append(["MMD² to real digits", by_chance, *(_two_digits(look.mmd) if look else "" for look in looks)])
    columns = ["", "real, held out", "before", "after", "exported"]
    if summary.quality_before is None:  # nothing is known of real data
        rows, columns = [[row[0], *row[2:]] for row in rows], [columns[0], *columns[2:]]
    return f"""<section><h2>Numbers, before and after</h2>
<p>“After” is the chain that was trained; “exported” is what <code>model/</code> runs, the trained network on
all steps. A dash stands for what was not measured.</p>
{table(columns, rows)}</section>
"""


QUALITY = {
    "confidence of the classifier": "classifier_confidence",
    "confidence of the second classifier": "judge_confidence",
    "the classifiers agree": "judge_agreement",
    "copies of training data": "memorised",
    "distance to the nearest digit": "nearest_distance",
}


def _look(look: Appearance | None, name: str) -> str:
    """One number of a set of images."""
    if look is None:
        return ""
    value: float = getattr(look, name)
    return _two_digits(value) if name == "nearest_distance" else percent(value)


def _two_digits(value: float) -> str:
    return number(value, digits=2)


def _plan(result: Result) -> str:
    plan = result.plan
    if not plan.bounds:
        return f"""<section><h2>The pretrained model</h2>
<p>It earns {number(plan.reward, plan.reward_se)}, with a deviation of {number(plan.reward_std)} between samples. For
a penalty on drifts no bound says how much could be gained.</p></section>
"""
    rows, chosen = [], None
    weights = distinct([b.beta for b in plan.bounds], 3)
    for index, row in enumerate(plan.rows()):
        unsure = "" if row.trusted else " ?"
        rows.append(
            [
                weights[index],
                number(row.reward_gain, row.reward_gain_se, sign=True) + unsure,
                f"{row.reward_gain_in_std:.2f}",
                number(row.path_kl, row.path_kl_se) + unsure,
                number(row.j_gain, row.j_gain_se),
            ]
        )
        if result.beta and abs(row.kl_weight / result.beta - 1) < 0.02:
            chosen = index
    columns = ("KL weight", "reward gain", "in deviations", "path KL (nats)", "gain of J")
    doubt = (
        " A “?” marks numbers that rest on too few effective samples."
        if any(not b.trusted for b in plan.bounds)
        else ""
    )
    return f"""<section><h2>The plan: what each KL weight could buy</h2>
<p>Computed before training, from pretrained samples alone: the best that any sampler of the chain could do, not yet
what training attains. The pretrained reward is {number(plan.reward, plan.reward_se)}, with a deviation of
{number(plan.reward_std)} between samples; the first noise x<sub>0</sub> decides
{percent(plan.memory_of_start, plan.memory_of_start_se)} of its variance (0 % is memoryless).{doubt}</p>
{table(columns, rows, chosen)}
{rewards_of_the_plan(result)}</section>
"""


def _time(directory: RunDirectory) -> str:
    rows = [[name, f"{spent:.1f}", percent(share)] for name, spent, share in clock.shares(directory.path)]
    parts = table(("part", "seconds", "share"), rows)
    return f"<section><h2>Where the time went, up to this page</h2>{parts}</section>" if rows else ""


def _use(result: Result, directory: RunDirectory) -> str:
    config, model = result.config, result.summary.model
    code = program(pipeline_use(config, model), str(directory.model))
    other = ""
    if not model.pipeline_is_the_chain:
        other = (
            f"<p>It runs {escape(model.pipeline)}, which is not the chain that was trained: diffusers has "
            "none for that. To draw from the trained chain:</p>\n<pre><code>implicit-diffusion sample --model "
            f"{escape(shlex.quote(str(directory.model)))}</code></pre>\n"
        )
    intro = "Plain diffusers loads it, without this package:"
    if model.factory is not None:
        intro = "The weights are a state_dict of the network that your function returns:"
    again = config.with_own_prompts(directory.path)  # which are there as long as the report is
    return f"""<section><h2>Use the model</h2>
<p>{intro}</p>
<pre><code>{escape(code)}</code></pre>
{other}<h2>Run it again</h2>
<pre><code>{escape(command(again))}</code></pre></section>
"""


def command(config: Config) -> str:
    """The command line with these options, to be pasted as it is; options that are None or off are left out."""
    given = {name: value for name, value in vars(config).items() if value is not None and value not in (False, ())}
    repeated = {name: list(given[name]) for name in REPEATED if name in given}
    return ranges.command("finetune", {n: v for n, v in (given | repeated).items() if n not in NOT_IN_COMMAND})


def _settings(result: Result) -> Iterator[tuple[str, object]]:
    """The options that were given or have a default, with the KL weight at both ends of the run if it was adapted."""
    for name, value in vars(result.config).items():
        if name == "reward" and len(value) == 1:
            yield name, value[0]
        elif name == "kl_weight" and result.adapted:
            yield "kl_weight, at the start", f"{result.summary.training.kl_weight_at_start:.6g}"
            yield "kl_weight, at the end (adapted to target_kl)", f"{result.beta:.6g}"
        elif value != ():
            yield name, value


def _short(value: float, scale: float) -> str:
    """A number with as many decimals as two digits of the gain need."""
    return f"{value:.{decimals(abs(scale), 2)}f}".replace("-", "−")
