"""Summaries to JSON and back: nothing is lost, numbers that a run does not have are absent, and others are refused."""

import json
from dataclasses import dataclass

import pytest

from implicit_diffusion.commands.shared.summaries import from_json, part_from_json, read_summary, to_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.runs import RunDirectory


@dataclass(frozen=True)
class Arm:
    reward: float
    deviation: float | None  # null where there is a single seed


@dataclass(frozen=True)
class Study:
    arms: dict[str, Arm]
    shape: tuple[int, ...]
    best: Arm | None = None
    rows: list[Arm] | None = None
    curve: list[float] | None = None


FULL = Study({"a": Arm(1.0, None), "b": Arm(2.0, 0.5)}, (3, 8), Arm(2.0, 0.5), [Arm(0.0, None)], [1.0, 2.0])
BARE = Study({}, ())


@pytest.mark.parametrize("study", [FULL, BARE])
def test_there_and_back_through_a_file(study, tmp_path):
    RunDirectory(tmp_path).write_summary(to_json(study))
    assert read_summary(Study, RunDirectory(tmp_path)) == study


def test_what_a_run_does_not_have_is_absent_and_what_it_does_not_know_is_null():
    assert to_json(BARE) == {"arms": {}, "shape": []}
    assert to_json(FULL)["arms"]["a"] == {"reward": 1.0, "deviation": None}
    assert from_json(Arm, {"reward": 1.0, "deviation": None}) == Arm(1.0, None)


@pytest.mark.parametrize("content", ['{"arms": {}}', '{"arms": {}, "shape": [], "more": 1}', "[1]", "{"])
def test_the_summary_of_another_release_is_refused_by_name(content, tmp_path):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"summary\.json is not what this release writes"):
        read_summary(Study, RunDirectory(tmp_path))


@dataclass(frozen=True)
class Judged:
    gain: Estimate
    share: Estimate | None


@pytest.mark.parametrize("judged", [Judged(Estimate(1.0, 0.1), None), Judged(Estimate(1.0, 0.1), Estimate(0.5, 0.2))])
def test_an_estimate_is_two_numbers_also_beside_the_fields_of_other_parts(judged):
    content = to_json(judged)
    assert list(content) == ["gain", "gain_se", "share", "share_se"]
    assert from_json(Judged, content) == judged
    assert part_from_json(Judged, content | to_json(Arm(1.0, 2.0))) == judged


def test_numbers_stay_what_they_are():
    value = 0.1 + 0.2
    assert from_json(Arm, json.loads(json.dumps(to_json(Arm(value, None))))).reward == value
