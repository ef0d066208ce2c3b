"""Random calls of the library: a loop, its parts and their arguments; and what may become of it.

A problem is a mapping of plain values, so that a failing one can be read. Arguments of loops, kernels, estimators and
`Update` are read off their signatures: those that are not named here are drawn by their annotations.
"""

import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.errors import ImplicitDiffusionError
from implicit_diffusion.files.states import load_state, save_state
from tests.helpers.potentials import Gaussian

MOST = 4  # updates before the interruption, and after it
KERNELS = {kind.__name__: kind for kind in (idf.ULA, idf.MALA, idf.HMC, idf.samplers.Underdamped)}
CHAIN_LOOPS = {"Queue": idf.Queue, "Nested": idf.Nested}
PARTICLE_LOOPS = {
    "Single": idf.Single,
    "NestedParticles": idf.loops.NestedParticles,
    "Unrolled": idf.loops.Unrolled,
}
ESTIMATORS = {
    name: kind
    for name in idf.gradients.__all__
    if inspect.isclass(kind := getattr(idf.gradients, name))
    and issubclass(kind, idf.gradients.Estimator)
    and not inspect.isabstract(kind)
}
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AMSGrad": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, centered=True),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "LBFGS": lambda p, lr: torch.optim.LBFGS(p, lr=lr),
}
SCHEDULES = {
    "none": lambda optimizer: None,
    "decay": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k)),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * MOST),
    "steps": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    "cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False),
}
TABLES = ("ou-sde", "ou-flow", "memoryless", *idf.tables.NAMED_SAMPLERS)
WRONG = [0, -1, 3, 10**30, 0.5, -0.5, math.nan, math.inf, 1e-300, 1e300, None, True, "x", "", (), (1, 2)]
RATES = st.sampled_from([1e-3, 1e-2, 0.1, 0.1, 1.0, 0.0, 1e4, 1e30])
NAMED: dict[str, st.SearchStrategy] = {  # arguments whose annotations say too little
    "batch": st.integers(1, 4),
    "stride": st.sampled_from([1, 1, 2, 3]),
    "depth": st.sampled_from([1, 2, 2, 3]),
    "iterations": st.sampled_from([1, 1, 1, 1, 2, 3]),
    "inner_steps": st.integers(1, 3),
    "unrolled_steps": st.integers(1, 3),
    "leapfrogs": st.integers(1, 3),
    "step_size": st.sampled_from([0.05, 0.1, 0.3, "power_law", 10.0]),
    "friction": st.sampled_from([0.5, 1.0, 3.0]),
    "accumulate": st.integers(1, 3),
    "max_grad_norm": st.sampled_from([None, 0.1, 1.0, 1e6]),
    "ema_decay": st.sampled_from([None, None, 0.5, 0.999]),
    "compiled": st.just(False),  # takes minutes, and has tests of its own
}
MADE = {"chain", "potential", "kernel", "objective", "update", "optimizer", "noise", "particles", "estimator"}
MADE |= {"schedule"}  # by `build`, from words of a problem


def arguments(kind: type) -> dict[str, st.SearchStrategy]:
    """Strategies for the arguments of a constructor that are plain values."""
    hints = typing.get_type_hints(kind.__init__)
    names = [name for name in inspect.signature(kind).parameters if name not in MADE]
    return {name: NAMED[name] if name in NAMED else of_type(hints[name]) for name in names}


