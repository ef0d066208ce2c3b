"""An update waits for its device once, for the check that all is finite; nothing else in a loop does."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.denoisers.embedding_table import EmbeddingTable
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.gradients import AdjointMatching, ScoreFunction, loss_scaling
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.models.pipelines.arguments import Constant, PerSample, State, Time
from implicit_diffusion.models.pipelines.denoiser import PipelineDenoiser, Plan, PlannedCall
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory, console, state
from implicit_diffusion.runs import fit as driver
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny
from tests.helpers.oracles import table
from tests.helpers.waits import DEVICE, Waits

N = 3


@pytest.fixture(autouse=True)
def no_numbers(monkeypatch):
    """A device without numbers has no generators."""
    empty = lambda self, shape, *key, device="cpu", dtype=None: torch.empty(shape, device=device, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(Noise, "normal", empty)


class Convolution(nn.Module):
    """The smallest network of images, under labels."""

    def __init__(self):
        super().__init__()
        self.layer, self.labels = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(3, 1)

    def forward(self, x, timestep, class_labels=None, words=None, return_dict=True):
        y = self.layer(x) + timestep[:, None, None, None]
        y = y if words is None else y + words[:, :1, None, None]
        return (y if class_labels is None else y + self.labels(class_labels)[..., None, None],)


def build(
    kind, *, estimator=None, network=None, precision=None, guided=False, negatives=None, pretrained=(N - 1,), **options
):
    denoiser = inner = DiffusersDenoiser(network or Convolution()).to(DEVICE)
    condition = None
    if guided:
        denoiser = ClassifierFree(denoiser, 3.0, {"class_labels": 0})
        condition = Drawn("class_labels", torch.arange(3))
    if negatives is not None:  # embeddings of prompts and of the negative prompt of each, on the host
        embeddings = {"words": torch.zeros(4, 5)}
        if negatives == "shared":
            embeddings = EmbeddingTable(embeddings, torch.tensor([0, 1, 0, 3]))
        denoiser = ClassifierFree(Embedded(denoiser, embeddings), 3.0, {"prompt": torch.tensor([3, 2, 3])})
        condition = Drawn("prompt", torch.arange(3))
    inner.precision = precision
    chain = Chain(denoiser, table(N), (1, 8, 8), pretrained_rows=pretrained, condition=condition)
    adam = torch.optim.Adam(denoiser.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 100)
    update = Update(adam, schedule=schedule, max_grad_norm=1.0, **options)
    objective = Reward(lambda x: x.flatten(1).mean(1)) + PathKL()
    return kind(chain, objective, update, batch=2, noise=Noise(0), estimator=estimator)


CASES = {
    "queue": {"kind": Queue},
    "nested": {"kind": Nested},
    "a U-Net of diffusers": {"kind": Nested, "network": tiny.unet(**tiny.PLAIN)},
    "rows that keep u_0 amid others": {"kind": Queue, "pretrained": (1,)},
    "guidance": {"kind": Queue, "guided": True},
    "a table of prompts": {"kind": Nested, "negatives": "own"},
    "a table whose prompts share rows": {"kind": Queue, "negatives": "shared"},
    "an average of the weights": {"kind": Queue, "ema_decay": 0.9},
    "accumulation": {"kind": Nested, "accumulate": 2},
    "the score function": {"kind": Queue, "estimator": ScoreFunction()},
    "adjoint matching": {"kind": Queue, "estimator": AdjointMatching()},
}


SLOW = {"a U-Net of diffusers"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_an_iteration_waits_once(case):
    with Waits() as waits:
        loop = build(**CASES[case])
        for _ in range(2 * N + 1 if CASES[case]["kind"] is Queue else 1):  # filled, all rows on the device
            loop.step()
        waits.seen.clear()
        loop.step()
    assert [what for what, _ in waits.seen] == ["a number is read"], waits.seen
    assert "update.py" in waits.seen[0][1][-1]


def test_a_scale_for_float16_waits_for_nothing():
    layer = nn.Linear(4, 4).to(DEVICE)
    with Waits() as waits:
        u = layer(torch.empty(3, 4, device=DEVICE))
        loss_scaling.backward(u.square().sum(), (u, None), layer.parameters())
    assert layer.weight.grad is not None and not waits.seen


def test_a_run_waits_once_an_update_and_reads_its_metrics_together(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "checkpoint", lambda *arguments, **options: None)  # would read the weights
    monkeypatch.setattr(driver, "unsound", lambda *arguments: None)  # likewise, before a checkpoint
    on_cpu = lambda noise, *key, device: GlobalGenerators(noise, *key)  # noqa: E731
    monkeypatch.setattr(state, "GlobalGenerators", on_cpu)  # the device has no generators
    monkeypatch.setattr(driver, "READ_EVERY", float("inf"))
    monkeypatch.setattr(console.Progress, "_is_due", lambda self: False)
    monkeypatch.setattr(console.Progress, "close", lambda self: None)
    directory, updates = RunDirectory.create(tmp_path / "run"), 6
    with Waits() as waits:
        loop = build(Nested)
        loop.step()
        waits.seen.clear()
        driver.fit(loop, 1 + updates, directory=directory)
    kinds = {what: len(list(same)) for what, same in itertools.groupby(sorted(what for what, _ in waits.seen))}
    assert kinds == {"a number is read": updates, "numbers are read": 1}, waits.seen
    assert [line["updates"] for line in directory.read_metrics()] == list(range(2, 2 + updates))


@pytest.mark.parametrize(
    ("waiting", "what"),
    [
        (lambda x: x.sum().item(), "a number is read"),
        (lambda x: bool(x.isfinite().all()), "a number is read"),
        (lambda x: x.tolist(), "numbers are read"),
        (lambda x: x[[0, 1]], "an index by a list"),
        (lambda x: x + torch.tensor(1.0, device=DEVICE), "a tensor made of numbers"),
        (lambda x: x + torch.ones(3).to(DEVICE), "a copy"),
        (lambda x: x.to("cpu", non_blocking=True), "a copy"),
    ],
)
def test_the_test_sees_waits(waiting, what):
    with Waits() as waits, contextlib.suppress(NotImplementedError):  # there are no numbers to copy
        waiting(torch.empty(3, device=DEVICE))
    assert [seen for seen, _ in waits.seen] == [what]


def test_a_pipeline_that_was_read_waits_for_nothing():
    """Its embeddings, masks and numbers are constants of the plan, read on the host."""

    class Network(nn.Module):
        def forward(self, sample, timestep, words, extra, return_dict=True):
            return (sample + words[:, :1, None, None] + timestep[:, None, None, None] + extra["scale"],)

    roles = {
        "sample": State(1, (1, 8, 8), False),
        "timestep": Time(1, (), None),
        "words": PerSample(1, (torch.zeros(4, 5),)),
        "extra": {"scale": Constant(torch.ones(()))},
    }
    denoiser = PipelineDenoiser(Network(), Plan((PlannedCall(roles, (1.0,)),), 4))
    x, t, which = (torch.empty(shape, device=DEVICE) for shape in ((2, 1, 8, 8), (2,), (2,)))
    with Waits() as waits:
        denoiser(x, t, prompt=which.long())
        waits.seen.clear()
        denoiser(x, t, prompt=which.long())
    assert not waits.seen
