"""`sample --exact`: its draws against closed forms, and the command against the library on the same noise."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import finished
from implicit_diffusion.commands.finetune.finished import Tilt
from implicit_diffusion.commands.rewards import trust
from implicit_diffusion.commands.sample import exact
from implicit_diffusion.commands.sample.config import Config
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.evaluation import evaluate, metropolis, sequential_monte_carlo, tilted_law
from implicit_diffusion.models.chain_file import read_chain
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny, tuned
from tests.helpers.oracles import affine_chain, riccati, tilted_bound

REWARDS = """
import torch
def waves(x): return x.cos().flatten(1).sum(1) / 8
def large(x): return 1024 * waves(x)
def wide(x): return x.flatten(1).std(1)
def red(x, prompts): return x[:, 0].flatten(1).mean(1) + torch.tensor([float(len(words)) for words in prompts])
def label(x, labels): return labels.to(x.dtype) + 0 * x.flatten(1).sum(1)
def counted(x): return (x.cos() > 0).flatten(1).sum(1)
"""
SIZES = ["--num-steps", "3", "--batch", "2", "--updates", "2", "--starts", "4", "--lr", "1e-4", "--device", "cpu"]
BETA, NUM, M = 1.7, 6, 8
FEW = ("--num", "2", "--particles", "2")
WEIGHT = 0.7  # of the affine chain


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, rewards, and finished runs: of one reward, and of two."""
    home = tuned.home(tmp_path_factory.mktemp("home"), REWARDS)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        patched.setattr(Figure, "savefig", lambda figure, file, **options: Image.new("RGB", (1, 1)).save(file, "png"))
        for out, *rewards in (("one", "r.py:waves"), ("both", "r.py:waves", "r.py:wide=-0.5")):
            named = [word for reward in rewards for word in ("--reward", reward)]
            assert main(["finetune", "--model", "model", *named, *SIZES, "--kl-weight", str(BETA), "--out", out]) == 0
    return home


@pytest.fixture(autouse=True)
def inside(home, monkeypatch, as_users_run):
    monkeypatch.chdir(home)


def sample(out, *more, model="one/model", num=NUM, particles=M):
    words = ["sample", "--exact", "--model", str(model), "--num", str(num), "--particles", str(particles)]
    return main([*words, "--device", "cpu", "--out", str(out), *more])


