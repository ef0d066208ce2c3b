"""Command lines in several real processes, as a launcher starts them, without the time that imports take.

    with launched(2, ["recovery", "--out", str(tmp_path)]) as run:
        run.signal(1, signal.SIGKILL)
    run.status, run.stdout, run.stderr      # of every process, in order

The processes are forked from one that has imported everything, get the variables that torchrun sets, and find its store
in this process. What ends one does not end the others, as a launcher would: they have to notice by themselves.
"""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.helpers.together import PRELOADED

MOST = 60.0  # seconds


class Launched:
    def __init__(self, world_size, words, folder, env, patch):
        folder.mkdir(parents=True, exist_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        variables = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.files = [folder / f"{rank}" for rank in range(world_size)]
        self.processes = []
        for rank, file in enumerate(self.files):
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env
            process = context.Process(target=_run, args=(words, own, str(file), patch), daemon=True)
            process.start()
            self.processes.append(process)

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def wait_for(self, condition, what):
        """Wait until something is true, while all processes run."""
        due = time.monotonic() + MOST
        while not condition():
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < due, f"waited for {what}; {[file_text(f, '.err') for f in self.files]}"
            time.sleep(0.01)

    def wait(self):
        """Wait for all; the seconds from the first end to the last."""
        due, ends = time.monotonic() + MOST, {}
        while len(ends) < len(self.processes) and time.monotonic() < due:
            for rank, process in enumerate(self.processes):
                if rank not in ends and not process.is_alive():
                    ends[rank] = time.monotonic()
            time.sleep(0.01)
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        self.status = [process.exitcode for process in self.processes]
        self.stdout, self.stderr = ([file_text(f, end) for f in self.files] for end in (".out", ".err"))
        assert not hung, f"hangs; {self.stderr}"
        return max(ends.values()) - min(ends.values())


@contextmanager
def launched(world_size, words, folder, env=(), patch=None):
    """The processes; waited for at the end of the block. `patch`, "module:name", is called first in each of them."""
    run = Launched(world_size, words, Path(folder), dict(env), patch)
    try:
        yield run
        run.seconds = run.wait()
    finally:
        for process in run.processes:
            process.kill()


def file_text(file, end):
    path = file.with_suffix(end)
    return path.read_text() if path.exists() else ""


def _run(words, variables, file, patch):
    import importlib

    import torch

    for number, end in ((1, ".out"), (2, ".err")):
        descriptor = os.open(file + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from implicit_diffusion import cli

    if patch is not None:
        module, _, name = patch.partition(":")
        getattr(importlib.import_module(module), name)()
    sys.exit(cli.main(words))
