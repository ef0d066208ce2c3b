"""The table of the result: the pretrained chain, the trained one, the trained one by its weights, and the bound."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.finetune.summary import Headline
from implicit_diffusion.commands.shared.formatting import beside, number, percent
from implicit_diffusion.commands.shared.page import table
from implicit_diffusion.evaluation.judging import Untrained

COLUMNS = ("", "reward", "gained", "path KL (nats)", "J", "J fell by", "captured")


def reached(result: Result) -> str:
    """The section with what was reached, and what the weights of the judged trajectories add."""
    by_weights = result.summary.by_weights
    words = [by_weights.reweighted_missing or _of_weights(result)]
    return f"""<section><h2>What was reached</h2>
{table(COLUMNS, [*_rows(result)])}
<p>{escape(" ".join(words))}</p></section>
"""


def _rows(result: Result) -> Iterator[list[str]]:
    headline, best = result.summary.headline, result.bound
    by_weights, law = result.summary.by_weights, result.summary.by_weights.reweighted
    gain, fall = headline.reward_gain, headline.j_fall
    error = None if fall is None else fall.error
    before, after = (beside(reward.mean, gain.error) for reward in (headline.reward_before, headline.reward_after))
    j_before, j_after = (beside(j and j.mean, error) for j in (headline.j_before, headline.j_after))
    path_kl = number(*(headline.path_kl or (None,)))
    nothing = "" if headline.path_kl is None else "0"
    if headline.untrained is None:
        yield ["pretrained", before, "", nothing, j_before, "", ""]
    else:
        yield from _guided(headline, headline.untrained, nothing, j_before)
    share = percent(*(headline.captured or (None, None)))
    yield ["trained", after, number(*gain, sign=True), path_kl, j_after, number(*(fall or (None,))), share]
    if law is not None:
        mark = "" if law.trusted else " ?"
        yield [
            "trained and weighted",
            beside(law.reward.mean, law.reward_gain.error) + mark,
            number(*law.reward_gain, sign=True) + mark,
            number(*law.path_kl) + mark,
            beside(law.j.mean, law.j_fall.error) + mark,
            number(*law.j_fall) + mark,
            percent(*(by_weights.reweighted_captured or (None, None))) + mark,
        ]
    if best is not None:
        could = headline.j_possible or (None, None)
        known = law.reward_gain.error if law is not None and headline.j_bound_from == "trained" else None
        gained = number(best.reward - headline.reward_before.mean, known, sign=True)
        optimum = number(best.path_kl, best.path_kl_se)
        most = beside(best.j, could[1]), number(*could)
        yield ["bound", beside(best.reward, known), gained, optimum, *most, "100\N{NO-BREAK SPACE}%"]


def _guided(headline: Headline, untrained: Untrained, nothing: str, j_before: str) -> Iterator[list[str]]:
    """The pretrained chain, which is guided, and the untrained one, with which training began."""
    reward, above = headline.reward_before.mean, untrained.j_above
    could = headline.j_possible
    share = percent(above.mean / could.mean) if could is not None and headline.captured is not None else ""
    before = beside(reward, headline.reward_gain.error)
    yield ["pretrained, guided", before, "", nothing, j_before, number(*above), share]
    gained = untrained.reward.mean - reward
    kl, j = number(*untrained.path_kl), beside(untrained.j.mean, above.error)
    yield ["untrained", beside(*untrained.reward), number(gained, sign=True), kl, j, "0", "0"]


def _of_weights(result: Result) -> str:
    """What the row of the weighted chain is, and how far it can be trusted."""
    law, source = result.summary.by_weights.reweighted, result.summary.headline.j_bound_from
    assert law is not None
    other = (
        "its row repeats the bound, which comes from the same trajectories; so the share compares the weights of one "
        "half of them with the bound by the other"
        if source == "trained"
        else "its share compares their weights with the bound from pretrained trajectories"
    )
    text = (
        "Weighted, the trajectories of the trained chain stand for the law that attains the bound, "
        f"exactly: {other}. {percent(law.effective_share)} of them are effective. Errors are those of differences on "
        "the same noise."
    )
    if law.trusted:
        return text
    return f"{text} That is too few for the numbers with a “?”; more updates or a larger KL weight make more effective."