def numbers(out):
    return json.loads(Path(out).with_suffix(".json").read_text())


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["sample", "--exact", "--device", "cpu", *map(str, words)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def chain_of(model, pretrained):
    """The chain of a run, put together by hand, with convolutions in the memory format in which the command has them:
    in another one they round otherwise, which shows in the small difference of two networks.
    """
    loaded, original = load_pretrained(model), load_pretrained(pretrained)
    for each in (loaded, original):
        torch.nn.utils.convert_conv2d_weight_memory_format(each.denoiser, torch.channels_last)
    table = read_chain(Path(model)).table
    return Chain(loaded.denoiser, table, loaded.event_shape, reference=original.denoiser, pretrained_rows="noiseless")


def waves(x):
    return x.cos().flatten(1).sum(1) / 8


# Against closed forms, on a linear Gaussian chain that is driven as the command drives one.


def affine(control):
    chain, reward = affine_chain(4, 2)
    if control:
        _, gain, shift = riccati(chain, reward, 1.4 * WEIGHT)
        chain = chain.replace(denoiser=type(chain.denoiser)(gain, shift), reference=chain.reference)
    setup = SimpleNamespace(chain=chain, reward=Reward(reward), conditioning=Conditioning())
    return Tilt(setup, WEIGHT, None), reward


@pytest.mark.parametrize(("draw", "num"), [(exact._by_metropolis, 1500), (exact._by_populations, 400)])
@pytest.mark.parametrize("control", [False, True])
def test_draws_and_numbers_are_those_of_the_tilted_law(draw, num, control, monkeypatch):
    monkeypatch.setattr("implicit_diffusion.commands.sample.exact.STATES", 2 * 64 * 150)  # three groups of populations
    tilt, reward = affine(control)
    shown, done, particles = [], [], 32
    drawn = draw(tilt, num, particles, Noise(0), shown.append, done.append)
    x = torch.cat(shown)
    assert x.shape == (num, 2) and sum(done) == num * particles * tilt.setup.chain.num_steps

    def log_z(beta):
        return -tilted_bound(tilt.setup.chain, reward, beta)[0] / beta

    step = 1e-4
    mean_reward = (log_z(1 / (1 / WEIGHT + step)) - log_z(1 / (1 / WEIGHT - step))) / (2 * step)  # d log Z / d(1/β)
    law, bias = drawn.law, 3 / particles
    assert abs(law.log_normaliser.mean - log_z(WEIGHT)) < 4 * law.log_normaliser.error + bias
    assert abs(law.reward.mean - mean_reward) < 4 * law.reward.error + bias
    assert abs(law.path_kl.mean - (mean_reward / WEIGHT - log_z(WEIGHT))) < 4 * law.path_kl.error + bias
    assert 4 * max(law.log_normaliser.error, law.reward.error) < 0.35 and 4 * law.path_kl.error < 0.15
    r = reward(x)
    assert abs(r.mean() - mean_reward) < 4 * r.std() / num**0.5 + bias
    first, steps = x[:, 0].numpy(), affine_moments(tilt.setup.chain, reward)
    assert stats.kstest(first, stats.norm(*steps).cdf).pvalue > 1e-4
    assert law.trusted is control or draw is exact._by_populations
    assert 0.3 < law.effective_share < 1 and (drawn.acceptance is None) == (draw is exact._by_populations)


def affine_moments(chain, reward):
    """Mean and standard deviation of the first coordinate of x_N under the tilted law given x_0."""
    ref, tab = chain.reference, chain.table
    g, h, v = 1.0, 0.0, 0.0
    for k in range(len(tab)):
        alpha = (tab.a[k] + tab.b[k] * tab.m[k] * ref.gain[k, 0].detach()).item()
        g, h, v = alpha * g, alpha * h + (tab.b[k] * ref.shift[k, 0].detach()).item(), alpha**2 * v + tab.s[k] ** 2
    p, q = reward.p[0].item() / WEIGHT, reward.q[0].item() / WEIGHT
    stretch = 1 + q * float(v)
    return (h + p * float(v)) / stretch, (float(v) / stretch + (g * tab.initial_std / stretch) ** 2) ** 0.5


# The command against the library.


def test_the_command_draws_what_the_library_draws(home, capsys):
    """Proposals of the trained chain, u_0 from the run's own model, R and β of the run."""
    assert sample("one.png") == 0
    said, written = capsys.readouterr().out, numbers("one.png")
    chain = chain_of("one/model", "model")
    draws = metropolis(chain, waves, BETA, Noise(0).stream(exact.EXACT, 1, 0), draws=NUM, steps=M)
    law = tilted_law(draws.proposals, BETA)
    assert float(draws.proposals.log_ratio.abs().mean()) > 0.005  # the training has moved it
    for name in ("reward", "path_kl", "log_normaliser"):
        estimates = [written.pop(name), written.pop(f"{name}_se")]
        assert estimates == pytest.approx([*getattr(law, name)], rel=1e-4, abs=1e-5)
    assert written == {
        "method": "metropolis",
        "particles": M,
        "kl_weight": BETA,
        "effective_share": pytest.approx(law.effective_share, rel=1e-4),
        "trusted": law.trusted,
        "acceptance": draws.acceptance,
    }
    assert f"effective share {law.effective_share:.2g}, accepted {draws.acceptance:.2f}, reward" in said
    assert said.splitlines()[-2:] == ["one.json", "one.png"]
    grid = np.asarray(Image.open("one.png"))[::8, ::8]
    x = ((draws.x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    expected = x.unflatten(0, (2, 3)).permute(0, 3, 1, 4, 2).reshape(16, 24, 3)
    assert np.abs(grid.astype(int) - expected.numpy().astype(int)).max() <= 1  # the layout of the memory rounds


@pytest.mark.slow
def test_populations_are_those_of_the_library():
    assert sample("smc.png", "--method", "smc") == 0
    noise = Noise(0).stream(exact.EXACT, 1, 0)
    made = sequential_monte_carlo(chain_of("one/model", "model"), waves, BETA, noise, particles=M, populations=NUM)
    written = numbers("smc.png")
    assert written["acceptance"] is None and written["method"] == "smc"
    assert written["reward"] == pytest.approx(made.law.reward.mean, rel=1e-4)
    assert written["log_normaliser"] == pytest.approx(made.log_normaliser.mean().item(), rel=1e-4)
    assert written["effective_share"] == pytest.approx(made.law.effective_share, rel=1e-4)


@pytest.mark.slow
def test_a_seed_decides_all_bits():
    for out, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4")):
        assert sample(out, "--seed", seed) == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c and numbers("a.png") == numbers("b.png") != numbers("c.png")


@pytest.mark.slow
def test_a_run_and_its_pretrained_model_have_one_law():
    """Trained and pretrained proposals, and averages of pretrained trajectories, agree within their errors."""
    num, particles, steer = 50, 16, ("--reward", "r.py:waves", "--kl-weight", str(BETA), "--num-steps", "3")
    assert sample("trained.png", num=num, particles=particles) == 0
    assert sample("steered.png", *steer, "--seed", "1", model="model", num=num, particles=particles) == 0
    pretrained = chain_of("one/model", "model").pretrained()
    evaluation = evaluate(pretrained, waves, Noise(5), starts=60, repeats=64)
    law = tilted_law(evaluation, BETA)
    spread = evaluation.reward.std(1).mean().item()
    assert law.reward.mean - evaluation.reward.mean().item() > 0.5 * spread and law.path_kl.mean > 0.15
    for out in ("trained.png", "steered.png"):
        written = numbers(out)
        for name, unit in (("reward", spread), ("path_kl", 1.0), ("log_normaliser", 1.0)):
            expected = getattr(law, name)
            error = (written[f"{name}_se"] ** 2 + expected.error**2) ** 0.5
            bias = unit / written["effective_share"] / particles
            assert abs(written[name] - expected.mean) < 4 * error + bias, (out, name)


@pytest.mark.slow
def test_labels_are_taken_in_turn_and_keep_their_law():
    """However much R prefers one label, each has its third of the images."""
    steer = ("--reward", "r.py:label", "--kl-weight", "0.01", "--num-steps", "3")
    for method in ("metropolis", "smc"):
        out = f"{method}-classes.png"
        assert sample(out, *steer, "--method", method, model="classes", num=6, particles=2) == 0
        assert numbers(out)["reward"] == pytest.approx(1.0, abs=1e-9)
        assert numbers(out)["path_kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", ["metropolis", "smc"])
def test_several_rewards_mean_what_they_meant_in_the_run(method, capsys):
    assert sample(f"both-{method}.png", "--method", method, model="both/model") == 0
    written, in_run = numbers(f"both-{method}.png"), tuned.summary_of("both")["rewards"]
    assert [each["name"] for each in written["rewards"]] == ["r.py:waves", "r.py:wide"]
    total = sum(run["weight"] * each["reward"] / run["deviation"] for each, run in zip(written["rewards"], in_run))
    assert written["reward"] == pytest.approx(total, rel=1e-5)
    assert "reward    r.py:wide" in capsys.readouterr().out


def test_units_of_several_rewards_do_not_matter_without_a_run(monkeypatch):
    monkeypatch.setattr(finished, "STARTS", 4)
    for out, name in (("waves.png", "waves"), ("large.png", "large")):
        steer = ("--reward", f"r.py:{name}", "--reward", "r.py:wide=-0.5", "--kl-weight", "1", "--num-steps", "3")
        assert sample(out, *steer, model="model") == 0
    ours, theirs = numbers("waves.png"), numbers("large.png")
    assert Path("waves.png").read_bytes() == Path("large.png").read_bytes() and ours["reward"] == theirs["reward"]
    assert theirs["rewards"][0]["reward"] == pytest.approx(1024 * ours["rewards"][0]["reward"])


def test_a_black_box_steers_and_one_image_has_no_error():
    steer = ("--reward", "r.py:counted", "--kl-weight", "2", "--num-steps", "3")
    assert sample("box.png", *steer, model="model", num=1) == 0
    assert numbers("box.png")["reward_se"] is None and numbers("box.png")["path_kl"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["metropolis", "smc"])
def test_network_and_reward_see_no_more_at_once_for_more_particles(method, monkeypatch):
    monkeypatch.setattr("implicit_diffusion.evaluation.chains.NUMBERS", 8 * 192)
    monkeypatch.setattr(exact, "STATES", 3 * 20 * 192)  # three populations of particles
    moved, transition, called = [], Chain.transition, Reward.called

    def counted(chain, x, rows, **options):
        moved.append(x.shape[0] * x.shape[1])
        return transition(chain, x, rows, **options)

    def scored(reward, particles):
        moved.append(len(particles.x))
        return called(reward, particles)

    monkeypatch.setattr(Chain, "transition", counted)
    monkeypatch.setattr(Reward, "called", scored)
    assert sample(f"many-{method}.png", "--method", method, num=10, particles=20) == 0
    assert max(moved) == 8 and moved.count(8) > 20


def test_clipping_is_switched_off_where_a_model_is_steered(tmp_path, capsys):
    model = shutil.copytree("model", tmp_path / "clipped")
    edit(model / "scheduler/scheduler_config.json", clip_sample=True)
    steer = ("--reward", "r.py:waves", "--kl-weight", "1.7", "--num-steps", "3")
    assert sample(tmp_path / "a.png", *steer, model=model) == sample(tmp_path / "b.png", *steer, model="model") == 0
    assert "clip_sample of the model's scheduler is switched off" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


KINDS = {
    "adapters": "--model classes --reward r.py:waves --lora-rank 2",
    "guidance": "--model classes --reward r.py:waves --null-class 1 --guidance 2",
    "prompts": "--model sd/model --reward r.py:red --prompts prompts.txt",
    "flow": "--model sd3/model --reward r.py:red --prompts prompts.txt",
    "trained twice": "--model one/model --reference model --reward r.py:waves",
    "ddim": "--model model --reward r.py:waves --scheduler ddim --eta 0.5",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["metropolis", "smc"])
def test_runs_of_every_kind(kind, method, home, tmp_path, monkeypatch, capsys):
    for name, build in (("sd", tiny.stable_diffusion), ("sd3", tiny.stable_diffusion_3)):
        if not (home / name).exists():
            build(home / name)
    (home / "prompts.txt").write_text("a cat\nred dog\n")
    run = tmp_path / "run"
    words = KINDS[kind].split()
    assert main(["finetune", *words, *SIZES, "--kl-weight", str(BETA), "--out", str(run)]) == 0
    (home / "prompts.txt").unlink()  # the run has its own copy
    assert sample(tmp_path / "grid.png", "--method", method, model=run / "model", num=4, particles=3) == 0
    written = numbers(tmp_path / "grid.png")
    assert written["effective_share"] > 1 / 3 and np.isfinite(written["path_kl"])
    assert Image.open(tmp_path / "grid.png").size[0] >= 64


# What is refused, or not to be trusted.


def test_what_is_not_to_be_trusted_says_so_and_what_to_do(capsys):
    assert sample("few.png", "--kl-weight", "0.05", particles=16) == 0
    said = capsys.readouterr().out
    assert numbers("few.png")["trusted"] is False
    assert "not to be trusted: of 16 trajectories for an image about" in said
    for way in ("use --particles", "--method smc", f"a --kl-weight nearer to the {BETA:g} of the run"):
        assert way in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "one/model", "--kl-weight", "0.001", "--particles", "64"), "hardly more than one would count"),
        (("--model", "one/model", "--kl-weight", "1e-310", "--method", "smc", *FEW), "beta = 1e-310 is too small"),
        (("--model", "one/model", "--num-steps", "4"), "--num-steps 4 is another chain than the 3 steps"),
        (("--model", "one/model", "--particles", "1"), "--particles must be an integer ≥ 2"),
        (("--model", "one/model", "--kl-weight", "0"), "--kl-weight must be positive"),
        (("--model", "one/model", "--reward", "r.py:wide"), "says which reward its model was trained for"),
        (("--model", "one/model", "--method", "magic"), "--method takes metropolis or smc"),
        (("--model", "model", "--kl-weight", "1"), "--exact needs --reward"),
        (("--model", "model", "--reward", "r.py:waves"), "--exact needs --kl-weight"),
        (("--model", "model"), "--exact needs --reward and --kl-weight"),
        (("--model", "model", "--kl-weight", "1", "--reward", "r.py:nothing"), "has no function 'nothing'"),
        (("--model", "model", "--kl-weight", "1", "--reward", "r.py:label"), "come without a condition"),
        (("--model", "one/model", "--prompts", "r.py"), "has no text encoder"),
    ],
)
def test_bad_input_is_refused_before_long_work(words, message, monkeypatch, capsys):
    monkeypatch.setattr("implicit_diffusion.commands.sample.exact.metropolis", lambda *a, **k: pytest.fail("drawn"))
    assert message in refused(capsys, *words, "--out", "refused.png")
    assert not Path("refused.png").exists() and not Path("refused.json").exists()


