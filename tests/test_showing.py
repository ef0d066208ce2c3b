"""`print` of every public object: a line or a few, without an address and without the numbers of a tensor."""

import ast
import re
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion import showing
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.pretrain.images.loading import Images
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.compiled import Compiled
from implicit_diffusion.digits import Digits
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.evaluation.each_reward import RewardPlan
from implicit_diffusion.evaluation.stored import Stored
from implicit_diffusion.gradients import Gibbs, TruncatedBackprop
from implicit_diffusion.gradients.fused import fused_pass
from implicit_diffusion.models.checkpoints import find_checkpoint
from implicit_diffusion.models.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.models.lattice import find_lattice
from implicit_diffusion.objectives import Density, FirstVariation, GibbsObjective, RunningCost, TerminalObjective
from implicit_diffusion.potentials import energy_of
from implicit_diffusion.potentials.plane import law
from implicit_diffusion.runs import AdaptKL, Progress, Rise, RunDirectory, Stop, StopAtKL
from implicit_diffusion.runs.callbacks.adapt import AdaptStep
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.watch import Runaway, Watch
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.samplers import Kernel, State
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles import table
from tests.helpers.potentials import NormalNormal

SOURCE = Path(idf.__file__).parent
HELD = r"\b(Tensor|ndarray|Callable|Say|nn\.Module|Float)\b"  # annotations of fields
NOISE = idf.Noise(0)
DATA = NOISE.normal((40, 2), 1)
LONG = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))  # its own repr has a line for each


def reward(x):
    return x[:, 0]


def scaled(x, factor):
    return factor * x[:, 0]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = LONG

    def forward(self, x, t, **condition):
        return self.layers(x)


class White(TerminalObjective):
    name = "white"

    def value(self, particles):
        return particles.x.square().mean()


class Charged(GibbsObjective):
    name = "charged"

    def first_variation(self, particles, density):
        return FirstVariation(particles.x[:, 0])


class Effort(RunningCost):
    name = "effort"

    def cost(self, transition):
        return transition.u.square().flatten(2).sum(2)


class Stays(Kernel):
    def move(self, step):
        raise NotImplementedError


def mixture():
    return idf.GaussianMixture(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def chain(**options):
    net = idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2), 0.5)
    return idf.Chain(net, idf.tables.ou_reverse_sde(4, 2.0), (2,), **options)


def on_chain(kind):
    c = chain()
    loop = kind(c, idf.Reward(reward) + 0.5 * idf.PathKL(), sgd(c.denoiser), batch=3, noise=NOISE)
    loop.step()
    return loop


def on_particles(kind, **options):
    v = mixture()
    loop = kind(v, idf.ULA(0.1), idf.Reward(reward), sgd(v), particles=100, noise=NOISE, **options)
    loop.step()
    return loop


def score_matching():
    v = mixture()
    return idf.loops.ScoreMatching(v, DATA, sgd(v), noise_std=0.5, noise=NOISE)


@cache
def digits():
    return idf.load_pretrained("digits")


def evaluation():
    return idf.evaluate(chain(), reward, NOISE, starts=32, repeats=4)


def weighted():
    return on_particles(idf.Single, weighted=True, min_ess=0.3)


def watched():
    fit(on_chain(idf.Queue), 4, callbacks=[watch := Runaway(1.0)])
    return watch


def energy_model():
    kind, lattice = Architecture("mlp", (2,), 8), find_lattice(torch.arange(40.0).reshape(20, 2))
    moves = Moves("hmc", 0.06)
    return EnergyModel(kind, kind.build(NOISE), DATA[0], DATA[0].exp(), moves, DATA, 1.837, 0.013, lattice)


def experiment():
    return idf.design.GaussianExperiment(LONG, idf.GaussianMixture(torch.zeros(1, 2)), 0.5)


