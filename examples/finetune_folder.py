"""Fine-tune a diffusion model from a diffusers folder for a reward of your own, and save a folder again.

    python examples/finetune_folder.py                                      # the shipped digits
    python examples/finetune_folder.py --model MY_FOLDER --out tuned        # your own checkpoint

The folder that it writes loads with `DiffusionPipeline.from_pretrained`.
"""

import argparse
from pathlib import Path

import torch

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Fine-tune a diffusion model for symmetric images.")
parser.add_argument("--model", default="digits", help="A diffusers folder, a hub id, or digits.")
parser.add_argument("--steps", type=int, default=10, help="Steps of the sampler, in training and afterwards.")
parser.add_argument("--updates", type=int, default=30, help="Updates of the network.")
parser.add_argument("--starts", type=int, default=64, help="Starts for the plan and the evaluation, 4 samples each.")
parser.add_argument("--out", type=Path, default=Path("symmetric"), help="Folder for the fine-tuned pipeline.")
options = parser.parse_args()


def symmetry(images: torch.Tensor) -> torch.Tensor:
    """Minus the mean absolute difference to the mirror image, in per cent of full white; (n, C, H, W) → (n,)."""
    return -50 * (images - images.flip(-1)).abs().flatten(1).mean(1)


noise = idf.Noise(0)
pretrained = idf.load_pretrained(options.model)
scheduler = idf.tables.scheduler_for(pretrained.scheduler, "ddpm")
table = idf.read_table(scheduler, options.steps)
chain = idf.Chain(pretrained.denoiser, table, pretrained.event_shape, pretrained_rows="noiseless")

before = idf.evaluate(chain.pretrained(), symmetry, noise.stream(1), starts=options.starts, repeats=4)
plan = idf.make_plan(before)  # what each KL weight can buy, before any training
kl_weight = plan.rows()[1].kl_weight  # for a gain of half a standard deviation
print(f"reward {before.reward.mean():.2f}, standard deviation {plan.reward_std:.2f}; KL weight {kl_weight:.2f}")

adam = torch.optim.Adam(pretrained.denoiser.parameters(), lr=5e-5)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.updates)
update = idf.Update(adam, schedule=schedule, max_grad_norm=plan.reward_std)
loop = idf.Queue(chain, idf.Reward(symmetry) + kl_weight * idf.PathKL(), update, batch=16, noise=noise)
for _ in loop.run(options.updates):
    pass

after = idf.evaluate(chain, symmetry, noise.stream(1), starts=options.starts, repeats=4)
share, share_se = idf.captured(before, after, kl_weight)
print(f"reward {after.reward.mean():.2f}, path KL {after.path_kl.mean():.2f} nats")
print(f"captured {share:.0%} ± {share_se:.0%} of the possible gain")
idf.save_pipeline(options.out, pretrained.denoiser, scheduler, "# Fine-tuned for symmetry")
print(f"saved {options.out}")
