"""Teach a network what classifier-free guidance does, so that sampling takes one call per step instead of two.

A small network learns handwritten digits by class, with one label in five replaced by "no class". The pretrained chain
is guided; a copy that is called once learns to be near it, by the path KL alone: there is no reward.
"""

import argparse

import torch
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Distil guidance on class-conditional digits.")
parser.add_argument("--guidance", type=float, default=3.0, help="Scale of guidance.")
parser.add_argument("--pretraining", type=int, default=2000, help="Steps on the digits.")
parser.add_argument("--updates", type=int, default=200, help="Updates that learn guidance.")
options = parser.parse_args()
NONE = 10  # the label that stands for no class


class Network(torch.nn.Sequential):
    """The noise in x at time t, under a label."""

    def forward(self, x, t, label):
        angle = t.to(x)[:, None] * torch.pi / 2000
        return super().forward(torch.cat([x, torch.eye(NONE + 1)[label], angle.cos(), angle.sin()], 1))


torch.manual_seed(0)
layers = [
    torch.nn.Linear(77, 256),
    torch.nn.SiLU(),
    torch.nn.Linear(256, 256),
    torch.nn.SiLU(),
    torch.nn.Linear(256, 64),
]
network, (pixels, labels) = Network(*layers), load_digits(return_X_y=True)
digits, classes = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)
judge = SVC(gamma=0.05).fit(digits.numpy(), labels)
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
adam = torch.optim.Adam(network.parameters(), lr=1e-3)
update = idf.Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.updates))
loop = idf.Queue(chain, 1.0 * idf.PathKL(), update, batch=32, noise=idf.Noise(0))
for name, each, updates in (
    ("guided", chain.pretrained(), 0),
    ("plain", chain, 0),
    ("trained", chain, options.updates),
):
    for _ in loop.run(updates) if updates else ():
        pass
    seen = idf.evaluate(
        each,
        lambda x, condition: torch.tensor(judge.predict(x.numpy()) == condition["label"].numpy()).float(),
        idf.Noise(1),
        starts=1000,
    )
    print(f"{name:8} path KL {seen.path_kl.mean():5.2f} nats, {seen.reward.mean():.1%} are the digit asked for")
