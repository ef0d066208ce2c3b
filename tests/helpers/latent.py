"""Models with latent variables: factor analysis, whose evidence is a closed form, and logistic regression."""

import torch
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from implicit_diffusion.potentials import Posterior

F64 = torch.float64


class FactorAnalysis(nn.Module):
    """x_j = W z_j + ε_j with z_j ~ N(0, I_k) and ε_j ~ N(0, diag σ²), a latent z_j for each of m data.

    Probabilistic PCA where `log_std` has shape (1,).
    """

    def __init__(self, m, loadings, log_std):
        super().__init__()
        self.m, self.loadings, self.log_std = m, nn.Parameter(loadings.clone()), nn.Parameter(log_std.clone())

    def prior(self):
        return Normal(self.loadings.new_zeros(()), 1.0).expand((self.m, self.loadings.shape[1]))

    def likelihood(self, z):
        return Normal(z @ self.loadings.T, self.log_std.exp())

    def covariance(self):
        return self.loadings @ self.loadings.T + (2 * self.log_std).exp() * torch.eye(len(self.loadings), dtype=F64)

    def log_evidence(self, data):
        return MultivariateNormal(torch.zeros(data.shape[1], dtype=F64), self.covariance()).log_prob(data).sum()

    @torch.no_grad()
    def posterior(self, data):
        """Mean (m, k) and a factor L (k, k) of the covariance L Lᵀ of every z_j."""
        scaled = self.loadings / (2 * self.log_std).exp()[:, None]
        covariance = torch.linalg.inv(torch.eye(self.loadings.shape[1], dtype=F64) + scaled.T @ self.loadings)
        return data @ scaled @ covariance, torch.linalg.cholesky(covariance)

    def draw(self, data, unit):
        """Latents (n, m, k) under the posterior from standard normal numbers of this shape."""
        mean, factor = self.posterior(data)
        return mean + unit @ factor.T


def factor_data(m, seed=0):
    """m centred points in three dimensions, of which one latent explains most."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 1, generator=generator, dtype=F64) @ torch.tensor([[2.0, -1.0, 0.5]], dtype=F64)
    x = x + torch.tensor([0.4, 0.6, 0.9], dtype=F64) * torch.randn(m, 3, generator=generator, dtype=F64)
    return x - x.mean(0)


def factor_posterior(m=2, k=1, isotropic=True, seed=1):
    """A potential of factor analysis, and its data."""
    loadings = torch.randn(3, k, generator=torch.Generator().manual_seed(seed), dtype=F64)
    data = factor_data(m)
    log_std = torch.full((1 if isotropic else 3,), -0.2, dtype=F64)
    return Posterior(FactorAnalysis(m, loadings, log_std), data), data


class Logistic(nn.Module):
    """Labels with logits ⟨z, features⟩, z_i ~ N(0, 1/τ_g(i)): a precision τ for each group g of features."""

    def __init__(self, features, groups):
        super().__init__()
        self.log_precision = nn.Parameter(torch.zeros(int(groups.max()) + 1, dtype=F64))
        self.register_buffer("features", features)
        self.register_buffer("groups", groups)

    def prior(self):
        return Normal(torch.zeros((), dtype=F64), (-self.log_precision[self.groups] / 2).exp())

    def likelihood(self, z):
        return Bernoulli(logits=z @ self.features.T)


def breast_cancer(features, m=None):
    """Standardised features (m, count) and labels (m,) of scikit-learn's breast cancer data, with a column of ones."""
    from sklearn.datasets import load_breast_cancer

    loaded = load_breast_cancer()
    x = torch.as_tensor(loaded.data[:, features], dtype=F64)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=F64)], 1)
    return x[:m], torch.as_tensor(loaded.target, dtype=F64)[:m]
