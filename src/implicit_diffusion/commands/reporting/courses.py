"""The course of a run of each command that trains: which numbers there are to see, and what they are called."""

from __future__ import annotations

from typing import Any

from implicit_diffusion.commands.reporting.course import (
    Course,
    Files,
    Frontier,
    FrontierRow,
    Number,
    Panel,
    as_number,
    columns,
    over_seeds,
    trainings,
)
from implicit_diffusion.commands.shared.drawing import in_legend
from implicit_diffusion.runs.callbacks.held_out import each_reward, watched_reward

EACH_REWARD, EACH_JUDGE = f"held_out_{each_reward('')}", f"held_out_{watched_reward('')}"
HELD_OUT = "held-out noise, ± 2 s.e."
FEW = 8  # rewards and judges with a picture each, in whatever file
WORK = {"updates": "updates", "seconds of training": "seconds"}


def finetune(files: Files) -> Course:
    """J, reward and path KL, on training noise and on held-out noise; the frontier of the plan."""
    drift = files.options.get("penalty") == "drift"
    several = dict.fromkeys(name for line in files.lines for name in line if name.startswith((EACH_REWARD, EACH_JUDGE)))
    panels = (
        Panel("objective", "J  (lower is better)", "held_out_objective", HELD_OUT),
        Panel("reward", "mean reward", "held_out_reward", HELD_OUT),
        Panel("path_kl", "path KL (nats)", "held_out_path_kl", HELD_OUT),
        *(Panel("", _title(name), name, HELD_OUT) for name in [*several][:FEW]),
        Panel("kl_weight", "KL weight β, adapted"),
        Panel("grad_norm", "norm of the gradient Γ", log=True),
        Panel("staleness_max", "age of the oldest gradient (updates)"),
    )
    work = {**WORK, "network evaluations": "network_evaluations"}
    names = {"J": "j_after", "fall of J": "j_fall", "best J": "j_bound", "share of the possible fall": "captured"}
    names = {"mean reward": "reward_after", "reward gained": "reward_gain", "path KL (nats)": "path_kl", **names}
    latest = {"mean reward": "held_out_reward", "path KL (nats)": "held_out_path_kl", "J": "held_out_objective"}
    return Course(
        kind="finetune",
        panels=tuple(p for p in panels if not (drift and p.name in ("objective", "path_kl"))),
        lines=files.lines,
        numbers=files.ended(names | work) if files.finished else files.latest(latest | work),
        defining=("model", "reference", "reward", "prompts", "guidance", "penalty"),
        total=_total(files, "updates"),
        frontier=None if drift else _frontier(files),
        note="The numbers of a finished run are judged on noise of their own, as in its report. J weighs the path KL "
        "by the KL weight: with another weight it is another J.",
        so_far="The numbers of an unfinished run are those of its last check on held-out noise.",
    )


def _title(name: str) -> str:
    """The words for one of several rewards, or for a judge: `held_out_judge/NAME` is called judge NAME."""
    kind, _, label = name.removeprefix("held_out_").partition("/")
    return f"{kind} {in_legend(label)}"


def _frontier(files: Files) -> Frontier | None:
    plan = files.plan or {}
    reward, rows = as_number(plan.get("reward")), plan.get("rows")
    if reward is None or not isinstance(rows, list):
        return None
    names = ("kl_weight", "path_kl", "path_kl_se", "reward_gain", "reward_gain_se")
    optima = [
        FrontierRow(beta, Number(kl, kl_se), Number(reward + gain, gain_se))
        for beta, kl, kl_se, gain, gain_se in columns([row for row in rows if isinstance(row, dict)], *names)
    ]
    held_out = ("held_out_path_kl", "held_out_path_kl_se", "held_out_reward", "held_out_reward_se")
    way = [(Number(kl, kl_se), Number(r, r_se)) for kl, kl_se, r, r_se in columns(files.lines, *held_out)]
    end = files.ended({"kl": "path_kl", "reward": "reward_after"})
    return Frontier(
        optima=sorted(optima, key=lambda row: row.path_kl.value),
        pretrained=Number(reward, as_number(plan.get("reward_se"))),
        way=way,
        end=(end["kl"], end["reward"]) if len(end) == 2 else None,
    )


def pretrain(files: Files) -> Course:
    """The loss."""
    ended = {"loss on training images": "loss_train", "loss on held-out images": "loss_held_out", **WORK}
    numbers = files.latest({"loss, last line": "loss", **WORK}) | (files.ended(ended) if files.finished else {})
    return Course(
        kind="pretrain",
        panels=(Panel("loss", "denoising loss", log=True),),
        lines=files.lines,
        numbers=numbers,
        defining=("data", "size", "classes", "prediction_type"),
        total=_total(files, "steps"),
    )


