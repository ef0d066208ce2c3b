"""What a loop over a chain computes, to compare the runs of several processes with that of one."""

import torch

from implicit_diffusion import processes
from tests.helpers.chain_loops import weights


def recorded(loop, updates):
    """What is in flight before the first update, Γ of every update, metrics of every step, θ at the end.

    The loop's optimizer is a `Recorder`. Called in all processes alike, of which each returns the same.
    """
    metrics, before = [], None
    while loop.update.updates < updates:
        if not loop.update.updates:
            before = loop.state_dict().get("slots", [])
        metrics.append(numbers(loop.step()))
    with processes.sharing():
        path = loop.chain.trajectory(loop.noise, loop.batch, 1)
        xi = loop.chain.innovation(loop.noise, loop.batch, [1, 3], [0, 2])
        path, xi = [processes.gathered(x) for x in path[:1]], None if xi is None else processes.gathered(xi, 1)
    gradients = [torch.cat([g.flatten() for g in each]) for each in loop.update.optimizer.gradients]
    return {"before": before, "noise": (path, xi), "gammas": gradients, "metrics": metrics, "theta": weights(loop)}


def numbers(metrics):
    return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}


def same_run(each, one, rtol=1e-12, *, states=True):
    """Assert that the processes computed what one did: states to the bit, the rest up to `rtol` of its size.

    Args:
        each: what `recorded` returned in every process.
        one: what it returned without other processes.
        rtol: of Γ, θ and metrics.
        states: whether what is in flight is equal to the bit, as it is unless networks round rows differently in
            batches of other sizes.
    """
    for other in each[1:]:
        assert_equal(other, each[0])
    ours = each[0]
    assert_equal(ours["noise"], one["noise"])
    if states:
        assert_equal(ours["before"], one["before"])
    for a, b in zip([*ours["gammas"], ours["theta"]], [*one["gammas"], one["theta"]], strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()
    for a, b in zip(ours["metrics"], one["metrics"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = a[name] == b[name] or abs(a[name] - b[name]) <= rtol * max(1.0, abs(b[name]))
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
