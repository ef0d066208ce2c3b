"""The report of a fine-tuning run, report.html."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.finetune.judging import falls, opening, updates
from implicit_diffusion.commands.finetune.planning import PROMPTS
from implicit_diffusion.commands.finetune.report.run_warnings import concerns
from implicit_diffusion.commands.finetune.result import Outcome, outside
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.shared import page, ranges
from implicit_diffusion.commands.shared.formatting import beside, decimals, distinct, model_name, number, percent
from implicit_diffusion.commands.shared.page import Picture, duration, table, tile, write_page
from implicit_diffusion.commands.shared.usage import usage
from implicit_diffusion.runs import RunDirectory, clock

NOT_IN_COMMAND = ("out", "plan")


def write_report(outcome: Outcome, figures: Sequence[Picture], directory: RunDirectory) -> Path:
    """Write report.html.

    Args:
        outcome: of the run.
        figures: from `implicit_diffusion.commands.finetune.report.figures.draw`.
        directory: of the run.

    Returns:
        The path of the report.
    """
    title = f"{model_name(outcome.config['model'])}, fine-tuned for {short(outcome.config['reward'])}"
    body = [
        _headline(outcome, title),
        _concerns(outcome),
        page.figures(figures),
        _quality(outcome),
        _time(directory),
        _plan(outcome),
        _use(outcome, directory),
        _configuration(outcome),
    ]
    return write_page(directory.path / "report.html", title, body)


def _headline(outcome: Outcome, title: str) -> str:
    s, config = outcome.summary, outcome.config
    gain = s["reward_after"] - s["reward_before"]
    spread = f"{number(outcome.gain_in_std, sign=True, digits=2)} standard deviations of the pretrained samples"
    tiles = [
        tile(
            "Mean reward",
            f'<span class="from">{_short(s["reward_before"], gain)} →</span> {_short(s["reward_after"], gain)}',
            f"{number(gain, s.get('reward_gain_se'), sign=True)}, or {spread}",
        )
    ]
    if s.get("worse") and s["j_before"] is not None:
        tiles.append(tile("J rose", f"{number(s['j_before'])} → {number(s['j_after'])}", "lower is better"))
    if s.get("captured") is not None:
        share = min(1.0, max(0.0, s["captured"]))
        bar = f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
        note = f"{bar}of the gain in J that this KL weight allows"
        tiles.append(tile("Captured", percent(s["captured"], s["captured_se"]), note))
    if s.get("path_kl") is not None:
        best = outcome.bound
        optimum = "" if best is None else f"the optimum sits at {number(best.path_kl, best.path_kl_se)}"
        tiles.append(tile("Path KL in nats", number(s["path_kl"], s["path_kl_se"]), optimum))
    cost = f"{updates(s)}, {s['network_evaluations']:,} network evaluations"
    tiles.append(tile("Training time", duration(s["seconds"]), cost))
    weight = f"{'drift' if outcome.drift else 'KL'} weight {outcome.beta:.4g}"
    if outcome.adapted:
        weight += f" (adapted, {config['kl_weight']:.4g} at the start)"
    facts = [outcome.chain, f"{config['loop']} loop", weight, f"seed {config['seed']}"]
    return f"""<header>
<p class="kicker">implicit-diffusion · fine-tuning report</p>
<h1>{escape(title)}</h1>
<p class="facts">{escape(" · ".join(facts))}</p>
</header>
<section class="tiles">{"".join(tiles)}</section>
<p class="lead">{_in_words(outcome)}</p>
"""


def _in_words(outcome: Outcome) -> str:
    s, best = outcome.summary, outcome.bound
    verb = "raised" if s["reward_after"] > s["reward_before"] else "lowered"
    text = "".join(f"<b>{escape(sentence)}</b> " for sentence in opening(s))
    text += (
        f"Fine-tuning {verb} the mean reward on unseen noise by {number(abs(outcome.gain_in_std), digits=2)} standard "
        "deviations of what the pretrained model earns."
    )
    if s.get("path_kl") is not None:
        text += (
            f" The price is a path KL of {number(s['path_kl'])} nats, the mean square of the steps' shifts: how far "
            "sampling moved from the pretrained model."
        )
    if best is not None and s.get("captured") is not None:
        fell, could = falls(s)
        text += (
            f" J weighs one against the other ({outcome.beta:.4g} × path KL − reward, lower is better). It fell by "
            f"{number(*fell)}, from {beside(s['j_before'], fell[1])} to {beside(s['j_after'], fell[1])}; no sampler of "
            f"this chain can bring it below {beside(best.j, could[1])}, a fall of {number(*could)}."
        )
    return text + " Every ± here is one standard error."


def _concerns(outcome: Outcome) -> str:
    found = concerns(outcome)
    cards = [
        f'<div class="concern {"warning" if concern.warning else "info"}">'
        f"<p><b>{escape(concern.title)}.</b> {escape(concern.text)}</p></div>"
        for concern in found
    ]
    if not any(concern.warning for concern in found):
        checked = "the gain, " + ("" if outcome.drift else "the KL, ") + "the pixels' range, the exported model"
        if outcome.summary.get("quality_after"):
            checked += ", the judge's confidence, the distance to real digits, copies of training data"
        cards.insert(0, f'<div class="concern fine"><p><b>No warnings.</b> Checked: {checked}.</p></div>')
    return f'<section class="concerns">{"".join(cards)}</section>'


def _quality(outcome: Outcome) -> str:
    s = outcome.summary
    looks = [s.get(f"quality_{when}") for when in ("before", "after", "exported")]
    rewards = ((s[name], s[name + "_se"]) if s.get(name) is not None else (None, None) for name in REWARDS)
    rows = [["mean reward", "", *(number(*reward) for reward in rewards)]]
    if outcome.images is not None:
        before, after = outcome.images
        rows.append(["pixels outside [−1, 1]", "", percent(outside(before)), percent(outside(after)), ""])
    if looks[0] and looks[1]:
        for label, key in QUALITY.items():
            write = _two_digits if key in ("mmd", "nearest_distance") else percent
            by_chance = f"up to {_two_digits(looks[0]['mmd_reference']['quantile_95'])}"
            real = by_chance if key == "mmd" else write(looks[0]["held_out"][key])
            rows.append([label, real, *(write(look[key]) if look else "" for look in looks)])
    columns = ["", "real, held out", "before", "after", "exported"]
    if not looks[0]:  # nothing is known of real data
        rows, columns = [[row[0], *row[2:]] for row in rows], [columns[0], *columns[2:]]
    return f"""<section><h2>Numbers, before and after</h2>
