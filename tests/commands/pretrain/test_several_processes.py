"""Pretraining by several processes is the training of one."""

from dataclasses import replace

import pytest
import torch

from implicit_diffusion.commands.pretrain import command as pretrain
from implicit_diffusion.commands.pretrain import training
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from tests.helpers.together import together

CONFIG = pretrain.Config(steps=3, batch=6, channels=(8, 8), dropout=0.5)


def trained(steps=CONFIG.steps, folder=None):
    """What the checkpoint holds after some steps, and the metrics."""
    config = replace(CONFIG, steps=steps)
    data = pretrain.images_of(config)
    directory = RunDirectory(folder)
    with directory.held():
        training.train(pretrain.training_of(config, data), data, directory)
    return directory.read_checkpoint().state["pretraining"], directory.read_metrics()


def refused():
    with pytest.raises(InvalidInputError, match=r"batch must be a multiple of the number of processes, 2, got 5"):
        config = replace(CONFIG, batch=5)
        training.train(pretrain.training_of(config, pretrain.images_of(config)), pretrain.images_of(config))


def moments(state, name="exp_avg"):
    return torch.cat([own[name].flatten() for own in state["optimizer"]["state"].values()])


@pytest.mark.slow
@pytest.mark.parametrize("W", [2, 3])
def test_several_processes_train_what_one_does(W, tmp_path):
    """With dropout. AdamW divides by small moments, so the gradients are compared, by their mean, not the weights."""
    one, lines = trained(folder=tmp_path / "one")
    each = together(W, "tests.commands.pretrain.test_several_processes:trained", 3, str(tmp_path / "all"))
    for state, own_lines in each:
        assert all(torch.equal(*pair) for pair in zip(state["generators"], one["generators"], strict=True))
        assert (moments(state) - moments(one)).norm() < 1e-5 * moments(one).norm()
        assert all(torch.equal(state["unet"][name], each[0][0]["unet"][name]) for name in state["unet"])
        assert [line["loss"] for line in own_lines] == pytest.approx([line["loss"] for line in lines], rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused():
    together(2, "tests.commands.pretrain.test_several_processes:refused")
