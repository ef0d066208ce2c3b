"""What the processes of tests/processes/test_chains.py are asked to compute; each builds its models itself."""

import copy

import torch
from torch import nn

from implicit_diffusion import processes
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.stored import Stored
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, DriftPenalty, Functional, PathKL, Reward, Sinkhorn, WeightedRewards
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny
from tests.helpers.chain_loops import Recorder, weights
from tests.helpers.oracles import affine_chain, table
from tests.helpers.shared_runs import numbers, recorded

N, DIM, BATCH, CLASSES = 4, 2, 6, 4
F64 = torch.float64
LOOPS = {
    "nested": (Nested, {}),
    "queue": (Queue, {"stride": 1}),
    "queue, stride 2": (Queue, {"stride": 2}),
    "queue, stride N": (Queue, {"stride": N}),
}


class Conditional(nn.Module):
    """u(x, t, embedding), nonlinear in all of them, by sums over coordinates that no batch reorders."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=g, dtype=F64) / 2)

    def forward(self, x, t, embedding):
        return torch.tanh((x[:, :, None] * self.weight).sum(1) + embedding) + 0.1 * embedding * x


def prompted():
    """A guided chain under prompts, of which each asks for another point."""
    rows = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1), dtype=F64)
    network = ClassifierFree(Embedded(Conditional(), {"embedding": rows}), 2.5, null={"prompt": CLASSES - 1})
    prompts = Drawn("prompt", torch.arange(CLASSES - 1))
    return Chain(network, table(N, scaled=True), (DIM,), pretrained_rows=(3,), condition=prompts)


def asked_for(x, condition):
    return -(x - condition["prompt"][:, None].to(x.dtype)).square().sum(1) / 4


class OwnTerm(TerminalObjective):
    """A user's term that says nothing of processes: the squared distance between the halves' means, with a network."""

    name = "own"

    def value(self, particles):
        first, second = particles.x.chunk(2)
        return (first.mean(0) - second.mean(0)).square().sum()


def data(dim=DIM):
    return torch.randn(5, dim, generator=torch.Generator().manual_seed(3), dtype=F64)


OBJECTIVES = {
    "Reward": lambda reward: Reward(reward) + 0.3 * PathKL(),
    "MMD": lambda reward: MMD(data()) + 0.3 * PathKL(),
    "Sinkhorn": lambda reward: Sinkhorn(data(), 0.5) + 0.3 * PathKL(),
    "Functional": lambda reward: Functional(lambda x, w: (w @ x - 1).square().sum()) + 0.3 * PathKL(),
    "own term": lambda reward: OwnTerm() + 0 * Reward(reward) + 0.3 * PathKL(),
    "all of them": lambda reward: Reward(reward) + 0.5 * MMD(data()) + OwnTerm() + 0.3 * PathKL() + DriftPenalty(),
    "DriftPenalty": lambda reward: Reward(reward) + 0.3 * DriftPenalty(),
    "conditional reward": lambda reward: Reward(asked_for) + 0.3 * PathKL(),
}


def build(objective="Reward", loop="nested", optimizer=Recorder, lr=0.02, dtype=F64, seed=3, **update):
    if objective == "conditional reward":
        chain, reward = prompted(), None
    else:
        chain, reward = affine_chain(N, DIM, noise=objective != "DriftPenalty", pretrained_rows=(3,))
    chain.denoiser.to(dtype), chain.reference.to(dtype)
    if dtype is not F64:
        chain = Chain(chain.denoiser, chain.table, (DIM,), reference=chain.reference, pretrained_rows=(3,))
        of_f64, reward = reward, lambda x: of_f64(x.double()).to(x.dtype)
    g = torch.Generator().manual_seed(2)
    for p in chain.denoiser.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=F64).to(dtype)
    kind, options = LOOPS[loop]
    update = Update(optimizer(chain.denoiser.parameters(), lr=lr), **update)
    return kind(chain, OBJECTIVES[objective](reward), update, batch=BATCH, noise=Noise(seed), **options)


def runs(objective, dtype=F64):
    """Runs of all loops."""
    return {loop: recorded(build(objective, loop, dtype=dtype), updates=4) for loop in LOOPS}


def network_runs(kind, dtype, checkpointing=True):
    """Runs on a U-Net, whole or with adapters, u_0 being the same module with its adapters off."""
    denoiser = DiffusersDenoiser(tiny.unet().to(dtype))
    if kind == "adapters":
        add_lora(denoiser.model, 2, Noise(1))
        if checkpointing:
            checkpoint_activations(denoiser.model)
    reference = WithoutAdapter(denoiser) if kind == "adapters" else None
    chain = Chain(denoiser, table(N), (1, 8, 8), reference=reference)
    g = torch.Generator().manual_seed(2)
    for p in denoiser.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=g, dtype=F64).to(dtype)
    reward = Reward(lambda x: torch.tanh(x.flatten(1)).mean(1) - 0.1 * x.flatten(1).square().mean(1))
    results = {}
    for name in ("nested", "queue"):
        made, options = LOOPS[name]
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
        loop = made(
            chain, reward + 0.1 * PathKL(), Recorder(parameters, lr=0.0), batch=BATCH, noise=Noise(3), **options
        )
        results[name] = recorded(loop, updates=2)
    return results


def half_gradient():
    """Γ through a U-Net in float16, whose scale every process chooses for itself, and the same in float32."""
    found = []
    for precision in (torch.float16, None):
        denoiser = DiffusersDenoiser(tiny.unet())
        chain = Chain(denoiser, table(N), (1, 8, 8))
        chain.reference.precision = denoiser.precision = precision
        g = torch.Generator().manual_seed(2)
        for p in denoiser.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=g)

        def reward(x):
            """Of one sample far larger than that of the others, so that the scales differ."""
            mean = torch.tanh(x.flatten(1)).mean(1)
            return 1e-6 * (1 + 1e3 * (x.detach()[:, 0, 0, 0] > 1)) * mean

        loop = Nested(chain, Reward(reward), Recorder(denoiser.parameters(), lr=0.0), batch=BATCH, noise=Noise(1))
        loop.step()
        found.append(torch.cat([g.flatten() for g in loop.update.optimizer.gradients[0]]).double())
    return found


UPDATES = {
    "accumulate": {"accumulate": 3},
    "clipping": {"max_grad_norm": 0.1},
    "average": {"ema_decay": 0.9},
    "all": {"accumulate": 2, "max_grad_norm": 0.2, "ema_decay": 0.9, "optimizer": torch.optim.AdamW},
}


def updated(which, loop):
    """θ, its average and metrics after several updates."""
    made = build("all of them", loop, **{"optimizer": torch.optim.Adam} | UPDATES[which])
    metrics = [numbers(metrics) for metrics in made.steps(5)]
    ema = made.update.ema
    averaged = None if ema is None else torch.cat([p.detach().flatten() for p in ema.parameters()])
    return {"theta": weights(made), "average": averaged, "metrics": metrics, "work": made.cost()}


def continued(state, steps, loop, options):
    """A run, from a state or from its beginning, over some iterations: its state then, θ and the metrics."""
    made = build("all of them", loop, optimizer=torch.optim.Adam, **options)
    if state is not None:
        made.load_state_dict(copy.deepcopy(state))
    metrics = [numbers(made.step()) for _ in range(steps)]
    return {"state": made.state_dict(), "theta": weights(made), "metrics": metrics}


def broken(where, loop, accumulate=1):
    """The last process's share of the third trajectory gives NaN: the message, whether θ was left, the updates."""
    made = build("all of them", loop, optimizer=torch.optim.Adam, accumulate=accumulate)
    last = processes.rank() == processes.world_size() - 1
    if where == "gradient":
        made.chain.denoiser.gain.register_hook(lambda g: g * float("nan") if last and made.injected > 2 else g)
    else:
        initial = made.chain.initial
        made.chain.initial = lambda noise, batch, index=0: (
            initial(noise, batch, index) * (float("nan") if last and index == 2 else 1)
        )
    try:
        for _ in range(20):
            theta = weights(made)
            made.step()
    except NonFiniteError as error:
        return str(error), torch.equal(theta, weights(made)), made.update.updates
    return None


