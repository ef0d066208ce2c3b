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


def trained(steps=CONFIG.steps, folder=None, batch=CONFIG.batch):
    """The network after some steps, its metrics, and what the checkpoint has of the generators."""
    config = replace(CONFIG, steps=steps, batch=batch)
    data = pretrain.images_of(config)
    directory = None if folder is None else RunDirectory(folder)
    unet, _ = training.train(pretrain.training_of(config, data), data, directory)
    return unet.state_dict(), [] if directory is None else directory.read_metrics()


def refused():
    with pytest.raises(InvalidInputError, match=r"`batch` must be a multiple of the number of processes, 2, got 5"):
        trained(batch=5)


@pytest.mark.slow
@pytest.mark.parametrize("W", [2, 3])
def test_several_processes_train_what_one_does(W, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "all").mkdir()
    one, lines = trained(folder=tmp_path / "one")
    each = together(W, "tests.commands.pretrain.test_several_processes:trained", 3, str(tmp_path / "all"))
    for network, own_lines in each:
        for name, weight in network.items():
            torch.testing.assert_close(weight, one[name], rtol=1e-4, atol=2e-6)
            assert torch.equal(weight, each[0][0][name])
        assert [line["loss"] for line in own_lines] == pytest.approx([line["loss"] for line in lines], rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused():
    together(2, "tests.commands.pretrain.test_several_processes:refused")
