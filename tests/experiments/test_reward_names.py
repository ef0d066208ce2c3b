"""Rewards of the user's own: whatever is wrong with them is one line that says where."""

import sys

import pytest
import torch
from torch import Tensor

from implicit_diffusion.cli import main
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import planning
from implicit_diffusion.experiments.reward_names import load_reward

LOADING = {
    "my.py:2: SyntaxError: ": "import torch\ndef f(x) return x",
    "my.py:3: ModuleNotFoundError: No module named 'not_installed'": "import torch\n\nimport not_installed",
    "my.py:1: ZeroDivisionError: ": "y = 1 / 0",
    "is a class; name a function, or an instance": "class f:\n    def __call__(self, x): return x.sum(1)",
}


@pytest.mark.parametrize("message", LOADING)
def test_a_file_that_does_not_load(message, tmp_path):
    (tmp_path / "my.py").write_text(LOADING[message])
    path = list(sys.path)
    with pytest.raises(InvalidInputError, match=message.replace(".", r"\.")):
        load_reward(f"{tmp_path / 'my.py'}:f")
    assert sys.path == path


def test_a_module_that_imports_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "reward_module.py").write_text("\nimport not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInputError, match="No module named 'not_installed'"):
        load_reward("reward_module:f")


def test_a_file_finds_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "helper_of_rewards.py").write_text("def total(x): return x.flatten(1).sum(1)")
    (tmp_path / "rewards" / "my.py").write_text("import helper_of_rewards\ndef f(x): return helper_of_rewards.total(x)")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_reward("rewards/my.py:f")(torch.ones(2, 3)), Tensor([3.0, 3.0]))


RAISING = """
import torch
def numpy(x):
    return torch.tensor(x.numpy().sum((1, 2, 3)))
def raises(x):
    y = x + 1
    raise KeyError("colour")
def nothing(): return 1
def clamps(x): return x.clamp_(-1, 1).flatten(1).sum(1)
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("numpy", "my.py:4: RuntimeError: Can't call numpy()"),
        ("raises", "my.py:7: KeyError: 'colour'"),
        ("nothing", "my.py:nothing: TypeError: nothing() takes 0 positional arguments"),
        ("clamps", "my.py:9: RuntimeError: a leaf Variable"),
    ],
)
def test_what_a_reward_raises_is_one_line_before_any_work(function, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "evaluate_pretrained", lambda *arguments, **options: pytest.fail("the plan was made"))
    (tmp_path / "my.py").write_text(RAISING)
    reward = ["--reward", f"{tmp_path / 'my.py'}:{function}"]
    assert main(["finetune", "--num-steps", "2", *reward, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --reward") and message in error and "torch operations" in error