EXAMPLES = {
    "Experiment": experiment,
    "GaussianExperiment": experiment,
    "Gain": lambda: idf.design.information_gain(experiment(), NOISE, outcomes=9, contrasts=3),
    "InformationGain": lambda: idf.design.InformationGain(experiment()),
    "Pairs": lambda: experiment().pairs(NOISE.normal((5, 6))),
    "Pool": lambda: idf.design.Pool(2, 3),
    "PooledInformationGain": lambda: idf.design.PooledInformationGain(experiment(), idf.design.Pool(2, 3)),
    "PosteriorKernel": lambda: idf.design.PosteriorKernel(idf.MALA(0.1), experiment()),
    "HMC": lambda: idf.HMC(0.1),
    "MALA": lambda: idf.MALA(0.1),
    "ULA": lambda: idf.ULA(idf.samplers.power_law(0.5, 1 / 3)),
    "Underdamped": lambda: idf.samplers.Underdamped(0.1),
    "Kernel": lambda: Stays(0.1),
    "MetropolisKernel": lambda: idf.HMC(0.1),
    "State": lambda: next(simulate(idf.ULA(0.1), mixture(), DATA, NOISE, 1))[0],
    "Info": lambda: next(simulate(idf.MALA(0.1), mixture(), DATA, NOISE, 1))[1],
    "Step": lambda: idf.ULA(0.1).prepare(mixture(), State(DATA), NOISE.generator()),
    "MMD": lambda: idf.MMD(DATA),
    "Sinkhorn": lambda: idf.objectives.Sinkhorn(DATA, 0.5),
    "ForwardKL": lambda: idf.ForwardKL(DATA, 8),
    "ReverseKL": lambda: idf.ReverseKL.to_initial(mixture()),
    "Evidence": idf.objectives.Evidence,
    "Functional": lambda: idf.objectives.Functional(lambda x, w: w @ x[:, 0]),
    "Reward": lambda: idf.Reward(partial(scaled, factor=2.0)),
    "Scorer": lambda: idf.objectives.Scorer("mine.py", "f", code=b"def f(x): return x", timeout=60.0),
    "WeightedRewards": lambda: idf.objectives.WeightedRewards({"a": reward, "b": reward}, (1.0, -0.5)),
    "PathKL": idf.PathKL,
    "DriftPenalty": idf.objectives.DriftPenalty,
    "Objective": lambda: idf.Reward(reward) + 0.5 * idf.PathKL(),
    "TerminalObjective": White,
    "GibbsObjective": Charged,
    "RunningCost": Effort,
    "Sum": lambda: idf.Reward(reward) + 0.5 * idf.PathKL(),
    "Term": White,
    "Density": lambda: Density(DATA[:, 0]),
    "FirstVariation": lambda: FirstVariation(DATA[:, 0]),
    "Gibbs": Gibbs,
    "AdjointSolver": Gibbs,
    "AdjointMeasure": lambda: Gibbs()(FirstVariation(DATA[:, 0]), idf.Particles(DATA)),
    "Adjoint": idf.gradients.Adjoint,
    "AdjointMatching": idf.gradients.AdjointMatching,
    "FullBackprop": idf.gradients.FullBackprop,
    "Estimator": idf.gradients.FullBackprop,
    "RowEstimator": idf.gradients.Adjoint,
    "ScoreFunction": idf.gradients.ScoreFunction,
    "Surrogate": idf.gradients.Surrogate,
    "TruncatedBackprop": lambda: TruncatedBackprop(3, random=True),
    "RowStates": lambda: idf.gradients.RowStates(DATA[None], [0], [0], NOISE),
    "Pulled": lambda: idf.gradients.Pulled({"adjoint": DATA[None]}, {}, 64),
    "TrajectoryResult": lambda: idf.gradients.TrajectoryResult({"reward": torch.tensor(0.5)}, 64),
    "Footprint": lambda: idf.gradients.Footprint(carry=16, turn=32, pull=64),
    "Timetable": lambda: on_chain(idf.Queue).timetable,
    "Fused": lambda: fused_pass(v := mixture(), list(v.parameters()), [(1.0, Charged())], DATA, [None]),
    "Energy": lambda: energy_of(mixture(), DATA),
    "GaussianMixture": mixture,
    "Guided": lambda: idf.potentials.Guided(mixture(), reward, 0.5),
    "Tilted": lambda: idf.potentials.Tilted(LONG, (2,)),
    "Posterior": lambda: idf.potentials.Posterior(NormalNormal(), DATA[:24]).tempered(0.5),
    "InnerProblem": lambda: idf.potentials.MeanField(LONG, torch.cdist),
    "MeanField": lambda: idf.potentials.MeanField(LONG, torch.cdist, 0.5),
    "ConjugateGradients": lambda: idf.gradients.ConjugateGradients(
        idf.potentials.MeanField(LONG, torch.cdist).coupling
    ),
    "GaussianDenoiser": lambda: chain().denoiser,
    "DiffusersDenoiser": lambda: digits().denoiser,
    "ClassifierFree": lambda: idf.denoisers.ClassifierFree(Denoiser(), 2.0, {"class_labels": 3}),
    "Embedded": lambda: idf.denoisers.Embedded(Denoiser(), {"embeddings": torch.zeros(5, 7, 16)}),
    "WithoutAdapter": lambda: idf.denoisers.WithoutAdapter(Denoiser()),
    "Drawn": lambda: idf.denoisers.Drawn("class_labels", torch.arange(10)),
    "Pretrained": digits,
    "DiffusionModel": lambda: idf.DiffusionModel(
        idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2), 0.5), table(20), (2,)
    ),
    "ProbedPipeline": lambda: idf.read_pipeline(digits().pipeline, 2, sampler="ddpm"),
    "CutPrompt": lambda: idf.models.CutPrompt(3, "tokenizer_2", 300, 255, "in the style of nobody"),
    "ChainTable": lambda: table(20),
    "Chain": lambda: idf.Chain(Denoiser(), table(20), (2,), pretrained_rows=range(9)),
    "Evaluation": evaluation,
    "Bound": lambda: idf.evaluation.bound(evaluation(), 0.5),
    "Reweighted": lambda: idf.evaluation.reweighted(evaluation(), evaluation(), 0.5),
    "TiltedLaw": lambda: idf.evaluation.tilted_law(evaluation(), 0.5),
    "Draws": lambda: idf.evaluation.metropolis(chain(), reward, 0.5, NOISE, draws=4, steps=8),
    "Steered": lambda: idf.evaluation.sequential_monte_carlo(chain(), reward, 0.5, NOISE, particles=8, populations=4),
    "Particles": lambda: weighted().particles,
    "Replicas": lambda: idf.samplers.annealed(
        idf.potentials.Tilted(idf.potentials.mlp(2, NOISE), (2,)).tempered, idf.ULA(0.1), 32, NOISE, steps=2
    ),
    "Noise": lambda: NOISE.stream(1),
    "Update": lambda: on_chain(idf.Queue).update,
    "Queue": lambda: on_chain(idf.Queue),
    "Nested": lambda: on_chain(idf.Nested),
    "Single": weighted,
    "ScoreMatching": score_matching,
    "NestedParticles": lambda: on_particles(idf.loops.NestedParticles, inner_steps=2),
    "Unrolled": lambda: on_particles(idf.loops.Unrolled, unrolled_steps=2),
    "Vectorized": lambda: idf.loops.Vectorized([on_particles(idf.Single) for _ in range(2)]),
    "Progress": lambda: Progress(10, "fine-tuning"),
    "RunDirectory": lambda: RunDirectory("runs/sharp"),
    "Stop": Stop,
    # What public functions return and public objects hold:
    "WeightedState": lambda: weighted().weighted_state,
    "Slot": lambda: on_chain(idf.Queue).slots[0],
    "Memory": lambda: idf.loops.predict_memory(on_chain(idf.Queue)),
    "Compiled": lambda: Compiled(reward),
    "Checkpoint": lambda: find_checkpoint("digits"),
    "Transition": lambda: chain().transition(torch.zeros(1, 3, 2), [0], reference=True),
    "Fit": lambda: fit(on_chain(idf.Queue), 2),
    "HeldOut": lambda: HeldOut(reward, NOISE),
    "Rise": lambda: Rise(HeldOut(reward, NOISE)),
    "StopAtKL": lambda: StopAtKL(0.5, held_out=HeldOut(reward, NOISE)),
    "AdaptKL": lambda: AdaptKL(0.5),
    "Watch": lambda: Watch(DATA),
    "Runaway": watched,
    "AdaptStep": AdaptStep,
    "Law": lambda: law("moons"),
    "Lattice": lambda: find_lattice(torch.arange(40.0).reshape(20, 2)),
    "EnergyModel": energy_model,
    "Data": lambda: Data(DATA, DATA, DATA[0], DATA[0], law("moons")),
    "Plan": lambda: idf.make_plan(evaluation()),
    "PlanRow": lambda: idf.make_plan(evaluation()).rows()[0],
    "Estimate": lambda: idf.evaluation.mean_and_error(evaluation().reward),
    "Judgement": lambda: idf.evaluation.judge(*[evaluation()] * 3, 0.5),
    "Untrained": lambda: idf.evaluation.judge(*[evaluation()] * 3, 0.5, evaluation()).untrained,
    "RewardPlan": lambda: RewardPlan(1 / 3, 0.01, 2 / 3, (0.1, 0.2), (0.01, 0.02)),
    "RewardJudgement": lambda: idf.evaluation.judge_rewards(*[evaluation()] * 3, 0.5)[0],
    "ClippingEffect": lambda: ClippingEffect(1 / 3, 2 / 3, 30.1234567, 29.7654321),
    "Stored": lambda: Stored(Path("plan"), {"--seed": "0"}, 4),
    "Conditioning": lambda: Conditioning(table={"embeddings": torch.zeros(5, 7, 16)}),
    "Images": lambda: Images(torch.zeros(9, 1, 8, 8), torch.zeros(3, 1, 8, 8), "zeros"),
    "Digits": lambda: Digits(*(torch.zeros(9, 1, 8, 8), torch.zeros(9, dtype=torch.long)) * 2),
}