def test_options_of_exact_need_it(capsys):
    assert main(["sample", "--model", "one/model", "--kl-weight", "1"]) == 2
    assert "--kl-weight is for --exact" in capsys.readouterr().err


def test_numbers_that_are_there_are_not_overwritten(capsys):
    Path("there.json").touch()
    assert "there.json, the numbers beside it, exists" in refused(capsys, "--model", "one/model", "--out", "there.png")


@pytest.fixture
def copied(home, tmp_path):
    """A copy of the run, with a model and a reward of its own, to be spoilt."""
    shutil.copytree(home / "model", tmp_path / "model")
    return shutil.copytree(home / "one", tmp_path / "one")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def gone(run, home):
    (run / "config.json").unlink()


def of_another_command(run, home):
    edit(run / "config.json", command="pretrain")


def unfinished(run, home):
    (run / "summary.json").unlink()


def without_reference(run, home):
    edit(run / "config.json", model=str(run.parent / "nowhere"))


def another_reference(run, home):
    shutil.copytree(home / "classes", run.parent / "private")
    edit(run / "config.json", model=str(run.parent / "private"))


def another_table(run, home):
    chain = json.loads((run / "model/chain.json").read_text())
    chain["table"]["s"][0] *= 1.5
    (run / "model/chain.json").write_text(json.dumps(chain))


