"""Fine-tuning by several processes, also with weights that are shared out, and continued by other numbers of them."""

import os
import signal

import diffusers
import pytest

from implicit_diffusion import processes
from implicit_diffusion.loops import Queue
from implicit_diffusion.runs.directory import RunDirectory
from tests.commands.test_several_processes import FINETUNE, agree, command
from tests.helpers.launched import launched

pytestmark = pytest.mark.slow
HERE = "tests.commands.finetune.test_several_processes"


def interrupting():
    """Send a signal to the last process after the update whose number is in the environment."""
    step = Queue.step

    def interrupted(self, **options):
        metrics = step(self, **options)
        last = processes.rank() == processes.world_size() - 1
        if last and "grad_norm" in metrics and self.update.updates == int(os.environ["STOP"]):
            signal.raise_signal(signal.SIGTERM)
        return metrics

    Queue.step = interrupted


def several(world_size, words, said, stop=0):
    """A command in several processes, to its end, or up to the update at which a signal stops all of them."""
    with launched(world_size, words, said, env={"STOP": str(stop)}, patch=f"{HERE}:interrupting") as run:
        pass
    assert set(run.status) == {143 if stop else 0}, run.stderr
    assert set(run.stdout[1:] + run.stderr[1:]) <= {""}


LORA = ["--lora-rank", "2", "--accumulate", "2", "--stride", "2"]


@pytest.mark.parametrize(("words", "stop"), [([], 2), (LORA, 0)], ids=["all weights, resumed", "LoRA"])
def test_a_run_with_weights_shared_out_is_that_of_one_process(words, stop, tmp_path):
    words, run = [*FINETUNE, *words], tmp_path / "run"
    several(2, [*words, "--shard", "--out", str(run)], tmp_path / "said", stop)
    if stop:
        assert RunDirectory(run).read_checkpoint(say=pytest.fail).number == stop
        several(2, ["resume", str(run)], tmp_path / "said again")
    one = command(words, tmp_path / "one")
    agree(one, run)
    loaded, expected = (diffusers.DiffusionPipeline.from_pretrained(each / "model").unet for each in (run, one))
    for (name, weight), other in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (weight - other).abs().max() < 1e-5, name  # Adam turns a rounded zero into a part of a step
    files = ({file.relative_to(folder / "model") for file in (folder / "model").rglob("*")} for folder in (one, run))
    assert next(files) == next(files)


def test_a_run_is_continued_by_any_number_of_processes(tmp_path):
    words, run = [*FINETUNE, "--updates", "6"], tmp_path / "run"
    several(2, [*words, "--out", str(run)], tmp_path / "two", stop=2)
    several(1, ["resume", str(run)], tmp_path / "one", stop=4)
    several(3, ["resume", str(run)], tmp_path / "three")
    agree(command(words, tmp_path / "whole"), run)
