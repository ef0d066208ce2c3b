"""Prompts with weights, negative prompts and metadata, and prompts that are not trained on, through whole runs."""

import json
import sys

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.held_out_prompts import HeldOutPrompts
from implicit_diffusion.commands.finetune.problem.setup import build
from implicit_diffusion.commands.finetune.report.run_warnings import run_warnings
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.denoisers import ClassifierFree, Embedded
from implicit_diffusion.evaluation import Estimate
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.reward_values import takes_condition, with_metadata
from tests.helpers import tiny
from tests.helpers.stops import interrupt_at
from tests.helpers.toy_result import changed, digits_result

RECORDS = [
    {"prompt": "a cat", "weight": 3, "metadata": {"sign": 1}},
    {"prompt": "red dog", "negative_prompt": "fog", "metadata": {"sign": -1}},
    {"prompt": "never", "weight": 0, "metadata": {"sign": 5}},
]
UNSEEN = [{"prompt": "a bird", "negative_prompt": "fog", "metadata": {"sign": 2}}]
REWARDS = """
import numpy as np
SEEN = {"a cat": 1, "red dog": -1, "a bird": 2}
def signed(images, prompts, metadata):
    assert [SEEN[prompt] for prompt in prompts] == [each.pop("sign") for each in metadata]  # of a copy
    return 50 * images[:, 0].flatten(1).mean(1)
def arrays(images: np.ndarray, metadata):
    return [each["sign"] * float(image.mean()) for image, each in zip(images, metadata)]
def plain(images, prompts):
    return images.flatten(1).mean(1)
"""
SMALL = ["--num-steps", "3", "--batch", "2", "--updates", "2", "--starts", "4", "--kl-weight", "2.5", "--stride", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = tmp_path_factory.mktemp("place")
    tiny.stable_diffusion(made / "sd")
    (made / "rewards.py").write_text(REWARDS)
    for name, records in (("trained", RECORDS), ("unseen", UNSEEN)):
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return made


def words(place, out, reward, *more):
    prompts = ("--prompts", f"{place}/trained.jsonl", "--reward", f"{place}/rewards.py:{reward}")
    return ["finetune", "--model", f"{place}/sd/model", *prompts, *SMALL, "--out", str(out), *more]


@pytest.mark.slow
def test_a_run_and_its_own_copies(place, tmp_path, capsys):
    out, unseen = tmp_path / "run", ("--held-out-prompts", f"{place}/unseen.jsonl")
    assert main(words(place, out, "signed", *unseen, "--judge", f"{place}/rewards.py:arrays")) == 0
    summary = json.loads((out / "summary.json").read_text())
    held_out = summary["held_out_prompts"]
    assert held_out["count"] == 1
    assert held_out["gain"] == pytest.approx(held_out["after"] - held_out["before"], abs=1e-6)
    assert held_out["trained_less_held_out"] == pytest.approx(summary["reward_gain"] - held_out["gain"], abs=1e-6)
    assert "unseen    " in capsys.readouterr().out
    assert "Prompts that were not trained on" in (out / "report.html").read_text()
    copies = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [each["metadata"] for each in copies] == [each["metadata"] for each in RECORDS]
    assert json.loads((out / "held-out-prompts.jsonl").read_text())["prompt"] == "a bird"
    (out / "held-out-prompts.jsonl").write_text('{"prompt": "another"}\n')
    (out / "summary.json").unlink()
    assert main(["resume", str(out)]) == 2
    assert "held-out-prompts.jsonl was" in capsys.readouterr().err


def test_what_is_drawn_and_what_it_is_guided_away_from(place):
    options = {"prompts": place / "trained.jsonl", "held_out_prompts": place / "unseen.jsonl", "guidance": 4.0}
    config = Config(model=f"{place}/sd/model", reward=f"{place}/rewards.py:signed", num_steps=3, **options)
    setup = build(setup_spec(config))
    drawn = setup.chain.condition(Noise(1), 400, 0)["prompt"]
    assert set(drawn.tolist()) == {0, 1} and abs((drawn == 0).double().mean() - 0.75) < 4 * (0.1875 / 400) ** 0.5
    assert setup.conditioning.held_out(Noise(1), 3, 0)["prompt"].tolist() == [3, 3, 3]
    # The network under each prompt, against one that is given the embeddings of its negative prompt by hand.
    table, network = setup.conditioning.table, load_pretrained(f"{place}/sd/model").denoiser
    rows = {"a cat": 0, "red dog": 1, "never": 2, "a bird": 3, "fog": 4, "": 5}
    assert all(len(column) == len(rows) for column in table.values())
    x, t = torch.randn(4, *setup.chain.event_shape), torch.full((4,), 500.0)
    with torch.no_grad():
        ours = setup.chain.denoiser(x, t, prompt=torch.arange(4))
        for number, negative in enumerate(("", "fog", "", "fog")):
            by_hand = ClassifierFree(Embedded(network, table), 4.0, {"prompt": rows[negative]})
            one = by_hand(x[number : number + 1], t[:1], prompt=torch.tensor([number]))
            torch.testing.assert_close(ours[number : number + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_scorer_elsewhere_is_given_the_records(place, tmp_path):
    out = tmp_path / "run"
    assert main(words(place, out, "arrays", "--reward-python", sys.executable)) == 0
    assert json.loads((out / "summary.json").read_text())["estimator"] == "surrogate"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_own_copies(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("trained", "unseen"):
        (tmp_path / f"{name}.jsonl").write_text((place / f"{name}.jsonl").read_text())
    call = words(place, "whole", "signed", "--held-out-prompts", "unseen.jsonl")
    call[call.index("--prompts") + 1] = "trained.jsonl"
    assert main(call) == 0
    own = training.callbacks

    with monkeypatch.context() as patch:
        patch.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1), *own(*arguments)])
        assert main([{"whole": "half"}.get(word, word) for word in call]) == 130
    for name in ("trained", "unseen"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert main(["resume", "half"]) == 0
    one, other = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "half"))
    assert one["held_out_prompts"] == other["held_out_prompts"] and one["reward_after"] == other["reward_after"]