def refused(what):
    """The message that a constructor refuses with."""
    torch.manual_seed(processes.rank() if what == "theta" else 0)
    chain, reward = affine_chain(N, DIM, pretrained_rows=(3,))
    if what == "theta":
        chain.denoiser.shift.data += torch.randn(DIM, dtype=F64)
    if what == "reference":
        chain.reference.gain.data += processes.rank()
    noise = Noise(processes.rank() if what == "noise" else 0)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    try:
        Queue(chain, Reward(reward), sgd, batch=7 if what == "batch" else BATCH, noise=noise)
    except InvalidInputError as error:
        return str(error)
    return None


def predicted():
    made = build(loop="queue")
    return predict_memory(made)


ERRORS = {error.__name__: error for error in (InvalidInputError, ZeroDivisionError, KeyboardInterrupt)}


def random_reward(x):
    """Draws from a global generator."""
    return x.mean(1) + torch.randn(len(x), dtype=x.dtype)


def drawing(state=None, steps=6):
    """A run whose reward draws from a global generator: its state, θ and what this process has drawn."""
    chain, quadratic = affine_chain(N, DIM)
    drawn = []

    def reward(x):
        drawn.append(torch.randn(len(x), dtype=x.dtype))
        return quadratic(x) * (1 + drawn[-1])

    loop = Nested(chain, Reward(reward), torch.optim.Adam(chain.denoiser.parameters()), batch=BATCH, noise=Noise(0))
    generators = Fit(loop).generators
    drawn.clear()
    if state is not None:
        loop.load_state_dict(copy.deepcopy(state["loop"]))  # whose memory the processes share
        generators.load_state_dict(state["generators"])
    with generators:
        for _ in range(steps):
            loop.step()
    return {"loop": loop.state_dict(), "generators": generators.state_dict()}, weights(loop), torch.cat(drawn)


