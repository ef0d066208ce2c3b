"""Weights shared out over processes (FSDP2): the same run, with less memory in each."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from implicit_diffusion.denoisers.sharded import shard
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import AdjointMatching, ScoreFunction
from tests.denoisers import sharded_cases
from tests.helpers.together import together

CASES = "tests.denoisers.sharded_cases:"
HAS_SUMS = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")  # torch 2.8
sums = pytest.mark.skipif(not HAS_SUMS, reason="this torch divides the gradients that it sums")


def check_same_run(one, many, rtol=1e-10):
    (metrics, state), each = one, many
    for other_metrics, other in each:
        for a, b in zip(metrics, other_metrics, strict=True):
            assert a == pytest.approx(b, rel=rtol, abs=1e-12)
        for name, value in state.items():
            torch.testing.assert_close(other[name], value, rtol=rtol, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("nested", False),
        pytest.param("queue", False, marks=pytest.mark.slow),
        pytest.param("nested", True, marks=pytest.mark.slow),
        pytest.param("queue", True, marks=pytest.mark.slow),
    ],
)
@sums
def test_training_is_that_of_one_process(kind, lora):
    one = sharded_cases.trained(kind, False, lora=lora)
    check_same_run(one, together(2, CASES + "trained_with", kind, True, {"lora": lora}))


@sums
@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("estimator", [AdjointMatching(), ScoreFunction()])
def test_estimators_that_hold_states_fixed_see_shared_weights(estimator, lora):
    options = {"lora": lora, "estimator": estimator}
    one = sharded_cases.trained("queue", False, **options)
    check_same_run(one, together(2, CASES + "trained_with", "queue", True, options))


@sums
def test_each_process_holds_half():
    (alone, predicted), each = sharded_cases.sizes(), together(2, CASES + "sizes")
    for held, foreseen in each:
        assert held < 0.55 * alone  # a tensor with an odd first dimension is not halved
        assert foreseen < 0.55 * predicted


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
@sums
def test_a_state_continues_with_weights_shared_out_or_not(before, after, tmp_path):
    sharded_cases.interrupted(tmp_path / "one", False)
    one = sharded_cases.continued(tmp_path / "one", False)
    together(2, CASES + "interrupted", tmp_path / "two", before)
    check_same_run(one, together(2, CASES + "continued", tmp_path / "two", after))
    check_same_run(one, [sharded_cases.continued(tmp_path / "two", False)])


@pytest.mark.slow
@sums
def test_the_export_loads_in_diffusers(tmp_path):
    import diffusers

    state, _ = together(2, CASES + "exported", tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    loaded = pipeline.unet.state_dict()
    assert {f"model.{name}" for name in loaded} == set(state)
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in loaded.items())


@pytest.mark.slow
@sums
def test_a_process_that_ends_is_noticed_inside_of_the_network():
    with pytest.raises(
        AssertionError, match=r"another process of this run has ended|process 1 ended with status 7"
    ) as e:
        together(2, CASES + "left_alone", timeout=40)
    assert "no answer" not in str(e.value)


@sums
def test_a_single_process_has_nobody_to_share_with():
    with pytest.raises(InvalidInputError, match="this is the only one; start them by torchrun"):
        shard(torch.nn.Linear(2, 2))


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms", raising=False)
    with pytest.raises(InvalidInputError, match=r"torch 2\.8 or newer"):
        shard(torch.nn.Linear(2, 2))
