"""A file with models of a user's own: one whose chain has closed forms, and a small network in several settings."""

FILE = """
import pathlib

import torch
from diffusers import DDPMScheduler

import implicit_diffusion as idf

(pathlib.Path(__file__).parent / "executed").touch()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.classes = torch.nn.Embedding(3, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1.5, p.numel()).view_as(p))

    def forward(self, x, t, class_labels=None):
        h = self.first(torch.cat([x, t[:, None] / 20], 1))
        h = h if class_labels is None else h + self.classes(class_labels)
        return self.last(h.tanh())


def table(rows=3):
    return idf.tables.ou_reverse_sde(rows, 1.5)


def gaussian(rows=3):
    score = idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.tensor([0.5, -1.0]), 0.5)
    return idf.DiffusionModel(score, table(rows), (2,))


def net():
    return idf.DiffusionModel(Net(), table(), (2,))


def scheduled():
    return idf.DiffusionModel(Net(), DDPMScheduler(num_train_timesteps=20, clip_sample=False), (2,))


def classes():
    return idf.DiffusionModel(Net(), table(), (2,), num_classes=3)


def images(z):
    return torch.stack([z, -z], 1)[:, None]


def latent():
    return idf.DiffusionModel(Net(), table(), (2,), decoder=images)


def drifting():
    model = net()
    with torch.no_grad():
        model.denoiser.first.weight.add_(torch.rand((), generator=torch.Generator().manual_seed(torch.seed() % 2**60)))
    return model


def broken():
    return 1 / 0


def wrong(event_shape=(2,), width=2):
    network = Net()
    network.last = torch.nn.Linear(4, width)
    return idf.DiffusionModel(network, table(), event_shape)


VALUE = 3


def right(x):
    return x[:, 0]


def corner(images):
    return images[:, 0, 1, 0]
"""


def home(folder):
    """The folder, with own.py in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(FILE)
    return folder