def calls(loop):
    """Collective calls of every step, and the bytes of the last."""
    made, found = build(loop=loop, optimizer=torch.optim.Adam), []
    for _ in range(4 * N):
        before = copy.copy(processes.traffic)
        made.step()
        found.append((processes.traffic.calls - before.calls, processes.traffic.bytes - before.bytes))
    return [number for number, _ in found], found[-1][1], sum(p.nbytes for p in made.model.parameters())


SEVERAL = WeightedRewards({"own": lambda x: x.mean(1), "random": random_reward}, (2.0, -0.5))


def evaluated(reward):
    """An evaluation in parts of which some are shorter."""
    chain = prompted() if reward == "conditional" else affine_chain(N, DIM)[0]
    for p in chain.denoiser.parameters():
        p.data += 0.1
    done = []
    score = {"own": lambda x: x.mean(1), "random": random_reward, "conditional": asked_for, "several": SEVERAL}[reward]
    options = {"starts": 10, "repeats": 3, "chunk": 9, "progress": done.append}
    torch.manual_seed(processes.rank())
    before = torch.get_rng_state()
    result = evaluate(chain, score, Noise(4), **options)
    assert torch.equal(torch.get_rng_state(), before)
    return vars(result), done


def fails_in_one(kind):
    """A reward that fails in the second part."""
    chain = affine_chain(N, DIM)[0]
    second = chain.sample(Noise(4), 6, 1)

    def reward(x):
        if torch.equal(x, second):
            raise ERRORS[kind]("in the second part")
        return x.mean(1)

    try:
        evaluate(chain, Reward(reward, checked=True), Noise(4), starts=24, chunk=6)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


def stored(folder, stop_after=None):
    """An evaluation that is stored in a folder, interrupted or not."""
    chain = affine_chain(N, DIM)[0]
    kept = Stored(folder, {"seed": "4"}, 300)
    seen = []

    def progress(count):
        seen.append(count)
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    try:
        result = kept.evaluate(
            chain, Reward(random_reward, checked=True), Noise(4), starts=300, repeats=4, progress=progress
        )
    except KeyboardInterrupt:
        return None, len(seen)
    return vars(result), len(seen)


def adjoint_by_hand():
    """Γ of an estimator called where samples are not shared out: every process has that of all."""
    made = build("all of them")
    values = Adjoint()(made.chain, made.objective, Noise(3), BATCH)
    return torch.cat([p.grad.flatten() for p in made.model.parameters()]), numbers(values)