def ebm(files: Files) -> Course:
    """Likelihood, log Z, and how the particles fare; of a comparison, the exact KL of its arms."""
    if files.options.get("compare"):
        return _compared(files)
    panels = (
        Panel("nll", "−log-likelihood (nats)"),
        Panel("", "exact −log-likelihood (nats)", "exact_nll", "exact, in the units of the data"),
        Panel("", "KL(data‖model) (nats)", "exact_kl", "exact", log=True),
        Panel("log_z", "log Z", "exact_log_z", "exact"),
        Panel("", "energy, data − particles (nats)", "energy_gap", "means and 2 s.e."),
        Panel("ess", "effective particles"),
        Panel("acceptance", "share of proposals accepted"),
        Panel("step_size", "step size"),
        Panel("grad_norm", "norm of the gradient Γ", log=True),
    )
    work = {**WORK, "pulls through V": "gradient_evaluations"}
    ended = {"−log-likelihood, held out (nats)": "nll_held_out", "more than a Gaussian (nats)": "gain_over_gaussian"}
    ended |= {"KL(data‖model) (nats)": "kl", "log Z by annealing": "log_z_estimate", **work}
    latest = {"KL(data‖model) (nats)": "exact_kl", "energy, data − particles (nats)": "energy_gap", **work}
    return Course(
        kind="ebm",
        panels=panels,
        lines=files.lines,
        numbers=files.ended(ended) if files.finished else files.latest(latest),
        defining=("data", "dequantise"),
        total=_total(files, "steps"),
    )


def _compared(files: Files) -> Course:
    lines: list[dict[str, Any]] = []
    for line in files.lines:
        curve = line.get("curve")
        if isinstance(curve, list) and len(curve) > 1:  # those of one point search the rate
            which = {name: line.get(name) for name in ("arm", "seed")}
            lines += [point | which for point in curve if isinstance(point, dict)]
    return Course(
        kind="ebm --compare",
        panels=(
            Panel("kl", "exact KL(data‖model) (nats)", log=True),
            Panel(
                "kl",
                "exact KL(data‖model) (nats)",
                log=True,
                x=("gradient_evaluations", "pulls through V at all particles"),
            ),
        ),
        lines=lines,
        numbers=_by_arm(lines, {"KL(data‖model) (nats)": "kl"}),
        defining=("data",),
    )


def tilt(files: Files) -> Course:
    """Reward against KL of every training, and both against the weight."""
    names = {"reward": "reward", "KL to π_0 (nats)": "kl"}
    return Course(
        kind="tilt",
        panels=(Panel("reward", "expected reward under the model", x=("kl", "KL(π‖π_0) (nats)")),),
        lines=files.lines,
        numbers=_by_arm(files.lines, names, "kl_weight"),
        defining=("model", "reward"),
    )


def hexagon(files: Files) -> Course:
    """Reward and KL of every arm."""
    x = ("iteration", "updates (sampler steps without training)")
    return Course(
        kind="hexagon",
        panels=(
            Panel("reward", "reward of the particles", x=x),
            Panel("reward_exact", "E R under π_θ", x=x),
            Panel("kl_from_initial", "KL(π_θ‖π_θ0) (nats)", x=x),
            Panel("lag", "lag (deviations)", x=x),
        ),
        lines=files.lines,
        numbers=_by_arm(
            files.lines,
            {"reward of the particles": "reward", "E R under π_θ": "reward_exact", "KL(π_θ‖π_θ0)": "kl_from_initial"},
        ),
        defining=("sigma",),
    )


def recovery(files: Files) -> Course:
    """Exact divergences of every arm."""
    return Course(
        kind="recovery",
        panels=(
            Panel("kl", "exact KL(data‖model) (nats)", log=True),
            Panel("kl_to_data", "exact KL(model‖data) (nats)", log=True),
        ),
        lines=files.lines,
        numbers=_by_arm(files.lines, {"KL(data‖model)": "kl", "KL(model‖data)": "kl_to_data"}),
        defining=("problem",),
    )


def compare(files: Files) -> Course:
    """The fall of J of every training of every method, by problem."""
    lines = [line | {"arm": f"{line.get('problem')}: {line.get('arm')}"} for line in files.lines]
    return Course(
        kind="compare",
        panels=(
            Panel("fall", "fall of J", x=("evaluations", "network evaluations")),
            Panel("fall", "fall of J", x=("seconds", "processor seconds")),
        ),
        lines=lines,
        numbers=_by_arm(lines, {"fall of J": "fall", "path KL (nats)": "path_kl"}),
        defining=("num_steps",),
    )


def theory(files: Files) -> Course:
    """The running mean of ‖∇ℓ‖² under the paper's schedules, for every problem."""
    return Course(
        kind="theory",
        panels=(Panel("squared_gradient", "running mean of ‖∇ℓ‖²", log=True),),
        lines=files.lines,
        numbers=_by_arm(files.lines, {"running mean of ‖∇ℓ‖²": "squared_gradient"}),
        defining=("particles",),
    )


def _by_arm(lines: list[dict[str, Any]], names: dict[str, str], *also: str) -> dict[str, Number]:
    """Numbers over the seeds of every arm, and of every value of further columns."""
    groups = trainings(lines, "arm", *also)
    numbers: dict[str, Number] = {}
    for label, name in names.items():
        for (arm, *values), runs in groups.items():
            which = "".join(f", {column.replace('_', ' ')} {value}" for column, value in zip(also, values))
            if (number := over_seeds(runs, name)) is not None:
                numbers[f"{label}, {arm}{which}"] = number
    return numbers


def _total(files: Files, name: str) -> int | None:
    total = files.options.get(name)
    return total if isinstance(total, int) else None
