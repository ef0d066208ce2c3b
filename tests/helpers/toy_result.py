"""Made-up outcomes for the tests of the report: a Gaussian reward in closed form, tilted by hand. No run made them.

With R = m + σ z and a drift that shifts z by a, log dP_θ/dP_0 = a z + a²/2 under θ: the path KL is a²/2, the reward
m + σ a, and a = σ/β is the optimum. A second shift b, of a direction without reward, is what training wastes.
"""

import math
from dataclasses import replace

import torch

from implicit_diffusion.commands.finetune.plan import make_plan
from implicit_diffusion.commands.finetune.result import Outcome
from implicit_diffusion.digits import load_digits
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import possible, sharpest
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
    look = {"classifier_confidence": 0.985, "judge_confidence": 0.93, "judge_agreement": 0.96, "memorised": 0.01}
    look |= {"nearest_distance": 2.2}
    held_out = {"classifier_confidence": 0.995, "judge_confidence": 0.955, "judge_agreement": 0.983, "memorised": 0.01}
    held_out |= {"nearest_distance": 2.14}
    histogram = [0.12, 0.08, 0.1, 0.09, 0.11, 0.1, 0.12, 0.09, 0.11, 0.08]
    rest = {"class_histogram": histogram, "mmd": 0.002, "mmd_reference": {"mean": 3e-5, "quantile_95": 6e-4}}
    return look | rest | {"held_out": held_out} | changes


def digits_outcome(shift=0.93, waste=0.15, **summary):
    """What a good run on digits looks like; `summary` overrides its numbers."""
    real = load_digits().train
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: 512 * 4]
    images = real[order.repeat(2)[: 512 * 4]].unflatten(0, (512, 4))
    before = evaluation(images=images)
    after = evaluation(shift, waste, images=(images + 0.25 * (images > -0.6)).clamp(-1, 1.04))
    best = sharpest(before, after, BETA)[0]
    numbers = {}
    for name, values in (
        ("reward_before", before.reward),
        ("reward_after", after.reward),
        ("reward_gain", after.reward - before.reward),
        ("reward_exported", after.reward + 0.01),
        ("exported_less_after", 0 * after.reward + 0.01),
        ("path_kl", after.path_kl),
        ("j_before", before.objective(BETA)),
        ("j_after", after.objective(BETA)),
        ("j_fall", before.objective(BETA) - after.objective(BETA)),
    ):
        numbers[name], numbers[name + "_se"] = mean_and_error(values)
    numbers["held_out_reward_before"] = evaluation(0.0, 0.0, 128, 1, 7).reward.mean().item()
    numbers |= {"j_bound": best.j, "j_bound_se": best.j_se, "kl_weight": BETA}
    numbers["j_possible"], numbers["j_possible_se"] = possible(before, after, BETA)
    numbers |= {"captured": (numbers["j_before"] - numbers["j_after"]) / (numbers["j_before"] - best.j)}
    numbers |= {"captured_se": 0.007, "seconds": 84.6, "network_evaluations": 120_000, "updates": UPDATES}
    numbers |= {"stopped": None, "clipping": None, "quality_before": quality()}
    numbers |= {"quality_after": quality(mmd=0.013, judge_confidence=0.935), "quality_exported": quality(mmd=0.0135)}
    config = {"model": "digits", "reward": "brightness", "kl_weight": BETA, "target_kl": None, "plan": False}
    config |= {"out": "runs/toy", "loop": "queue", "scheduler": "ddpm", "num_steps": 10, "batch": 16, "stride": 1}
    config |= {"updates": UPDATES, "lr": 1e-4, "ema": None, "no_clip": True, "seed": 0, "device": "cpu", "eta": 1.0}
    plan = make_plan(evaluation(starts=256, repeats=16, seed=3))
    return Outcome(config, numbers | summary, plan, before, after, best, metrics(shift, waste))


def colour_outcome():
    """Not digits: three channels, 16 by 24, the nested loop."""
    outcome = digits_outcome()
    smooth = torch.linspace(-1, 1, 24).expand(4, 3, 16, 24) * torch.tensor([1.0, 0.2, -1.0])[:, None, None]
    summary = outcome.summary | {f"quality_{when}": None for when in ("before", "after", "exported")}
    return replace(
        outcome,
        config=outcome.config | {"loop": "nested", "model": "some/folder"},
        summary=summary,
        before=replace(outcome.before, samples=smooth.expand(512, 4, 3, 16, 24)),
        after=replace(outcome.after, samples=(smooth * 0.9 + 0.1).expand(512, 4, 3, 16, 24)),
        metrics=metrics(0.93, 0.15, queue=False),
    )
