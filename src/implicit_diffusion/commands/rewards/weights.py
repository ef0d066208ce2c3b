"""Several rewards and their weights, by name: brightness, FILE.py:function=2, FILE.py:Class(weight=2)=-0.5.

A weight is a number behind the last "=", after a whole name: neither an argument in parentheses, nor a part of a path.
Weights compare rewards in units of their standard deviations under the pretrained model. A negative one makes a reward
a penalty. A single reward has no weight: what it counts against is the path KL, which has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from implicit_diffusion.commands.rewards.trust import absolute, image_text_model, name_of_all, short, spelled
from implicit_diffusion.errors import InvalidInputError

MOST = 8  # rewards: a colour each


class Weighted(NamedTuple):
    """The name of a reward, as `load_reward` reads it, and its weight."""

    name: str
    weight: float


def weighted(rewards: Sequence[str]) -> tuple[Weighted, ...]:
    """The names and weights of rewards as they were given.

    Raises:
        InvalidInputError: no reward, or more than `MOST`; the same one twice; a weight that is not a finite number, or
            zero; a weight of a single reward.
    """
    if not rewards:
        raise InvalidInputError("`reward`: none is named; leave the option out for the default")
    if len(rewards) > MOST:
        raise InvalidInputError(f"`reward` is given {len(rewards)} times; at most {MOST} can be weighed at once")
    pairs = [_split(given) for given in rewards]
    if len(pairs) == 1 and pairs[0][1] is not None:
        raise InvalidInputError(
            f"`reward` {rewards[0]}: a single reward has no weight; leave ={pairs[0][1]} out, and use `kl_weight` to "
            "say how much it counts against the path KL"
        )
    places = [absolute(name) for name, _ in pairs]
    for i, (name, _) in enumerate(pairs):
        if places[i] in places[:i]:
            raise InvalidInputError(f"`reward` {name} is given twice; give it once, with the sum of the weights")
    return tuple(Weighted(name, _number(name, weight)) for name, weight in pairs)


def _split(given: str) -> tuple[str, str | None]:
    """A name, and the text of its weight; None where it has none."""
    name, equals, weight = given.rpartition("=")
    whole = image_text_model(name) or re.fullmatch(r"[^\W\d][\w-]*", spelled(name).function)
    return (name, weight) if equals and whole and not re.search(r"[:/\\()]", weight) else (given, None)


def _number(name: str, weight: str | None) -> float:
    try:
        number = 1.0 if weight is None else float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInputError(f"`reward` {name}: its weight, behind the =, must be a finite number, got {weight!r}")
    if number == 0:
        raise InvalidInputError(f"`reward` {name}: its weight is 0, so that it would not count; leave it out")
    return number


def names_of(reward: str | Sequence[str]) -> tuple[str, ...]:
    """The names in an option that takes one reward, or several with their weights."""
    return (reward,) if isinstance(reward, str) else tuple(name for name, _ in weighted(reward))


def with_absolute_names(rewards: Sequence[str]) -> tuple[str, ...]:
    """The rewards with absolute paths, as they were given otherwise."""
    pairs = map(_split, rewards)
    return tuple(absolute(name) + ("" if weight is None else f"={weight}") for name, weight in pairs)


def labels(rewards: Sequence[str]) -> tuple[str, ...]:
    """Short names for people, all different."""
    names = names_of(rewards)
    brief = [short(name) for name in names]
    return tuple(name if brief.count(label) > 1 else label for name, label in zip(names, brief))


def check_judges(rewards: Sequence[str], judges: Sequence[str]) -> None:
    """Refuse judges that could not judge the rewards.

    Raises:
        InvalidInputError: more than can be told apart beside the rewards; one with a weight; the same one twice; one
            that is raised itself.
    """
    if len(rewards) + len(judges) > MOST:
        raise InvalidInputError(
            f"`judge` is given {len(judges)} times beside {len(rewards)} rewards; at most {MOST} can be measured"
        )
    raised = {absolute(name) for name in names_of(rewards)}
    for i, given in enumerate(judges):
        name, weight = _split(given)
        if weight is not None:
            raise InvalidInputError(f"`judge` {given}: a judge has no weight, it is never raised; leave ={weight} out")
        if absolute(name) in raised:
            raise InvalidInputError(f"`judge` {name} is raised by `reward` itself; judge by something else")
        if absolute(name) in map(absolute, judges[:i]):
            raise InvalidInputError(f"`judge` {name} is given twice; give it once")


def judge_labels(rewards: Sequence[str], judges: Sequence[str]) -> tuple[str, ...]:
    """Short names of the judges, all different, and different from those of the rewards."""
    brief = [*labels(rewards), *map(short, judges)]
    return tuple(name if brief.count(short(name)) > 1 else short(name) for name in judges)


def functions_in(options: Any) -> tuple[str, ...]:
    """The names of all rewards and judges among the options of a command."""
    return (*names_of(getattr(options, "reward", "")), *getattr(options, "judge", ()))


def title(rewards: Sequence[str]) -> str:
    """What is raised, in a title: `brightness`, or `brightness + 2 × sharp.py:sharpness − digit-3`."""
    words = ""
    for (_, weight), label in zip(weighted(rewards), labels(rewards)):
        sign = ("" if weight > 0 else "−") if not words else " + " if weight > 0 else " − "
        words += sign + (f"{abs(weight):g} × " if abs(weight) != 1 else "") + label
    return words


def name_in_cache(rewards: Sequence[str]) -> str | None:
    """A name that decides what is computed from samples, whatever the weights; None where files of the user's do."""
    names = [name_of_all(name) for name in names_of(rewards)]
    return None if None in names else " ".join(filter(None, names))
