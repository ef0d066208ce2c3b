r"""What guidance costs at the start of a run: the norm of Γ against its scale w, and the path KL of going without it.

Under guidance of scale w the pretrained network is u^w = u_∅ + w (u_c − u_∅), and a student of scale v that nothing has
trained is u^v. They differ by (w − v)(u_c − u_∅), so that on the states of the student

    path KL = (w − v)² Σ_k E‖b_k (u_c − u_∅)(x_k)‖²/(2 s_k²),    and its part of Γ is (w − v) A + (w − v)² B

with A, B free of w: A from the network's own step, B from what x_k changes in later rows. A network that is guided
itself has no path KL at the start, but its reward is differentiated through w (u_c − u_∅) on every row, one after the
other: that part may grow like a power of w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from implicit_diffusion.commands.finetune.problem.estimators import estimator_of
from implicit_diffusion.commands.finetune.problem.setup import PLAN, Setup
from implicit_diffusion.commands.finetune.specs import TrainingSpec
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.page import table
from implicit_diffusion.commands.shared.summaries import from_json, to_json
from implicit_diffusion.denoisers.sharded import is_sharded
from implicit_diffusion.evaluation.chains import Estimate, evaluate, mean_and_error
from implicit_diffusion.evaluation.judging import Untrained
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.gradients import Estimator
from implicit_diffusion.objectives import Objective, PathKL
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory, records
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.chain import Chain

FILE = "guidance.json"
STARTS = 64  # that the path KL is measured from
BLOWN = 10.0  # times the norm without guidance


@dataclass(frozen=True)
class Norms:
    """Norms of Γ where the pretrained network is guided by one scale.

    Args:
        guidance: w.
        guided: of the reward alone, where the trained network is guided by w as well.
        student: of reward and path KL, where it has the guidance of the student; None where the run has no student.
        of_path_kl: of the weighted path KL alone, likewise.
        path_kl: of the untrained student, in nats, likewise.
    """

    guidance: float
    guided: float
    student: float | None
    of_path_kl: float | None
    path_kl: float | None


@dataclass(frozen=True)
class Cost:
    """What guidance costs at the start.

    Args:
        guidance: scale of the pretrained network.
        student_guidance: scale of the network that is trained.
        kl_weight: β.
        max_grad_norm: the largest norm that is not scaled down.
        path_kl: of the untrained student, in nats; 0 where the two scales are one.
        reward: of the untrained student; None where the two scales are one.
        norms: by growing w; empty where weights are shared out.
    """

    guidance: float
    student_guidance: float
    kl_weight: float
    max_grad_norm: float
    path_kl: Estimate
    reward: Estimate | None
    norms: list[Norms]

    @property
    def advice(self) -> list[str]:
        """Sentences on what to change; none where nothing has to."""
        by_scale = {row.guidance: row for row in self.norms}
        here, none = by_scale.get(self.guidance), by_scale.get(1.0 if self.reward is None else self.student_guidance)
        if here is None or none is None:
            return []
        if self.reward is None:
            if not here.guided > BLOWN * none.guided:
                return []
            return [
                f"Guidance {self.guidance:g} makes the gradient {here.guided / none.guided:.3g} times as large as "
                f"without: it goes through guidance on every step. --student-guidance 1 trains a network without "
                "guidance towards the guided model, and its gradient does not"
            ]
        clipped = here.student is not None and here.student > self.max_grad_norm
        if not clipped or not (here.of_path_kl or 0.0) > BLOWN * none.guided:
            return []
        assert here.student is not None
        nearer = self.student_guidance + (self.guidance - self.student_guidance) / 2
        return [
            f"The first gradients are {here.student / self.max_grad_norm:.3g} times as large as --max-grad-norm "
            f"allows, and are scaled down: the path KL of guidance {self.guidance:g} has a gradient of norm "
            f"{number(here.of_path_kl)}, the reward one of {number(none.guided)}. Go there in two runs, "
            f"--guidance {nearer:g} and then, from its model, --guidance {self.guidance:g} with --reference; or take "
            "a smaller --kl-weight, or a larger --max-grad-norm"
        ]


def shown(spec: TrainingSpec, setup: Setup, beta: float, max_grad_norm: float, directory: RunDirectory) -> None:
    """Measure what guidance costs, print it, and keep it for the report; arguments as in `measure`."""
    cost = measure(setup, beta, batch=spec.batch, depth=spec.depth, max_grad_norm=max_grad_norm)
    if cost is not None:
        keep(cost, directory)
        show(cost)


@part("planning")
def measure(setup: Setup, beta: float, *, batch: int, depth: int | None, max_grad_norm: float) -> Cost | None:
    """The cost of guidance before the first update; None for a model without guidance.

    Args:
        setup: of the run, with R in its units.
        beta: β.
        batch: samples of a gradient.
        depth: of the truncated estimator.
        max_grad_norm: the largest norm that is not scaled down.
    """
    w, v = setup.guidance, setup.student_guidance
    read = setup.conditioning.inside  # off a pipeline, under these two scales alone
    if w is None or v is None or w == v == 1 or (read and w == v):
        return None
    noise, path_kl, reward = setup.spec.noise.stream(PLAN, 1), Estimate(0.0, 0.0), None
    if setup.untrained is not None:
        seen = evaluate(setup.untrained, setup.reward, noise, starts=STARTS)
        path_kl, reward = mean_and_error(seen.path_kl), mean_and_error(seen.reward)
    none = 1.0 if setup.untrained is None else v
    scales = sorted({v, w} if read else {none, (none + w) / 2, w, 2 * w - none})
    norms: list[Norms] = []
    if not is_sharded(setup.chain.denoiser):
        name = "score" if setup.estimator.name == "surrogate" else setup.estimator.name  # it has not learned yet
        estimator = estimator_of(name, setup.chain, noise, depth)
        norms = [_norms(setup, estimator, beta, scale, path_kl.mean, batch) for scale in scales]
    return Cost(w, v, beta, max_grad_norm, path_kl, reward, norms)


def _norms(setup: Setup, estimator: Estimator, beta: float, scale: float, path_kl: float, batch: int) -> Norms:
    w, v = setup.guidance, setup.student_guidance
    assert w is not None and v is not None
    guided = _norm(setup, estimator, setup.under(scale, scale), setup.reward, batch)
    if setup.untrained is None:
        return Norms(scale, guided, None, None, None)
    chain, cost = setup.under(scale, v), beta * PathKL()
    student = _norm(setup, estimator, chain, setup.reward + cost, batch)
    of_path_kl = _norm(setup, estimator, chain, 0.0 * setup.reward + cost, batch)
    return Norms(scale, guided, student, of_path_kl, path_kl * ((scale - v) / (w - v)) ** 2)


def _norm(setup: Setup, estimator: Estimator, chain: Chain, objective: Objective, batch: int) -> float:
    """‖Γ‖ of one batch, which leaves no trace."""
    noise, trained = setup.spec.noise.stream(PLAN, 2), list(setup.pretrained.denoiser.parameters())
    for p in trained:
        p.grad = None
    with GlobalGenerators(noise, 0, device=chain.device):
        estimator(chain, objective, noise, batch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    for p in trained:
        p.grad = None
    return norm


@main_only
def keep(cost: Cost, directory: RunDirectory) -> None:
    """Write guidance.json."""
    records.write(directory.path / FILE, to_json(cost) | {"advice": cost.advice})


@main_only
def read(directory: RunDirectory) -> Cost | None:
    """The cost that a run has kept; None for a run without guidance."""
    if not (directory.path / FILE).exists():
        return None
    content = read_json(directory.path / FILE)
    content.pop("advice", None)
    cost: Cost = from_json(Cost, content)
    return cost


COLUMNS = ("guidance", "‖Γ‖, guided network", "‖Γ‖, student", "of the path KL", "path KL (nats)")


def _rows(cost: Cost) -> list[list[str]]:
    shown = ("guided", "student", "of_path_kl", "path_kl")[: 1 if cost.reward is None else 4]
    return [[f"{row.guidance:g}", *(number(getattr(row, name)) for name in shown)] for row in cost.norms]


@main_only
def show(cost: Cost) -> None:
    """Print the cost of guidance, and what to change."""
    if cost.reward is not None:
        print(
            f"guidance  untrained, with guidance {cost.student_guidance:g}, the network is {number(*cost.path_kl)} "
            f"nats from the model under guidance {cost.guidance:g}; its reward is {number(*cost.reward)}"
        )
    if cost.norms:
        rows = [COLUMNS[: 2 if cost.reward is None else 5], *_rows(cost)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print(" " * 10 + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
        print(
            f"          first gradients at KL weight {cost.kl_weight:.4g}; beyond {number(cost.max_grad_norm)} "
            "they are scaled down"
        )
    for sentence in cost.advice:
        print(f"          {sentence}.")


def section(cost: Cost | None) -> str:
    """The part of the report; empty without guidance."""
    if cost is None or not cost.norms:
        return ""
    words = "".join(f"<p>{sentence}.</p>" for sentence in cost.advice)
    columns: Sequence[str] = COLUMNS[: 2 if cost.reward is None else 5]
    return f"""<section><h2>What guidance cost at the start</h2>
<p>Norms of the first gradients at KL weight {cost.kl_weight:.4g}, on one batch, by the scale of guidance; beyond
{number(cost.max_grad_norm)} they were scaled down. The guided network is differentiated through its guidance.</p>
{table(columns, _rows(cost))}{words}</section>
"""


def line_of(untrained: Untrained) -> str:
    """What is printed of the chain that training began with."""
    above, error = untrained.j_above
    where = "above" if above > 0 else "below"
    return (
        f"untrained reward {number(*untrained.reward)}, path KL {number(*untrained.path_kl)} nats: the cost of "
        f"guidance; J {number(abs(above), error)} {where} that of the guided model"
    )


def in_words(untrained: Untrained) -> str:
    """The chain that training began with, for the report and the model card."""
    return (
        f"The path KL is measured from the guided model. Of the untrained network it was {number(*untrained.path_kl)} "
        f"nats, which is what guidance costs, and the reward {number(*untrained.reward)}."
    )
