"""Rewards of the user's own: whatever is wrong with them is one line that says where."""

import sys
import warnings

import pytest
import torch
from torch import Tensor

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning, training
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.specs import setup_spec, training_spec
from implicit_diffusion.commands.rewards import trust as reward_trust
from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.commands.shared.prompt_files import Prompt
from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles
from tests.objectives.contract import check

LOADING = {
    "my.py:2: SyntaxError: ": "import torch\ndef f(x) return x",
    "my.py:3: ModuleNotFoundError: No module named 'not_installed'": "import torch\n\nimport not_installed",
    "my.py:1: ZeroDivisionError: ": "y = 1 / 0",
    "must make a function of images, got f; give the class a __call__": "class f: pass",
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
    words = ["--reward", f"{tmp_path / 'my.py'}:{function}", "--estimator", "adjoint"]
    assert main(["finetune", "--num-steps", "2", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --reward") and message in error
    assert "leaves the samples alone" in error or "--estimator adjoint, which needs a gradient" in error


MAKING = """
import functools, torch
from torch import nn
class Weighted:
    def __init__(self, weight=1.0, *, name="none"):
        self.weight, self.name, self.parts = weight, name, {"drop": nn.Dropout(0.5)}
    def __call__(self, x): return self.weight * self.parts["drop"](x).flatten(1).sum(1)
class Needs:
    def __init__(self, weight: float, scale=2.0): self.weight = weight * scale
    def __call__(self, x): return self.weight * x.flatten(1).sum(1)
class Network(nn.Module):
    def __init__(self, power=1):
        super().__init__()
        self.power, self.drop, self.scale = power, nn.Dropout(0.5), nn.Parameter(torch.ones(()))
    def forward(self, x): return self.drop(x).flatten(1).sum(1) ** self.power
class Nothing: pass
def factory(weights={"a": 1}, at=(0, 1)):
    return lambda x: sum(weights.values()) * x.flatten(1)[:, at[0] : at[1]].sum(1)
def reward(x, weight=1.0): return weight * x.flatten(1).sum(1)
def of_prompts(images, prompts, weight=1.0): return weight * images.flatten(1).sum(1)
def number(n): return n
def fails(path="none"): raise FileNotFoundError(path)
ready = Weighted(3)
"""
X = torch.ones(2, 3)
MADE = {
    "Weighted": 3.0,
    "Weighted()": 3.0,
    "Weighted(2)": 6.0,
    "Weighted(weight=-2)": -6.0,
    "Weighted( 0.5, name='a:b(c)' )": 1.5,
    "Needs(2, scale=1)": 6.0,
    "Network": 3.0,
    "Network(power=2)": 9.0,
    "factory()": 1.0,
    "factory({'a': 1, 'b': 2}, at=(0, 2))": 6.0,
    "reward": 3.0,
    "reward(weight=4)": 12.0,
    "ready": 9.0,
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file with rewards, in a folder whose name has what separates the parts of a reward's name."""
    (tmp_path / "a:b (c)").mkdir()
    (tmp_path / "a:b (c)" / "mine_made.py").write_text(MAKING)
    monkeypatch.syspath_prepend(tmp_path / "a:b (c)")
    return tmp_path / "a:b (c)" / "mine_made.py"


@pytest.mark.parametrize("name", MADE)
def test_classes_and_factories_are_called_with_literal_arguments(name, mine):
    """Networks that are found, or held by what was made, are in eval mode: their dropout does nothing."""
    for place in (mine, "mine_made"):
        assert load_reward(f"{place}:{name}")(X).tolist() == [MADE[name]] * 2


def test_networks_go_to_the_runs_device(mine):
    """A file cannot know it; meta stands for an accelerator."""
    network = load_reward(f"{mine}:Network(power=2)", torch.device("meta")).__wrapped__
    assert network.scale.is_meta and not network.training


UNFIT = {
    "got an unexpected keyword argument 'wieght'; give its arguments, Weighted(weight=1.0, *, name='none')": (
        "Weighted(wieght=2)"
    ),
    "missing a required argument: 'weight'; give its arguments, Needs(weight, scale=2.0)": "Needs",
    "too many positional arguments": "Network(1, 2)",
    "multiple values for argument 'weight'": "Weighted(1, weight=2)",
    "the argument weight=abs(-2) is not a literal": "Weighted(weight=abs(-2))",
    "the argument open('x').read() is not a literal": "Weighted(open('x').read())",
    'put words in quotes, name="big"': "Weighted(name=big)",
    "** cannot be used here": "Weighted(**{'weight': 2})",
    "the argument *[1] is not a literal": "Weighted(*[1])",
    "the arguments end without a )": "Weighted(weight=2",
    "cannot be read as arguments: ": "Weighted(weight=)",
    "cannot be read as arguments; write them as (1, weight=2)": "Weighted(1)(2)",
    "Nothing(...) must make a function of images, got Nothing; give the class a __call__(self, images)": "Nothing",
    "number(...) must make a function of images, got int; return a function of images": "number(3)",
    "got an unexpected keyword argument 'wieght'; give its arguments, reward(x, weight=1.0)": "reward(wieght=2)",
    "got an unexpected keyword argument 'wieght'; give its arguments, Needs(weight, scale=2.0)": "Needs(wieght=2)",
    "missing a required argument: 'x'; name it without parentheses, or give its arguments, reward(x, weight=1.0)": (
        "reward()"
    ),
    "mine_made.py:22: FileNotFoundError: nowhere": "fails('nowhere')",
    "has no function 'missing'": "missing(1)",
}


@pytest.mark.parametrize("message", UNFIT)
def test_arguments_that_do_not_fit_are_named(message, mine):
    with pytest.raises(InvalidInputError) as refusal:
        load_reward(f"{mine}:{UNFIT[message]}")
    assert message in str(refusal.value) and "`reward`" in str(refusal.value)


def test_nothing_in_the_arguments_is_executed(mine, tmp_path):
    """Nor is the file, where they are no literals."""
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MAKING)
    for arguments in (
        f"(open({str(tmp_path / 'ran')!r}, 'w'))",
        "(weight=(lambda: 1)())",
        "(f'{1 + 1}')",
        "([i for i in 'a'])",
    ):
        with pytest.raises(InvalidInputError, match=r"not a literal"):
            load_reward(f"{mine}:Weighted{arguments}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["brightness(2)", "digit-3()"])
def test_shipped_rewards_take_no_arguments(name):
    with pytest.raises(InvalidInputError, match="takes no arguments; name it without parentheses"):
        load_reward(name)


def test_names_for_people_and_for_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "some/my.py:Class(path='a/b:c', weight=2)"
    assert reward_trust.short(name) == "my.py:Class(path='a/b:c', weight=2)"
    assert reward_trust.absolute(name) == f"{tmp_path}/some/my.py:Class(path='a/b:c', weight=2)"
    assert len(reward_trust.short(f"my.py:Class({list(range(200))})")) < 80
    assert reward_trust.is_own(name) and not reward_trust.is_own("brightness(':')")
    assert reward_trust.short("brightness") == "brightness" and reward_trust.absolute("digit-3") == "digit-3"


def test_other_arguments_are_other_code_to_trust(mine, tmp_path, monkeypatch):
    """Who named `fails('mine')` has not named `fails('yours')`."""
    reward_trust.remember(reward_trust.code_of(f"{mine}:Weighted(weight=2)"))
    reward_trust.check_trust(f"{mine}:Weighted(weight=2)", tmp_path / "run")
    for other in ("Weighted(weight=3)", "Weighted", "Weighted()"):
        with pytest.raises(InvalidInputError, match="not named it on this machine"):
            reward_trust.check_trust(f"{mine}:{other}", tmp_path / "run")


UNSTEADY = """
import torch
from torch import nn
class Random:
    def __init__(self, share=0.5): self.share = share
    def __call__(self, x): return {"reward": nn.functional.dropout(x, self.share).flatten(1).mean(1, keepdim=True)}
def flat(x): return (x.flatten(1).mean(1) - 100).relu(), {}
class Mixing:
    def __call__(self, x):
        mean = x.flatten(1).mean(1)
        return mean - mean.mean().detach(), {"mean": mean}
"""


def test_what_is_uncertain_is_said_once_under_the_rewards_name(tmp_path, capsys):
    """By the model's build; the loops and evaluations of the run say it no more."""
    (tmp_path / "my.py").write_text(UNSTEADY)
    for name, said in (
        ("Random(share=0.25)", "is random: it gives the same samples"),
        ("flat", "is flat: the same value"),
    ):
        config = Config(reward=f"{tmp_path}/my.py:{name}", estimator="adjoint", num_steps=2, batch=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            built = setup.build(setup_spec(config))
            training.make_loop(training_spec(config), built)
            evaluate(built.chain, built.reward, Noise(0), starts=2)
        assert capsys.readouterr().out.count(f"reward    my.py:{name} {said}") == 1


def test_a_warning_of_a_reward_itself_stays_one(tmp_path, capsys):
    """Whatever its words are."""
    (tmp_path / "my.py").write_text(
        "import warnings\ndef slow(x):\n    warnings.warn('reward is slow')\n    return x.flatten(1).mean(1)"
    )
    with pytest.warns(UserWarning, match="reward is slow"):
        setup.build(setup_spec(Config(reward=f"{tmp_path}/my.py:slow", num_steps=2)))
    assert "is slow" not in capsys.readouterr().out


def test_a_reward_of_its_batch_is_refused_in_any_form(tmp_path):
    (tmp_path / "my.py").write_text(UNSTEADY)
    with pytest.raises(InvalidInputError, match="reward mixes samples"):
        setup.build(setup_spec(Config(reward=f"{tmp_path}/my.py:Mixing()", num_steps=2)))


def test_of_decoded_images_and_prompts_as_well():
    """R of states, as the chain of a model with prompts calls it: forms are read, and mixing is noticed, behind it."""
    given = Conditioning(Drawn("prompt", torch.arange(2)), (Prompt("dark"), Prompt("bright")))
    x, condition = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), {"prompt": torch.tensor([0, 1, 1, 0])}

    def reward(images, prompts):
        signs = torch.tensor([-1.0 if prompt == "dark" else 1.0 for prompt in prompts])
        return (signs * images.sum(1))[:, None], {"prompts": prompts}

    def relative(images, prompts):
        scores = reward(images, prompts)[0]
        return {"scores": scores - scores.mean(0).detach()}

    found = Reward(given.of_states(reward, lambda z: 2 * z)).finite_values(Particles(x, condition=condition))
    assert torch.equal(found, torch.tensor([-2.0, 2.0, 2.0, -2.0]) * x.sum(1))
    check(Reward(given.of_states(reward, torch.sin)), Particles(x, condition=condition))
    with pytest.raises(InvalidInputError, match="reward mixes samples"):
        check(Reward(given.of_states(relative, torch.sin)), Particles(x, condition=condition))
    with pytest.raises(InvalidInputError, match=r"its arguments are \(prompts, images\); exchange them"):
        given.of_states(lambda prompts, images: images.sum(1), None)


def test_every_reward_imports_what_lies_beside_it(tmp_path):
    """Though a helper of the same name was imported before, beside another reward, which keeps its own."""
    loaded = {}
    for weight, folder in ((2.0, tmp_path / "two"), (5.0, tmp_path / "five"), (2.0, tmp_path / "two")):
        folder.mkdir(exist_ok=True)
        (folder / "scale_beside.py").write_text(f"scale = {weight}\n")
        (folder / "package_beside").mkdir(exist_ok=True)
        (folder / "package_beside" / "__init__.py").write_text("from .inner import shift\n")
        (folder / "package_beside" / "inner.py").write_text(f"shift = {weight}\n")
        (folder / "my.py").write_text(
            "import package_beside, scale_beside\n"
            "def f(x): return scale_beside.scale * x.flatten(1).mean(1) + package_beside.shift\n"
        )
        reward = load_reward(f"{folder}/my.py:f")
        beside = [file.name for file in reward_trust.loaded_with(reward_trust.code_of(f"{folder}/my.py:f"))]
        assert beside == ["my.py", "__init__.py", "inner.py", "scale_beside.py"]  # what a run rests on
        loaded[weight] = reward
        assert [loaded[w](torch.ones(1, 1)).item() for w in loaded] == [2 * w for w in loaded]
