"""What a loop over a chain computes, to compare the runs of several processes with that of one."""

import torch

from implicit_diffusion import processes
from tests.helpers.chain_loops import weights


def recorded(loop, updates):
    """Noise and a path before any update, what is in flight before the first, Γ of all, metrics of every step, and θ.

    The loop's optimizer is a `Recorder`. Called in all processes alike, of which each returns the same.
    """
    metrics, before = [], None
    with processes.sharing():
        path = [processes.gathered(x) for x in loop.chain.trajectory(loop.noise, loop.batch, 1)]
        xi = loop.chain.innovation(loop.noise, loop.batch, [1, 3], [0, 2])
        xi = None if xi is None else processes.gathered(xi, 1)
    while loop.update.updates < updates:
        if not loop.update.updates:
            before = loop.state_dict().get("slots", [])
        metrics.append(numbers(loop.step()))
    gradients = [torch.cat([g.flatten() for g in each]) for each in loop.update.optimizer.gradients]
    noise = path[0], xi
    found = {"noise": noise, "path": path, "before": before, "gammas": gradients}
    return found | {"metrics": metrics, "theta": weights(loop)}


def numbers(metrics):
    return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}


def same_run(each, one, rtol=1e-12, *, states=True):
    """Assert that the processes computed what one did: states to the bit, the rest up to `rtol` of its size.

    Args:
        each: what `recorded` returned in every process.
        one: what it returned without other processes.
        rtol: of Γ, θ and metrics.
        states: whether what is in flight is equal to the bit, as it is unless a network rounds the rows of a smaller
            batch differently (matrix products do); otherwise it is equal up to `rtol`.
    """
    for other in each[1:]:
        assert_equal(other, each[0])
    ours = each[0]
    assert_equal(ours["noise"], one["noise"])
    if states:
        assert_equal(ours["path"], one["path"])
        assert_equal(ours["before"], one["before"])
    for x, y in zip(ours["path"], one["path"], strict=True):
        assert (x - y).abs().max() <= rtol * y.abs().max()
    for a, b in zip(ours["before"], one["before"], strict=True):
        assert {**a, "states": None, "carry": None} == {**b, "states": None, "carry": None}
        for x, y in zip([*a["states"].values(), *a["carry"].values()], [*b["states"].values(), *b["carry"].values()]):
            assert (x - y).abs().max() <= rtol * y.abs().max()
    for a, b in zip([*ours["gammas"], ours["theta"]], [*one["gammas"], one["theta"]], strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()
    assert_close(ours["metrics"], one["metrics"], rtol)


def assert_close(ours, theirs, rtol):
    """Metrics of the same names, each equal up to `rtol` of the largest value that it has in the run."""
    sizes = {}
    for row in theirs:
        for name, value in row.items():
            if isinstance(value, float):
                sizes[name] = max(sizes.get(name, 0.0), abs(value))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = a[name] == b[name] or abs(a[name] - b[name]) <= rtol * sizes[name]
            assert close, (name, a[name], b[name])


def assert_equal(ours, theirs):
    """Equal to the bit, in dicts and lists as well."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_equal(a, b)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