def of_type(kind: Any) -> st.SearchStrategy:
    """Values of an annotation."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(of_type, parts))
    if origin is typing.Literal:
        return st.sampled_from(parts)
    return {
        bool: st.booleans(),
        int: st.integers(1, 3),
        float: st.sampled_from([0.1, 0.5, 1.0]),
        types.NoneType: st.none(),
    }.get(kind, st.none())


def often(words: Iterable[str], seldom: str) -> st.SearchStrategy:
    """One of the words, and seldom the one that no loop takes."""
    return st.sampled_from([word for word in words for _ in range(1 if word == seldom else 5)])


def shared() -> dict[str, st.SearchStrategy]:
    """What every loop has."""
    own = {
        "double": st.booleans(),
        "optimizer": often(OPTIMIZERS, "LBFGS"),
        "lr": RATES,
        "schedule": often(SCHEDULES, "plateau"),
        "seed": st.integers(0, 2**40),
        "before": st.integers(1, MOST),
        "after": st.integers(1, MOST),
    }
    return own | arguments(idf.Update)


CHAINS = {
    "network": st.sampled_from(["scalar", "mlp", "dropout", "gaussian"]),
    "event": st.sampled_from([(2,), (1, 2, 2)]),
    "table": st.sampled_from(TABLES),
    "num_steps": st.sampled_from([1, 2, 3, 3, 4, 5]),
    "horizon": st.sampled_from([0.5, 1.0, 4.0]),
    "eta": st.sampled_from([0.0, 0.5, 1.0]),
    "own_reference": st.booleans(),
    "pretrained_rows": st.sampled_from([(), "noiseless", "noiseless", (0,)]),
    "labelled": st.sampled_from([False, False, True]),
    "reward_weight": st.sampled_from([1.0, 1.0, 0.3, 1e6]),
    "kl_weight": st.sampled_from([0.0, 0.0, 0.1, 2.0]),
    "drift_weight": st.sampled_from([0.0, 0.0, 0.1]),
}
PARTICLES = {
    "network": st.sampled_from(["tilted", "gaussian", "mixture"]),
    "given": st.sampled_from(["particles", "number"]),
    "n": st.integers(2, 9),
    "terms": st.lists(
        st.sampled_from(["reward", "mmd", "sinkhorn", "forward", "reverse", "evidence", "functional"]),
        min_size=1,
        max_size=2,
        unique=True,
    ),
    "weight": st.sampled_from([1.0, 0.3, 1e6]),
    "epsilon": st.sampled_from([0.1, 1.0]),
    "data_batch": st.sampled_from([None, 2, 3]),
}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A loop by name, with its arguments; in a quarter of them one has a value that is of another kind."""
    on_chain = draw(st.booleans())
    loops, own = (CHAIN_LOOPS, CHAINS) if on_chain else (PARTICLE_LOOPS, PARTICLES)
    loop = draw(st.sampled_from(sorted(loops)))
    strategies = shared() | own | arguments(loops[loop])
    chosen: dict[str, Any] = {"loop": loop}
    if on_chain:
        chosen["estimator"] = draw(st.sampled_from([None, *sorted(ESTIMATORS)]))
        strategies |= arguments(ESTIMATORS[chosen["estimator"]]) if chosen["estimator"] else {}
    else:
        chosen["kernel"] = draw(st.sampled_from(sorted(KERNELS)))
        strategies |= arguments(KERNELS[chosen["kernel"]])
    chosen |= {name: draw(strategy) for name, strategy in strategies.items()}
    if draw(st.integers(0, 3)) == 3:
        free = sorted(strategies.keys() - {"before", "after", "lr", *WORDS})
        chosen[draw(st.sampled_from(free))] = draw(st.sampled_from(WRONG))
    return chosen


WORDS = {"double", "network", "optimizer", "schedule", "given", "terms", "own_reference", "labelled", "table"}  # ours


class Net(nn.Module):
    """u(x, t, **condition), with a layer."""

    def __init__(self, size: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size + 1, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, size))
        for parameter in self.layers.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x, t, **condition):
        flat = torch.cat([x.flatten(1), t.to(x).expand(len(x))[:, None]], dim=1)
        return self.layers(flat).reshape(x.shape)