def public_classes():
    namespaces = [value for name in idf.__all__ if isinstance(value := getattr(idf, name), ModuleType)]
    public = {name: getattr(module, name) for module in (idf, *namespaces) for name in module.__all__}
    return {name: kind for name, kind in public.items() if isinstance(kind, type) and not issubclass(kind, Exception)}


def test_every_public_class_has_an_example():
    assert public_classes().keys() <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_prints_in_short(name):
    example = EXAMPLES[name]()
    kind = public_classes().get(name)
    assert kind is None or isinstance(example, kind)
    for text in (repr(example), str(example)):
        lines = text.replace(str(SOURCE), "").splitlines()  # wherever the library lies
        assert len(lines) <= (7 if isinstance(example, idf.loops.base.Loop) else 1)
        assert all(len(line) <= 250 for line in lines)
        assert not re.search(r"0x[0-9a-f]{4}|tensor\(|<(?!lambda>)", text)
    if name not in ("Objective", "Sum"):  # a sum of terms is the formula
        assert repr(example).startswith(type(example).__name__ + "(")


def test_no_dataclass_prints_its_tensors_or_functions():
    """Such fields need `Shown`: a generated repr would print all numbers, or an address."""
    generated = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "Shown" not in map(ast.unparse, node.bases):
                made = [ast.unparse(decorator) for decorator in node.decorator_list]
                fields = [ast.unparse(part.annotation) for part in node.body if isinstance(part, ast.AnnAssign)]
                if any(text.startswith("dataclass") for text in made) and not node.name.startswith("_"):
                    generated += [f"{file.name}: {node.name}"] * bool(re.search(HELD, " ".join(fields)))
    assert not generated


