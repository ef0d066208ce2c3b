"""Several rewards by name, each with its weight."""

from pathlib import Path

import pytest

from implicit_diffusion.commands.rewards.weights import (
    MOST,
    labels,
    name_in_cache,
    names_of,
    title,
    weighted,
    with_absolute_names,
)
from implicit_diffusion.errors import InvalidInputError

OTHER = "darkness"
SPLIT = {
    "brightness": ("brightness", 1.0),
    "brightness=2": ("brightness", 2.0),
    "digit-3=-0.5": ("digit-3", -0.5),
    "a.py:f=1e-3": ("a.py:f", 1e-3),
    "a.py:C(w=2)": ("a.py:C(w=2)", 1.0),
    "a.py:C(w=2)=3": ("a.py:C(w=2)", 3.0),
    "a.py:C('x=1')": ("a.py:C('x=1')", 1.0),
    "runs=2/a.py:f": ("runs=2/a.py:f", 1.0),
    "runs=2/a.py:f=4": ("runs=2/a.py:f", 4.0),
    "a=2.py:f": ("a=2.py:f", 1.0),
    "pkg.mod:f=.25": ("pkg.mod:f", 0.25),
    "clip:openai/clip-vit": ("clip:openai/clip-vit", 1.0),
    "clip:openai/clip-vit=2": ("clip:openai/clip-vit", 2.0),
    "clip:a=b/clip=-.5": ("clip:a=b/clip", -0.5),
    "clip:/x/clip(text='a=1')": ("clip:/x/clip(text='a=1')", 1.0),
    "clip:/x/clip(text='a=1')=3": ("clip:/x/clip(text='a=1')", 3.0),
    "a.py:C(w=2": ("a.py:C(w=2", 1.0),  # refused where it is loaded, in words of its own
}


@pytest.mark.parametrize("given", SPLIT)
def test_a_weight_is_a_number_behind_a_whole_name(given):
    assert weighted([given, OTHER]) == (SPLIT[given], (OTHER, 1.0))
    assert names_of([given, OTHER]) == (SPLIT[given][0], OTHER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "none is named"),
        (["brightness=x", OTHER], r"brightness: its weight, behind the =, must be a finite number, got 'x'"),
        (["brightness=", OTHER], "got ''"),
        (["brightness=nan", OTHER], "finite number, got 'nan'"),
        (["brightness=inf", OTHER], "finite number, got 'inf'"),
        (["brightness=0", OTHER], "its weight is 0"),
        (["brightness=0", "darkness=0"], "its weight is 0"),
        (["brightness=2"], "a single reward has no weight; leave =2 out, and use `kl_weight`"),
        (["brightness", "brightness=2"], "brightness is given twice"),
        (["a.py:f", "./a.py:f"], "./a.py:f is given twice"),
        ([f"digit-{d % 10}" for d in range(MOST + 1)], f"given {MOST + 1} times; at most {MOST}"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        weighted(given)


def test_names_for_people():
    assert title(["brightness"]) == "brightness"
    assert title(["/x/a.py:f"]) == "a.py:f"
    assert title(["brightness", "/x/a.py:f=2", "digit-3=-0.5"]) == "brightness + 2 × a.py:f − 0.5 × digit-3"
    assert title(["brightness=-1", "darkness=3"]) == "−brightness + 3 × darkness"
    assert labels(["/x/a.py:f", "/y/a.py:f=2", "/y/a.py:g"]) == ("/x/a.py:f", "/y/a.py:f", "a.py:g")


def test_paths_become_absolute_and_weights_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["brightness=2", "a.py:f=-1e-1", "b.py:C(w=2)"]
    assert with_absolute_names(given) == ("brightness=2", f"{Path.cwd()}/a.py:f=-1e-1", f"{Path.cwd()}/b.py:C(w=2)")
    assert weighted(with_absolute_names(given))[1].weight == -0.1


def test_only_shipped_rewards_are_cached_and_whatever_their_weights():
    assert name_in_cache(["brightness"]) == "brightness"
    assert name_in_cache(["brightness=2", "digit-3"]) == name_in_cache(["brightness", "digit-3=5"])
    assert name_in_cache(["brightness", "digit-3"]) != name_in_cache(["digit-3", "brightness"])
    assert name_in_cache(["brightness", "a.py:f"]) is None