class Scalar(nn.Module):
    """u(x, t) = a x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.5))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x, t, **condition):
        return self.weight * self.frozen * x


def reward(x):
    return -(x.flatten(1) - 1).square().sum(1)


def network(given: dict[str, Any]) -> nn.Module:
    size = math.prod(given["event"]) if isinstance(given["event"], tuple) else 2
    made: nn.Module
    if given["network"] == "gaussian":
        mean = torch.zeros(given["event"] if isinstance(given["event"], tuple) else 2)
        made = idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(mean, 0.5)
    else:
        made = Scalar() if given["network"] == "scalar" else Net(size, 0.5 * (given["network"] == "dropout"))
    return made.double() if given["double"] else made


def table(given: dict[str, Any]) -> idf.ChainTable:
    if given["table"] in ("ou-sde", "ou-flow"):
        kind = {"ou-sde": idf.tables.ou_reverse_sde, "ou-flow": idf.tables.ou_probability_flow}[given["table"]]
        return kind(given["num_steps"], given["horizon"])
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if given["table"] == "memoryless":
        return idf.tables.memoryless_flow(FlowMatchEulerDiscreteScheduler(), given["num_steps"])
    flow = idf.tables.NAMED_SAMPLERS[given["table"]].flow
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler(clip_sample=False)
    made = idf.tables.scheduler_for(scheduler, given["table"])
    return idf.tables.table_for(made, given["table"], given["num_steps"], eta=given["eta"])


def only(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in arguments(kind)}


def update(model: nn.Module, given: dict[str, Any]) -> idf.Update:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[given["optimizer"]](parameters, given["lr"])
    return idf.Update(optimizer, schedule=SCHEDULES[given["schedule"]](optimizer), **only(idf.Update, given))


def chain_loop(given: dict[str, Any]) -> Any:
    made, rows = network(given), table(given)
    condition = idf.denoisers.Drawn("label", torch.arange(3)) if given["labelled"] else None
    reference = network(given) if given["own_reference"] else None
    chain = idf.Chain(
        made,
        rows,
        given["event"],
        reference=reference,
        pretrained_rows=given["pretrained_rows"],
        condition=condition,
    )
    objective = given["reward_weight"] * idf.Reward(reward)
    if given["kl_weight"] != 0:
        objective = objective + given["kl_weight"] * idf.PathKL()
    if given["drift_weight"] != 0:
        objective = objective + given["drift_weight"] * idf.objectives.DriftPenalty()
    kind, estimator = CHAIN_LOOPS[given["loop"]], given["estimator"]
    if estimator is not None:
        estimator = ESTIMATORS[estimator](**only(ESTIMATORS[estimator], given))
    own = only(kind, given) | {"noise": idf.Noise(given["seed"]), "estimator": estimator}
    return kind(chain, objective, update(made, given), **own)


def particle_loop(given: dict[str, Any]) -> Any:
    potentials = {
        "gaussian": Gaussian,
        "tilted": lambda: idf.potentials.Tilted(idf.potentials.mlp(2, idf.Noise(3), width=4, depth=1), (2,)),
        "mixture": lambda: idf.GaussianMixture(torch.eye(2)),
    }
    potential = potentials[given["network"]]()
    x = torch.linspace(-1, 1, 2 * (given["n"] if given["n"] in range(1, 99) else 4)).reshape(-1, 2) ** 3
    data = torch.linspace(0, 1, 14).reshape(7, 2)
    if given["double"]:
        potential, x, data = potential.double(), x.double(), data.double()
    terms = {
        "reward": lambda: idf.Reward(reward),
        "mmd": lambda: idf.MMD(data),
        "sinkhorn": lambda: idf.objectives.Sinkhorn(data, given["epsilon"]),
        "forward": lambda: idf.ForwardKL(data, batch=given["data_batch"]),
        "reverse": lambda: idf.ReverseKL(Gaussian().to(x.dtype)),
        "evidence": idf.objectives.Evidence,
        "functional": lambda: idf.objectives.Functional(lambda x, w: (w @ x - 1).square().sum()),
    }
    objective = sum((given["weight"] * terms[name]() for name in given["terms"][1:]), 1.0 * terms[given["terms"][0]]())
    kernel = KERNELS[given["kernel"]]
    moves = only(kernel, given)
    if moves["step_size"] == "power_law":
        moves["step_size"] = idf.samplers.power_law(0.1, 0.3)
    kind = PARTICLE_LOOPS[given["loop"]]
    given_particles = x if given["given"] == "particles" else given["n"]
    own = only(kind, given) | {"particles": given_particles, "noise": idf.Noise(given["seed"])}
    return kind(potential, kernel(**moves), objective, update(potential, given), **own)


def build(given: dict[str, Any]) -> Any:
    """The loop of a problem."""
    return chain_loop(given) if given["loop"] in CHAIN_LOOPS else particle_loop(given)


class Trained(NamedTuple):
    """What a loop did: the metrics of its updates, its state, and the error of ours that ended it early."""

    metrics: list[Any]
    state: Any
    error: str | None


def train(loop: Any, updates: int) -> Trained:
    """So many more updates, in whole steps."""
    metrics, last = [], loop.update.updates + updates
    try:
        while loop.update.updates < last:
            metrics.append(loop.step())
    except ImplicitDiffusionError as error:
        return Trained(metrics, None, f"{type(error).__name__}: {error}")
    return Trained(metrics, loop.state_dict(), None)


def verdict(given: dict[str, Any], folder: Any) -> str:
    """What became of a problem: "trained", "ended" by an error of ours during training, or "refused" before it.

    Raises:
        AssertionError: the resumed loop is not the uninterrupted one.
    """
    refusal, loop = None, None
    try:
        loop = build(given)
    except ImplicitDiffusionError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal and refusal.strip(), "an error of one line"
        return "refused"
    whole = train(loop, given["before"] + given["after"])
    half = build(given)
    first = train(half, given["before"])
    if first.error is None:
        save_state(folder, first.state)
        resumed = build(given)
        resumed.load_state_dict(load_state(folder))
        second = train(resumed, given["after"])
    else:
        second = Trained([], None, first.error)
    assert second.error == whole.error
    different = list(differences(whole.metrics, first.metrics + second.metrics, "metrics"))
    different += list(differences(whole.state, second.state, "state"))
    assert not different, different[:5]
    return "trained" if whole.error is None else "ended"


def differences(one: Any, other: Any, where: str) -> Iterator[str]:
    """Where two trees differ, bit for bit; NaN is NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if not same or not torch.equal(one.detach().nan_to_num(7.0), other.detach().nan_to_num(7.0)):
            yield where
    elif isinstance(one, typing.Mapping) and isinstance(other, typing.Mapping):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{where}[{key!r}]")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other)):
            yield from differences(a, b, f"{where}[{i}]")
    elif one != other and not (one != one and other != other):
        yield f"{where}: {one!r} and {other!r}"
