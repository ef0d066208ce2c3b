"""Commands in real processes that share one import: `python -m tests.helpers.zygote MODULE…` forks one per request.

A request is a line of JSON on stdin. {"words", "folder", "said", "trap"} starts a command in a folder, with its output
in the files said.out and said.err, and is answered by its process id; {"wait": process id}, by its exit status,
negative for a signal; {"stop": process id}, by whether it has been stopped. `tests.helpers.survival` writes them. The
parent never computes: torch refuses to train in a fork of a process that has.
"""

import importlib
import json
import os
import signal
import sys

import torch

from tests.helpers import moments


def start(words, folder, said, trap):
    """Fork a process that runs a command line; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{said}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if trap is not None:
            moments.Trap(**trap).set()
        sys.argv = ["implicit-diffusion", *words]
        from implicit_diffusion.__main__ import main

        code = main()
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve():
    for line in sys.stdin:
        request = json.loads(line)
        if "stop" in request:
            answer = os.WIFSTOPPED(os.waitpid(request["stop"], os.WUNTRACED)[1])
        elif "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = start(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    moments.hasten()
    moments.sketch()
    serve()
    os._exit(0)
