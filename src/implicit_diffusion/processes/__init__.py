"""Several processes that compute one run together, as `torch.distributed` has connected them.

Noise is addressed by keys, so that every process can draw the whole of a batch and keep its own rows. Where p stands
for one of W processes and x_p for its share of the samples,

    share(x)        x_p                    the rows that this process keeps of a draw that all of them make
    total(y_p)      Σ_p y_p                differentiable in y_p, with the gradient 1
    mean(y_p)       (1/W) Σ_p y_p          likewise, with the gradient 1/W
    gathered(x_p)   (x_0, …, x_{W−1})      likewise, with the gradient's own rows

The gradients are those of *one* number, which all processes compute, with respect to what is a process's own: no
backward pass communicates. Γ is then the sum of the processes' gradients (`sum_gradients`), once per update.

Samples are shared out inside `sharing()` only, which loops and evaluations enter; everywhere else, and where there is a
single process, each function is the identity. Whoever enters it must do so in all processes alike. Files belong to the
main process: `from_main` calls a function there, and hands its result, or its error, to all. What is done
while an error is on its way (`finally`, the end of a context) asks nobody, since the error may be that of one process
(`main_alone`).
"""

from implicit_diffusion.processes.group import alone, count, is_main, rank, sharing, traffic, world_size
from implicit_diffusion.processes.main_process import (
    collected,
    everywhere,
    from_main,
    highest,
    in_turns,
    main_alone,
    main_only,
)
from implicit_diffusion.processes.parts import is_part, own, part_of, whole
from implicit_diffusion.processes.shares import check_divides, gathered, mean, share, sum_gradients, total

__all__ = [
    "alone",
    "check_divides",
    "collected",
    "count",
    "everywhere",
    "from_main",
    "gathered",
    "highest",
    "in_turns",
    "is_main",
    "is_part",
    "main_alone",
    "main_only",
    "mean",
    "own",
    "part_of",
    "rank",
    "share",
    "sharing",
    "sum_gradients",
    "total",
    "traffic",
    "whole",
    "world_size",
]