def test_what_a_callback_remembers_is_no_news():
    """Fields that a dataclass keeps out of its repr are kept out of ours; of a reward, that it was checked."""
    assert repr(Rise(HeldOut(reward, NOISE))).endswith("starts=128, shown=0), patience=3)")
    assert repr(weighted().objective.as_checked()) == "Reward(function=reward, name='reward')"


SAID = {
    "ULA": "ULA(step_size=power_law(0.5, 0.333))",
    "HMC": "leapfrogs=5",
    "Objective": "1·reward + 0.5·path_kl",
    "Reward": "function=scaled",
    "Scorer": "Scorer(mine.py:f, python=",
    "WeightedRewards": "1·a + -0.5·b",
    "Sinkhorn": "data=(40, 2) float32, epsilon=0.5",
    "MMD": "kernel=gaussian_kernel(",
    "ReverseKL": "potential=GaussianMixture(2 modes in 2 dimensions, std=1)",
    "Tilted": "Sequential of 300 parameters, event_shape=(2,)",
    "Posterior": "Posterior(NormalNormal of 2 parameters, data=(24, 2) float32, power=0.5)",
    "DiffusersDenoiser": "UNet2DModel of 357,625 parameters",
    "Pretrained": "event_shape=(1, 8, 8)",
    "DiffusionModel": "GaussianDenoiser of 2 parameters, schedule='test table'",
    "ProbedPipeline": "DDPM, 2 steps",
    "CutPrompt": "tokenizer_2, 255 of 300 tokens, cut='in the style of nobody'",
    "Chain": "pretrained_rows=(0, 1, 2, 3, … 9 in all)",
    "Queue": "batch=3, updates=0, iterations=1, batches in flight=1",
    "Single": "100 particles (2,) float32, weighted, updates=1, iterations=1, min_ess=0.3",
    "Update": "SGD, lr=0.1, updates=0",
    "Fit": "Fit(Queue, updates=2, seconds=",
    "RunDirectory": "RunDirectory(path=runs/sharp)",
    "Noise": "Noise(seed=0, prefix=(1,))",
    "Gain": "nats, 9 outcomes × 3 contrasts)",
    "PosteriorKernel": "PosteriorKernel(MALA(step_size=0.1), renewal=0.1)",
    "Stored": "Stored(folder=plan, depends_on={'--seed': '0'}, starts=4",
    "ClippingEffect": "ClippingEffect(mean_absolute_change=0.3333, largest_change=0.6667",
    "Watch": "Watch(data=(40, 2) float32, every=20, patience=2, bad=0",
    "EnergyModel": "40 particles, log_z=1.84 ± 0.01, of dequantised data)",
}


