"""Hyper-parameters of Bayesian logistic regression, by the evidence, on scikit-learn's breast cancer data."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Evidence
from implicit_diffusion.potentials import Posterior
from implicit_diffusion.samplers import HMC, MALA, annealed, warm_up
from tests.helpers.latent import F64, Logistic, breast_cancer

FEW = torch.tensor([0, 0, 1])  # two features share a precision, the intercept has its own


def by_quadrature(potential, nodes=20):
    """Log evidence by Gauss–Hermite quadrature about the posterior's mode, in three dimensions."""
    z = torch.zeros(3, dtype=F64)
    for _ in range(30):  # Newton's method; V is convex
        slope, hessian = (
            f(lambda z: potential(z[None])[0], z)
            for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
        )
        z = z - torch.linalg.solve(hessian, slope)
    factor = torch.linalg.inv(torch.linalg.cholesky(hessian)).T
    points, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(nodes))
    unit = torch.cartesian_prod(points, points, points)
    log_weights = torch.cartesian_prod(*[weights.log()] * 3).sum(1) + unit.square().sum(1) / 2
    with torch.no_grad():
        values = torch.cat([potential(part) for part in (z + unit @ factor.T).split(1000)])
    return ((log_weights - values).logsumexp(0) + factor.diagonal().log().sum()).item()


def few_features(m=100):
    features, labels = breast_cancer([0, 1], m)
    return Posterior(Logistic(features, FEW), labels)


def test_the_quadrature_is_exact():
    potential = few_features(30)
    assert by_quadrature(potential, 9) == pytest.approx(by_quadrature(potential, 12), abs=1e-4)


def test_the_gradient_is_that_of_quadrature():
    """Γ from particles that a long chain has left under the posterior, against differences of the log evidence."""
    potential = few_features(30)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
    z = potential.tempered(0.0).sample(500, Noise(0))
    kernel, z = warm_up(HMC(0.2, leapfrogs=4), potential, z, Noise(1), steps=20)
    loop, rows = Single(potential, kernel, Evidence(), sgd, particles=z, noise=Noise(2)), []
    for _ in loop.run(24):
        rows.append(potential.model.log_precision.grad.clone())
        potential.model.log_precision.grad = None
    estimate, differences = torch.stack(rows), []
    for i in range(2):
        ends = []
        for sign in (1, -1):
            potential.model.log_precision.data[i] += sign * 1e-3
            ends.append(-by_quadrature(potential, 9))
            potential.model.log_precision.data[i] -= sign * 1e-3
        differences.append((ends[0] - ends[1]) / 2e-3)
    error = estimate.std(0) / math.sqrt(len(rows) / 2)  # draws follow each other at a distance of one trajectory
    assert ((estimate.mean(0) - torch.tensor(differences, dtype=F64)).abs() < 4 * error).all() and error.max() < 0.02


@pytest.mark.slow
def test_a_single_loop_finds_the_precisions_that_quadrature_finds():
    potential = few_features()

    def objective(log_precision):
        potential.model.log_precision.data = torch.as_tensor(log_precision)
        return -by_quadrature(potential)

    found = minimize(objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-7})
    potential.model.log_precision.data.zero_()
    start = -by_quadrature(potential)
    z = potential.tempered(0.0).sample(1000, Noise(0))
    annealing = annealed(lambda t: potential.tempered(t**3), MALA(0.1), 1000, Noise(1), steps=200)
    adam = torch.optim.Adam(potential.parameters(), lr=0.05)
    loop = Single(potential, MALA(0.1), Evidence(), adam, particles=z, noise=Noise(2), weighted=True)
    loop.refresh(annealing.particles(potential))
    rows = list(loop.run(600))
    here = -by_quadrature(potential)
    assert found.fun < here < found.fun + 0.01 * (start - found.fun)
    assert abs(float(rows[-1]["neg_log_evidence"]) - here) < 0.15
    log_z, error = annealed(lambda t: potential.tempered(t**3), MALA(0.1), 1000, Noise(3), steps=200).log_z(potential)
    assert abs(log_z + here) < 4 * error < 0.3


@pytest.mark.slow
def test_relevance_of_six_features_against_a_long_nested_run():
    """A precision for each of six features: where many steps per update lead, the single loop leads too.

    The evidence's curvature in log τ is at most 1/2, so that a difference of 0.2 is worth 0.01 nats.
    """
    features, labels = breast_cancer([0, 1, 4, 5, 8, 9], 200)
    groups, ends = torch.arange(7), []
    for nested in (False, True):
        potential = Posterior(Logistic(features, groups), labels)
        z = potential.tempered(0.0).sample(100, Noise(0))
        kernel, z = warm_up(MALA(0.05), potential, z, Noise(1), steps=200)
        adam = torch.optim.Adam(potential.parameters(), lr=0.05)
        loop = (
            NestedParticles(
                potential, kernel, Evidence(), adam, particles=z, noise=Noise(2), inner_steps=25, begin="last"
            )
            if nested
            else Single(potential, kernel, Evidence(), adam, particles=z, noise=Noise(3))
        )
        path = [potential.model.log_precision.detach().clone() for _ in loop.run(600)]
        ends.append(torch.stack(path[300:]).mean(0))
    relevant = ends[1] < 1  # the precisions of others rise without end, along an evidence that is flat
    assert 2 < relevant.sum() < 7
    assert (ends[0] - ends[1])[relevant].abs().max() < 0.2
    assert (ends[0] > 1)[~relevant].all()