@pytest.mark.parametrize(
    ("reward", "change", "message"),
    [
        ("signed", lambda place: ("--prompts", place / "text.txt"), "line 1 of --prompts has none"),
        ("signed", lambda place: ("--held-out-prompts", place / "text.txt"), "line 1 of --held-out-prompts has none"),
        ("plain", lambda place: ("--held-out-prompts", place / "none.txt"), "--held-out-prompts: "),
    ],
)
def test_bad_input_is_one_clear_line(place, tmp_path, reward, change, message, capsys):
    (place / "text.txt").write_text("a cat\n")
    assert main([*words(place, tmp_path / "run", reward), *map(str, change(place))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and not (tmp_path / "run").exists()


def test_metadata_need_prompts(place, tmp_path, capsys):
    for model, what in (("digits", "samples of this model come without prompts"),):
        call = ["finetune", "--model", model, "--reward", f"{place}/rewards.py:signed", "--out", str(tmp_path / "run")]
        assert main(call) == 2
        assert what in capsys.readouterr().err
    call = ["finetune", "--held-out-prompts", f"{place}/unseen.jsonl", "--out", str(tmp_path / "run")]
    assert main(call) == 2 and "needs --prompts" in capsys.readouterr().err


def test_which_rewards_take_records():
    taking = [lambda x, metadata: 0, lambda x, prompts, metadata: 0, lambda x, prompts, metadata, scale=1: 0]
    assert all(with_metadata(each) is not each and takes_condition(with_metadata(each)) for each in taking)
    for other in (lambda x: 0, lambda x, prompts: 0, lambda x, prompts, metadata=None: 0, torch.sum):
        assert with_metadata(other) is other


def test_gains_that_part_are_warned_of():
    apart, level = (
        HeldOutPrompts(9, Estimate(0.0, 0.1), Estimate(0.2, 0.1), Estimate(0.2, 0.1), Estimate(less, 0.1))
        for less in (0.21, 0.19)
    )
    titles = [
        {each.title for each in run_warnings(changed(digits_result(), held_out_prompts=u))} for u in (apart, level)
    ]
    assert titles[0] - titles[1] == {"Prompts that were not trained on gained less"}
