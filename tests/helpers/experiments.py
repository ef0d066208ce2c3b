"""Experiments whose information gain is known: linear and Gaussian, or in one dimension by quadrature; float64."""

import math

import torch
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.design import Experiment, GaussianExperiment

F64 = torch.float64


class Normal(nn.Module):
    """−log N(z; 0, diag(deviations²)) + const, with exact draws."""

    def __init__(self, *deviations):
        super().__init__()
        self.deviations = nn.Parameter(torch.tensor(deviations, dtype=F64))

    def forward(self, z):
        return (z / self.deviations).square().sum(1) / 2

    def sample(self, n, noise):
        return self.deviations.detach() * noise.normal((n, len(self.deviations)), dtype=F64)


class Linear(nn.Module):
    """f(z) = Ξ z, with Ξ of shape (measurements, d); scaled to unit rows if asked."""

    def __init__(self, rows, unit=False):
        super().__init__()
        self.rows, self.unit = nn.Parameter(torch.tensor(rows, dtype=F64)), unit

    def matrix(self):
        return self.rows / self.rows.norm(dim=1, keepdim=True) if self.unit else self.rows

    def forward(self, z):
        return z @ self.matrix().mT


def linear_experiment(rows=((1.3,),), deviations=(1.0,), std=0.7, **options):
    return GaussianExperiment(Linear(rows, **options), Normal(*deviations), std)


def linear_gain(experiment):
    """½ log det(I + Ξ S Ξᵀ/σ²), differentiable in the design."""
    matrix = experiment.signal.matrix() * experiment.prior.deviations / experiment.std
    return torch.logdet(torch.eye(len(matrix), dtype=F64) + matrix @ matrix.mT) / 2


def posteriors(experiment, y):
    """Means, with shape (n, d), and the covariance of the posteriors of a linear experiment."""
    matrix, variances = experiment.signal.matrix().detach(), experiment.prior.deviations.detach().square()
    precision = torch.diag(1 / variances) + matrix.mT @ matrix / experiment.std**2
    covariance = torch.linalg.inv(precision)
    return y @ matrix @ covariance / experiment.std**2, covariance


def exact_pairs(experiment, n, seed=0):
    """Pairs of a linear experiment whose contrasts are independent draws from their posterior, N(mean, covariance)."""
    noise = idf.Noise(seed)
    z, epsilon = experiment.draw(n, noise)
    mean, covariance = posteriors(experiment, experiment.outcome(z, epsilon).detach())
    contrast = mean + noise.normal(z.shape, 7, dtype=F64) @ torch.linalg.cholesky(covariance).mT
    return experiment.joined(contrast, z, epsilon)


def exact_pools(experiment, pools, pool, seed=0):
    """Pools of a linear experiment whose samples are independent draws from the pooled posterior.

    It is N(mean of the posteriors' means, their covariance). Also the posteriors' means, (pools, outcomes, d).
    """
    noise, G, M = idf.Noise(seed), pool.outcomes, pool.samples
    z, epsilon = experiment.draw(pools * G, noise)
    means, covariance = posteriors(experiment, experiment.outcome(z, epsilon).detach())
    means, d = means.view(pools, G, -1), z.shape[1]
    contrast = noise.normal((pools, 1, M, d), 7, dtype=F64) @ torch.linalg.cholesky(covariance).mT
    contrast = (contrast + means.mean(1)[:, None, None]).expand(-1, G, -1, -1).reshape(-1, d)
    return experiment.joined(contrast, z.repeat_interleave(M, 0), epsilon.repeat_interleave(M, 0)), means


class Curved(Experiment):
    """y = tanh(ξ_0 z) + s(z) ε with s = 0.4 + (ξ_1 z)²/4: the design moves the noise as well."""

    def __init__(self, design=(0.8, 0.5)):
        super().__init__(Normal(1.0), ())
        self.design = nn.Parameter(torch.tensor(design, dtype=F64))

    def _law(self, z):
        return torch.tanh(self.design[0] * z[:, 0]), 0.4 + (self.design[1] * z[:, 0]) ** 2 / 4

    def outcome(self, z, noise):
        mean, std = self._law(z)
        return mean + std * noise

    def noise_of(self, y, z):
        mean, std = self._law(z)
        return (y - mean) / std

    def log_likelihood(self, y, z):
        mean, std = self._law(z)
        return -(((y - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2


def curved_gain(design):
    """EIG of `Curved` by quadrature over z and y, independent of pairs."""
    experiment = Curved(design)
    z, y = torch.linspace(-7, 7, 201, dtype=F64), torch.linspace(-9, 9, 1501, dtype=F64)
    prior = (-(z**2) / 2).softmax(0)
    grid_y, grid_z = y.repeat(len(z)), z.repeat_interleave(len(y))
    with torch.no_grad():
        log_p = experiment.log_likelihood(grid_y, grid_z[:, None]).view(len(z), len(y))
    evidence = (log_p + prior.log()[:, None]).logsumexp(0)
    return float(prior @ (log_p.exp() * (log_p - evidence)).sum(1) * (y[1] - y[0]))
