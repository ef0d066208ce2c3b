"""Teach a network what classifier-free guidance does, so that sampling takes one call per step instead of two.

A small network learns handwritten digits by class, with one label in five replaced by "no class". The pretrained chain
is guided; a copy that is called once learns to be near it, by the path KL alone: there is no reward.
"""

import argparse

import torch
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Distil guidance on class-conditional digits.")
parser.add_argument("--guidance", type=float, default=2.0, help="Scale of guidance.")
parser.add_argument("--pretraining", type=int, default=2000, help="Steps on the digits.")
parser.add_argument("--updates", type=int, default=400, help="Updates that learn guidance.")
options = parser.parse_args()
NONE = 10  # the label that stands for no class


class Network(torch.nn.Sequential):
    """The noise in x at time t, under a label."""

    def forward(self, x, t, label):
        angle = t.to(x)[:, None] * torch.pi / 2000
        return super().forward(torch.cat([x, torch.eye(NONE + 1)[label], angle.cos(), angle.sin()], 1))


torch.manual_seed(0)
hidden = [torch.nn.SiLU(), torch.nn.Linear(256, 256), torch.nn.SiLU()]
network = Network(torch.nn.Linear(77, 256), *hidden, torch.nn.Linear(256, 64))
pixels, labels = load_digits(return_X_y=True)
digits, classes = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)
scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
adam = torch.optim.Adam(network.parameters(), lr=1e-3)
for _ in range(options.pretraining):
    which, t, noise = torch.randint(len(digits), (128,)), torch.randint(1000, (128,)), torch.randn(128, 64)
    given = torch.where(torch.rand(128) < 0.2, NONE, classes[which])
    adam.zero_grad()
    (network(scheduler.add_noise(digits[which], noise, t), t, given) - noise).square().mean().backward()
    adam.step()

guided = idf.denoisers.ClassifierFree(idf.denoisers.frozen_copy(network), options.guidance, null={"label": NONE})
rows = {"pretrained_rows": "noiseless", "condition": idf.denoisers.Drawn("label", torch.arange(10))}
chain = idf.Chain(network, idf.read_table(scheduler, 10), (64,), reference=guided, **rows)
adam = torch.optim.Adam(network.parameters(), lr=3e-4)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.updates)
update = idf.Update(adam, schedule=decay, max_grad_norm=1.0)
loop = idf.Queue(chain, 1.0 * idf.PathKL(), update, batch=32, noise=idf.Noise(0))
for name, updates in (("untrained", 0), ("trained", options.updates)):
    for _ in loop.run(updates) if updates else ():
        pass
    cost = idf.evaluate(chain, lambda x: x.sum(1), idf.Noise(1), starts=500).path_kl.mean()
    ours, theirs = (each.sample(idf.Noise(1), 500) for each in (chain, chain.pretrained()))
    print(f"{name:9}  path KL {cost:.2f} nats, pixels {(ours - theirs).abs().mean():.3f} from those under guidance")