def another_scheduler(run, home):
    edit(run / "config.json", scheduler="ddim", eta=0.5)


def of_the_drift(run, home):
    edit(run / "config.json", penalty="drift")


def of_no_weight(run, home):
    edit(run / "summary.json", kl_weight=0.0)


def linked_outside(run, home):
    (run / "summary.json").unlink()
    (run / "summary.json").symlink_to(home / "one/summary.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gone, "the run that did it is not around it"),
        (of_another_command, "is not a run of `finetune`"),
        (unfinished, "is not finished"),
        (without_reference, "nowhere is gone; put it back"),
        (another_reference, "depends on what has changed since it began: model"),
        (another_table, "they are different chains"),
        (another_scheduler, "they are different chains"),
        (of_the_drift, "trained with --penalty drift"),
        (of_no_weight, "was trained with --kl-weight 0"),
        (linked_outside, "outside"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(spoil, message, copied, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("implicit_diffusion.commands.sample.exact.metropolis", lambda *a, **k: pytest.fail("drawn"))
    spoil(copied, home)
    assert message in refused(capsys, "--model", copied / "model", "--out", tmp_path / "refused.png")


def test_rows_without_noise_have_no_weights_where_they_were_trained(copied, tmp_path, capsys):
    of_the_drift(copied, None)
    said = refused(capsys, "--model", copied / "model", "--kl-weight", "1", "--out", tmp_path / "refused.png")
    assert "row 2 of" in said and "adds no noise" in said


def test_a_reward_of_a_run_runs_only_if_its_user_has_named_it(copied, home, tmp_path, monkeypatch, capsys):
    """As in `resume`: in a place of one's own, as it was, and named before; or by --trust-reward."""
    marked = tmp_path / "marked"
    (tmp_path / "r.py").write_text(f"from pathlib import Path\nPath({str(marked)!r}).touch()\n{REWARDS}")
    edit(copied / "config.json", reward=[f"{tmp_path}/r.py:waves"])
    words = ("--model", copied / "model", "--num", "2", "--particles", "2", "--out", tmp_path / "x.png")
    said = refused(capsys, *words)
    assert "you have not named it on this machine before" in said and "--trust-reward" in said and not marked.exists()
    (copied / "r.py").write_text(REWARDS)
    edit(copied / "config.json", reward=[f"{copied}/r.py:waves"])
    assert "lies inside the run directory" in refused(capsys, *words)
    edit(copied / "config.json", reward=[f"{home}/r.py:waves"])
    monkeypatch.setattr(trust, "_named", set())
    monkeypatch.setattr(trust, "_known", lambda place: {"another digest"})
    assert "has changed since you named it" in refused(capsys, *words)
    edit(copied / "config.json", reward=[f"{tmp_path}/r.py:waves"])
    assert main(["sample", "--exact", "--device", "cpu", *map(str, words), "--trust-reward"]) == 0
    assert marked.exists()


def test_an_energy_model_has_no_chain(tmp_path, capsys):
    model = tmp_path / "energy"
    model.mkdir()
    (model / "energy.json").write_text("{}")
    config = Config(model=str(model), exact=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("implicit_diffusion.commands.sample.config.is_energy_model", lambda model: True)
        with pytest.raises(ValueError, match="is an energy-based model"):
            config.check()
