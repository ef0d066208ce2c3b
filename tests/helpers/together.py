"""Several processes that compute together, for tests: real ones, connected by gloo, that are started once.

    results = together(2, "tests.test_processes:cut", 6)    # one result per process, or the first error

calls `cut(6)` of tests/test_processes.py in two processes that `torch.distributed` connects. What is passed and
returned is pickled; a case builds its models itself.
"""

import atexit
import importlib
import multiprocessing
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed", "implicit_diffusion", "tests.helpers.together"]
_workers = []


def together(world_size, place, *args, timeout=120):
    """What the function at `place`, "module:name", returns in each of `world_size` processes.

    An error in one of them is raised here, with its traceback, and ends all of them.
    """
    while len(_workers) < world_size:
        _workers.append(_start())
    chosen = _workers[:world_size]
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, pipe) in enumerate(chosen):
            pipe.send((rank, world_size, f"file://{folder}/store", place, args))
        answers = []
        for rank, (worker, pipe) in enumerate(chosen):
            try:
                answers.append(pipe.recv() if pipe.poll(timeout) else (False, f"no answer within {timeout} s"))
            except EOFError:
                worker.join(5)
                answers.append((False, f"process {rank} ended with status {worker.exitcode}"))
    failed = [f"process {rank} of {world_size}: {text}" for rank, (done, text) in enumerate(answers) if not done]
    if failed:
        stop()
        raise AssertionError("\n".join(failed))
    return [result for _, result in answers]


def _start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


@atexit.register
def stop():
    """End all of the processes; the next call starts new ones."""
    for worker, pipe in _workers:
        pipe.close()
        worker.kill()
    _workers.clear()


def _serve(pipe):
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, place, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
            dist.barrier()  # a case that ends at once would break the connections of the others
            module, _, name = place.partition(":")
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
