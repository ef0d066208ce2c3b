"""Made-up results for the tests of the report: a Gaussian reward in closed form, tilted by hand. No run made them.

With R = m + σ z and a drift that shifts z by a, log dP_θ/dP_0 = a z + a²/2 under θ: the path KL is a²/2, the reward
m + σ a, and a = σ/β is the optimum. A second shift b, of a direction without reward, is what training wastes.
"""

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import torch

from implicit_diffusion.commands.finetune.by_weights import by_weights
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.report.headline import headline_of
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.finetune.summary import MemoryOfStart, ModelSummary, Summary, TrainingSummary
from implicit_diffusion.digits import Appearance, Quality, load_digits
from implicit_diffusion.digits.quality import MMDBetweenHalves
from implicit_diffusion.evaluation import Evaluation, judge, make_plan
from implicit_diffusion.evaluation.chains import mean_and_error

MEAN, STD, BETA, UPDATES = 36.0, 3.3, 3.3, 250


def evaluation(shift=0.0, waste=0.0, starts=512, repeats=4, seed=0, images=None):
    generator = torch.Generator().manual_seed(seed)
    z, w = torch.randn(2, starts, repeats, generator=generator, dtype=torch.float64)
    kl = torch.full_like(z, (shift**2 + waste**2) / 2)
    images = torch.zeros(1, 1, 1, 8, 8) if images is None else images
    samples = images.expand(starts, repeats, *images.shape[2:])
    return Evaluation(MEAN + STD * (z + shift), kl, kl + shift * z + waste * w, samples)


def metrics(shift, waste, queue=True):
    lines = []
    generator = torch.Generator().manual_seed(1)
    for n in range(1, UPDATES + 1):
        share = 1 - math.exp(-4 * n / UPDATES)
        seen = evaluation(share * shift, share * waste, 16, 1, n)
        reward, kl = (
            seen.reward.mean().item(),
            seen.path_kl.mean().item() * (1 + 0.1 * torch.randn((), generator=generator).item()),
        )
        line = {"updates": n, "reward": reward, "path_kl": kl, "objective": BETA * kl - reward, "grad_norm": 1.0}
        line |= {"lr": 1e-4, "seconds": 0.34 * n, "network_evaluations": 480 * n}
        if queue:
            line |= {"staleness_mean": min(n, 9) + 0.0, "staleness_max": min(2 * n, 18)}
        if n % 25 == 0:
            held_out = evaluation(share * shift, share * waste, 128, 1, 7)
            objective = held_out.objective(BETA)
            for name, values in (("reward", held_out.reward), ("path_kl", held_out.path_kl), ("objective", objective)):
                line[f"held_out_{name}"], line[f"held_out_{name}_se"] = mean_and_error(values)
        lines.append(line)
    return lines


def quality(**changes):
    histogram = [0.12, 0.08, 0.1, 0.09, 0.11, 0.1, 0.12, 0.09, 0.11, 0.08]
    look = {"classifier_confidence": 0.985, "judge_confidence": 0.93, "judge_agreement": 0.96, "memorised": 0.01}
    look |= {"nearest_distance": 2.2, "class_histogram": histogram, "mmd": 0.002}
    held_out = Appearance(0.995, 0.955, 0.983, 0.01, 2.14)
    return Quality(**look | {"mmd_reference": MMDBetweenHalves(3e-5, 6e-4), "held_out": held_out} | changes)


def digits_result(**options):
    """What a good run on digits looks like; every caller has a copy."""
    return copy.deepcopy(_digits_result(**options))


@functools.cache
def _digits_result(shift=0.93, waste=0.15, **config):
    real = load_digits().train
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: 512 * 4]
    images = real[order.repeat(2)[: 512 * 4]].unflatten(0, (512, 4))
    before = evaluation(images=images)
    after = evaluation(shift, waste, images=(images + 0.25 * (images > -0.6)).clamp(-1, 1.04))
    judgement = judge(before, after, replace(after, reward=after.reward + 0.01), BETA)
    headline = replace(headline_of(judgement, lr=1e-4, advise=True), reward_std_before=STD)
    training = TrainingSummary(
        kl_weight=BETA,
        kl_weight_at_start=BETA,
        held_out_reward_before=evaluation(0.0, 0.0, 128, 1, 7).reward.mean().item(),
        seconds=84.6,
        network_evaluations=120_000,
        updates=UPDATES,
        stopped=None,
        reached_target=False,
        kept=None,
        staleness_max=18,
        predicted_memory_bytes=10**7,
        estimator="adjoint",
    )
    known = [1, 8, 8], None, None, None, None, None, "DDPM"
    model = ModelSummary(None, None, *known, pipeline_is_the_chain=True, factory=None)
    plan = make_plan(evaluation(starts=256, repeats=16, seed=3))
    looks = quality(), quality(mmd=0.013, judge_confidence=0.935), quality(mmd=0.0135)
    weighted, memory = (
        by_weights(before, after, judgement),
        MemoryOfStart(plan.memory_of_start, plan.memory_of_start_se),
    )
    summary = Summary(headline, weighted, training, model, memory, plan.rows(), *looks)
    options = {
        "kl_weight": BETA,
        "scheduler": "ddpm",
        "num_steps": 10,
        "stride": 1,
        "lr": 1e-4,
        "no_clip": True,
        "eta": None,
    }
    options |= {"updates": UPDATES, "device": "cpu", "out": Path("runs/toy")}
    resolved = Config(**options | config)
    return Result(resolved, summary, plan, before, after, judgement.bound, metrics(shift, waste))


def changed(result, **values):
    """The result with other numbers in its summary, by the names of their fields."""
    summary = result.summary
    for name, value in values.items():
        parts = [
            part for part in ("headline", "by_weights", "training", "model") if hasattr(getattr(summary, part), name)
        ]
        whole = {parts[0]: replace(getattr(summary, parts[0]), **{name: value})} if parts else {name: value}
        summary = replace(summary, **whole)
    return replace(result, summary=summary)


def colour_result():
    """Not digits: three channels, 16 by 24, the nested loop."""
    result = digits_result(loop="nested", model="some/folder")
    smooth = torch.linspace(-1, 1, 24).expand(4, 3, 16, 24) * torch.tensor([1.0, 0.2, -1.0])[:, None, None]
    result = changed(result, **{f"quality_{when}": None for when in ("before", "after", "exported")})
    return replace(
        result,
        before=replace(result.before, samples=smooth.expand(512, 4, 3, 16, 24)),
        after=replace(result.after, samples=(smooth * 0.9 + 0.1).expand(512, 4, 3, 16, 24)),
        metrics=metrics(0.93, 0.15, queue=False),
    )