@pytest.mark.parametrize("name", SAID)
def test_it_says_what_matters(name):
    assert SAID[name] in repr(EXAMPLES[name]())


def test_an_evaluation_shows_its_means_with_their_errors():
    values = torch.tensor([[1.0], [2.0], [3.0], [6.0]])  # mean 3, variance 14/3: an error of √(14/12) = 1.08
    shown = repr(idf.evaluation.Evaluation(values, 0 * values, 0 * values, torch.zeros(4, 1, 2)))
    assert shown == "Evaluation(4 starts × 1, reward=3 ± 1, path_kl=0 nats, samples=(2,) float32)"


def test_weighted_particles_show_their_weighted_mean():
    """Weights (3, 1)/4 on 0 and 4: mean 1, variance 3, and Σw² = 10/16."""
    particles = idf.Particles(torch.tensor([[0.0], [4.0]]), torch.tensor([3.0, 1.0]).log())
    assert repr(particles) == "Particles(2 of (1,) float32, mean=(1 ± 1), ess=1.6)"
    assert repr(idf.Particles(torch.zeros(3, 1, 8, 8))) == "Particles(3 of (1, 8, 8) float32)"


@pytest.mark.parametrize(
    ("mean", "error", "said"),
    [
        (30.337, 0.0421, "30.34 ± 0.04"),
        (-0.02, 0.2, "0.0 ± 0.2"),
        (0.9, 0.0999, "0.9 ± 0.1"),
        (1234.5, 30.0, "1234 ± 30"),
        (2.5, float("nan"), "2.5"),
        (float("inf"), 1.0, "inf"),
        (0.0, 0.0, "0"),
        (1.0, 1e-12, "1 ± 1e-12"),
    ],
)
def test_a_mean_is_shown_to_the_first_digit_of_its_error(mean, error, said):
    assert showing.with_error(mean, error) == said


def test_lazy_layers_meta_tensors_and_long_strings_are_no_obstacle():
    assert showing.brief(nn.Sequential(nn.LazyLinear(2))) == "Sequential"
    assert showing.brief(torch.empty((), device="meta")) == "() float32 on meta"
    assert len(showing.brief("x" * 1000)) < 70
    assert showing.brief(list(range(100))) == "(0, 1, 2, 3, … 100 in all)"