<p>“After” is the chain that was trained; “exported” is what <code>model/</code> runs, the trained network on
all steps. A dash stands for what was not measured.</p>
{table(columns, rows)}</section>
"""


REWARDS = ("reward_before", "reward_after", "reward_exported")
QUALITY = {
    "classifier is sure": "classifier_confidence",
    "judge is sure": "judge_confidence",
    "classifier and judge agree": "judge_agreement",
    "copies of training data": "memorised",
    "distance to the nearest digit": "nearest_distance",
    "MMD² to real digits": "mmd",
}


def _two_digits(value: float) -> str:
    return number(value, digits=2)


def _plan(outcome: Outcome) -> str:
    plan = outcome.plan
    if not plan.bounds:
        return f"""<section><h2>The pretrained model</h2>
<p>It earns {number(plan.reward, plan.reward_se)}, with a deviation of {number(plan.reward_std)} between samples. For
a penalty on drifts no bound says how much could be gained.</p></section>
"""
    rows, chosen = [], None
    weights = distinct([b.beta for b in plan.bounds], 3)
    for index, row in enumerate(plan.rows()):
        unsure = " ?" if not row["trusted"] else ""
        rows.append(
            [
                weights[index],
                number(row["reward_gain"], row["reward_gain_se"], sign=True) + unsure,
                f"{row['reward_gain_in_std']:.2f}",
                number(row["path_kl"], row["path_kl_se"]) + unsure,
                number(row["j_gain"], row["j_gain_se"]),
            ]
        )
        if abs(row["kl_weight"] / outcome.beta - 1) < 0.02 if outcome.beta else False:
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
{percent(plan.memory, plan.memory_se)} of its variance (0 % is memoryless).{doubt}</p>
{table(columns, rows, chosen)}</section>
"""


def _time(directory: RunDirectory) -> str:
    rows = [[name, f"{spent:.1f}", percent(share)] for name, spent, share in clock.shares(directory.path)]
    parts = table(("part", "seconds", "share"), rows)
    return f"<section><h2>Where the time went, up to this page</h2>{parts}</section>" if rows else ""


def _use(outcome: Outcome, directory: RunDirectory) -> str:
    config = outcome.config
    code = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({str(directory.model)!r})
{usage(config, outcome.summary)}"""
    other = ""
    if not outcome.summary.get("pipeline_is_the_chain", True):
        other = (
            f"<p>It runs {escape(outcome.summary['pipeline'])}, which is not the chain that was trained: diffusers has "
            "none for that. To draw from the trained chain:</p>\n<pre><code>implicit-diffusion sample --model "
            f"{escape(shlex.quote(str(directory.model)))}</code></pre>\n"
        )
    return f"""<section><h2>Use the model</h2>
<p>Plain diffusers loads it, without this package:</p>
<pre><code>{escape(code)}</code></pre>
{other}<h2>Run it again</h2>
<pre><code>{escape(command(config | _own_prompts(directory)))}</code></pre></section>
"""


def _own_prompts(directory: RunDirectory) -> dict[str, str]:
    """The run's copy of its prompts, which is there as long as the report is."""
    path = directory.path / PROMPTS
    return {"prompts": str(path)} if path.is_file() else {}


def command(config: dict[str, Any]) -> str:
    """The command line with this configuration, to be pasted as it is; settings that are None or off are left out."""
    off = {k for k, v in config.items() if v is None or v is False or isinstance(v, dict | list)}
    return ranges.command("finetune", {k: v for k, v in config.items() if k not in off.union(NOT_IN_COMMAND)})


def _configuration(outcome: Outcome) -> str:
    config = outcome.config
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in config.items()]
    if outcome.adapted:
        place = list(config).index("kl_weight")
        rows[place][0] = "kl_weight, at the start"
        rows.insert(place + 1, ["kl_weight, at the end (adapted to target_kl)", f"{outcome.beta:.6g}"])
    return f"""<section><details><summary>Configuration</summary>
{table(("setting", "value"), rows, cls="plain")}</details></section>
"""


def _short(value: float, scale: float) -> str:
    """A number with as many decimals as two digits of the gain need."""
    return f"{value:.{decimals(abs(scale), 2)}f}".replace("-", "−")
