"""Learning mixture weights back: weighted particles are right where plain ones drift, by divergences that are exact."""

import pytest
import torch

from implicit_diffusion.commands.recovery import command as recovery
from implicit_diffusion.commands.shared.hexagon_problem import LOGITS, HexagonQuadrature, mixture


@pytest.mark.slow
def test_recovery_separates_weighted_from_unweighted(tmp_path):
    """Two modes that particles cannot cross, in a short run: the weighted loop is right where the plain one drifts."""
    config = recovery.Config(problem="two-modes", steps=1000, seeds=1, out=tmp_path / "run")
    arms = recovery.run(config)["arms"]
    assert arms["weighted"]["kl"] < 5e-3
    assert arms["unweighted"]["kl"] > 10 * arms["weighted"]["kl"]
    assert (tmp_path / "run" / "figures" / "kl.png").exists()


@pytest.mark.slow
def test_exact_kls_by_another_grid():
    """Against the quadrature of `HexagonQuadrature`, on the hexagon."""
    target, path = mixture(torch.tensor(LOGITS)), torch.tensor([[0.0] * 6, [1.0, 0, 0, 0, 2, 0]])
    path_kls = recovery.exact_kls(target, path)
    exact = HexagonQuadrature()
    for kls, theta in zip(path_kls, path):
        assert kls[0].item() == pytest.approx(exact.kl_of_weights(torch.tensor(LOGITS), theta), rel=1e-5)
        assert kls[1].item() == pytest.approx(exact.kl_of_weights(theta, torch.tensor(LOGITS)), rel=1e-5)
