import os

import pytest
import torch
import torch.distributed as dist

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, ProcessError
from tests.helpers.together import stop, together

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)


def cut():
    """Own rows of X, the whole of them again, and the same for columns."""
    with processes.sharing():
        own = processes.share(X)
        return own, processes.gathered(own), processes.gathered(processes.share(X, 1), 1), processes.count()


def reductions():
    """Gradients in this process's rows of a function of all rows, by each of the reductions."""
    with processes.sharing():
        results = []
        for of in (
            lambda x: processes.mean(x.square().mean()),
            lambda x: processes.total(x.sin().sum()),
            lambda x: (processes.gathered(x) @ processes.gathered(x).mT).tanh().sum(),
        ):
            x = processes.share(X).clone().requires_grad_()
            value = of(x)
            (gradient,) = torch.autograd.grad(value, x)
            results.append((value.detach(), gradient))
        return results


def outside():
    with processes.sharing(), processes.alone():
        inner = processes.count()
    return processes.count(), inner, processes.world_size(), processes.rank(), torch.equal(processes.share(X), X)


def gradients():
    own = [
        torch.full((5,), float(processes.rank() + 1)),
        torch.ones(2, 2, dtype=torch.float64),
        torch.ones(3).bfloat16(),
    ]
    before = processes.traffic.calls
    with processes.sharing():
        processes.sum_gradients(own)
    return own, processes.traffic.calls - before


def hand_over():
    calls = []

    def function():
        calls.append(processes.rank())
        assert processes.from_main(lambda: 5) == 5  # one inside another asks nobody
        with processes.sharing():
            assert processes.count() == 1
        return {"x": X}

    returned = processes.from_main(function)
    last = processes.rank() == processes.world_size() - 1
    flags = tuple(map(bool, processes.highest(int(last), 0)))
    with pytest.raises(InvalidInputError, match="as it was said"):
        processes.from_main(refuse)
    return calls, torch.equal(returned["x"], X), flags, processes.collected(processes.rank())


def refuse():
    raise InvalidInputError("as it was said")


class LibraryError(OSError):
    """An error that takes more than words, as those of huggingface_hub, and is known where it was raised only."""

    def __init__(self, message, *, response):
        super().__init__(message)


def hand_over_errors_of_others():
    """What each process learns of an error of a library in the main one, and of a refusal by the last one."""

    def fail():
        raise LibraryError("not found", response=404)

    def refuse_in_the_last():
        if processes.rank() == processes.world_size() - 1:
            refuse()
        return processes.rank()

    with pytest.raises(OSError, match="not found"):
        processes.from_main(fail)
    assert processes.everywhere(processes.rank) == processes.rank()
    with pytest.raises(InvalidInputError, match="as it was said"):
        processes.everywhere(refuse_in_the_last)
    return processes.collected(processes.rank())


def interrupted_in_step():
    """One of the processes is interrupted where the others wait for its share of the weights."""

    def part(number):
        if number == 1:
            raise KeyboardInterrupt
        dist.all_reduce(torch.ones(1))

    try:
        list(processes.in_turns(part, range(2), in_step=True))
    except KeyboardInterrupt:
        os._exit(7)


def divides():
    assert processes.check_divides("batch", 6) == 6 // processes.world_size()
    with pytest.raises(
        InvalidInputError, match=r"batch must be a multiple of the number of processes, 3, got 8; use 6 or 9"
    ):
        processes.check_divides("batch", 8)
    with pytest.raises(InvalidInputError, match=r"got 2; use 3"):
        processes.check_divides("batch", 2)


def end_early():
    processes.collected("here")
    if processes.rank() == 1:
        os._exit(7)
    try:
        processes.from_main(lambda: None)
        with processes.sharing():
            processes.total(X)
    except ProcessError as error:
        return "another process of this run has ended" in str(error), processes.from_main(lambda: "alone")
    return "not noticed"


@pytest.mark.parametrize("W", [2, 3])
def test_shares_make_up_the_whole(W):
    each = together(W, "tests.test_processes:cut")
    assert torch.equal(torch.cat([own for own, *_ in each]), X)
    for _, rows, columns, count in each:
        assert torch.equal(rows, X)
        assert torch.equal(columns, X)
        assert count == W


@pytest.mark.parametrize("W", [2, 3])
def test_reductions_have_the_gradients_of_one_number(W):
    x = X.clone().requires_grad_()
    of_one = [x.square().mean(), x.sin().sum(), (x @ x.mT).tanh().sum()]
    for which, value in enumerate(of_one):
        (gradient,) = torch.autograd.grad(value, x)
        each = [results[which] for results in together(W, "tests.test_processes:reductions")]
        assert all(torch.equal(v, each[0][0]) for v, _ in each)  # to the bit in all processes
        torch.testing.assert_close(each[0][0], value.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(torch.cat([g for _, g in each]), gradient, rtol=1e-13, atol=1e-15)


def test_outside_of_sharing_every_process_is_alone():
    assert together(2, "tests.test_processes:outside") == [(1, 1, 2, 0, True), (1, 1, 2, 1, True)]
    assert processes.count() == processes.world_size() == 1
    with processes.sharing():
        assert processes.share(X) is X
        assert processes.gathered(X) is X
    assert processes.from_main(lambda: 3) == 3


def test_gradients_are_summed_in_one_call_per_dtype():
    for own, calls in together(2, "tests.test_processes:gradients"):
        assert own[0].tolist() == [3.0] * 5
        assert own[1].tolist() == [[2.0, 2.0]] * 2
        assert own[2].dtype == torch.bfloat16
        assert own[2].tolist() == [2.0] * 3
        assert calls == 3


def test_the_main_process_hands_over_results_and_errors():
    assert together(2, "tests.test_processes:hand_over") == [
        ([0], True, (True, False), [0, 1]),
        ([], True, (True, False), [0, 1]),
    ]


def test_errors_of_libraries_and_of_other_processes_reach_all():
    assert together(2, "tests.test_processes:hand_over_errors_of_others") == [[0, 1]] * 2


def test_what_processes_cannot_share_equally_is_refused():
    together(3, "tests.test_processes:divides")


def test_a_process_that_ends_is_noticed_at_once():
    with pytest.raises(AssertionError, match="process 1 ended with status 7"):
        together(2, "tests.test_processes:end_early")
    stop()


@pytest.mark.slow
def test_an_interrupt_of_one_that_others_wait_for_in_a_network_ends_all():
    with pytest.raises(AssertionError, match=r"another process of this run has ended|ended with status 7") as e:
        together(2, "tests.test_processes:interrupted_in_step", timeout=20)
    assert "no answer" not in str(e.value)
    stop()
