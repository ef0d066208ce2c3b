"""The posterior of latent variables z given data, as a potential whose normaliser is the evidence.

    V(z; θ) = −log p(z; θ) − log p(data | z; θ),        Z_θ = ∫ e^{−V} dz = p(data; θ)

A path t ↦ −log p(z; θ) − t log p(data | z; θ) leads from the prior, which is sampled exactly and has Z = 1, to the
posterior: annealed along it, weighted particles estimate log p(data; θ) itself (thermodynamic integration by annealed
importance sampling; Neal, physics/9803008).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from implicit_diffusion.errors import (
    InvalidInputError,
    NonFiniteError,
    check_call,
    check_integer,
    check_number,
    check_type,
    trying,
)
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import ShownModule, brief

ONE_FOR_EACH = "e.g. Normal(mean, scale).expand(shape)"


class Posterior(ShownModule):
    """V(z) = −log p(z; θ) − log p(data | z; θ) of a model that has a prior and a likelihood.

        >>> import torch
        >>> from torch.distributions import Bernoulli, Normal
        >>> from implicit_diffusion import Noise
        >>> from implicit_diffusion.potentials import Posterior
        >>> class Logistic(torch.nn.Module):  # z: a weight per feature
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.log_precision = torch.nn.Parameter(torch.zeros(()))
        ...         self.register_buffer("features", features)
        ...
        ...     def prior(self):
        ...         return Normal(0.0, (-self.log_precision / 2).exp()).expand(self.features.shape[1:])
        ...
        ...     def likelihood(self, z):
        ...         return Bernoulli(logits=z @ self.features.T)
        >>> V = Posterior(Logistic(torch.randn(50, 3)), torch.ones(50))
        >>> V(V.tempered(0.0).sample(8, Noise(0))).shape
        torch.Size([8])

    Latent variables may be common to all data, as here, or one for each: a prior of shape (m, k) with data of shape
    (m, D). Densities come from `torch.distributions`, so that no normaliser is forgotten.

    Args:
        model: θ, a module with two methods: `prior()` is the distribution of one z, whose batch and event shapes
            together are the shape of z, of at least one dimension; `likelihood(z)` that of the data for each of n
            latents, with z of shape (n, *latent), whose shapes together are (n, *data).
        data: what was observed, with shape (*data).

    Attributes:
        event_shape: that of z.

    Raises:
        InvalidInputError: a model without these methods; data that are NaN or infinite; distributions of another
            shape, or a prior that is discrete or confined to a part of space.
    """

    model: Any  # a module, of which `prior` and `likelihood` are called
    data: Tensor
    event_shape: tuple[int, ...]

    def __init__(self, model: nn.Module, data: Shaped[Tensor, "*data"]) -> None:
        super().__init__()
        check_type("model", model, nn.Module, "it has methods prior() and likelihood(z)")
        check_type("data", data, Tensor, "use torch.as_tensor(data)")
        for method in ("prior", "likelihood"):
            if not callable(getattr(model, method, None)):
                raise InvalidInputError(
                    f"model needs a method {method}, but {type(model).__name__} has none; prior() is the "
                    "distribution of z, likelihood(z) that of the data given z"
                )
        check_call("model.prior", model.prior)
        check_call("model.likelihood", model.likelihood, "z")
        if not data.numel() or not data.isfinite().all():
            raise InvalidInputError(
                f"data must be finite and at least one number, got shape {tuple(data.shape)}"
                + (" with NaN or infinity; leave out what was not observed" if data.numel() else "")
            )
        self.model, self.power = model, 1.0
        self.register_buffer("data", data.detach(), persistent=False)
        with torch.no_grad(), trying("model.prior", "()"):
            prior = checked_prior(self.model.prior())
        self.event_shape = tuple(shape_of(prior))
        with torch.no_grad():
            z = Prior(model).sample(2, Noise(0))
            with trying("model.likelihood", f"latents of shape {tuple(z.shape)}"):
                self._check_likelihood(self.model.likelihood(z), z)
            with trying("the density of the likelihood", f"data of shape {tuple(data.shape)}, {data.dtype}"):
                value = self(z)
        if not value.isfinite().all():
            raise InvalidInputError(
                "the data have no finite density under the likelihood of latents from the prior; check the support of "
                "the likelihood, and scales"
            )

    def _words(self) -> Iterable[str]:
        yield brief(self.model)
        yield f"data={brief(self.data)}"
        if self.power != 1:
            yield f"power={self.power:g}"

    def forward(self, z: Float[Tensor, "n *latent"]) -> Float[Tensor, " n"]:
        """V(z).

        Raises:
            InvalidInputError: latents of another shape than the prior's, or a likelihood of another shape than (n,
                *data).
            NonFiniteError: parameters of a distribution that are NaN or out of range.
        """
        if tuple(z.shape[1:]) != self.event_shape:
            raise InvalidInputError(
                f"the prior is a distribution of latents of shape {self.event_shape}, but particles have shape "
                f"{tuple(z.shape[1:])}; they must agree"
            )
        try:
            prior, likelihood = self.model.prior(), self.model.likelihood(z)
        except ValueError as error:  # how torch.distributions refuse their parameters
            numbers = [z, *self.model.parameters()]
            why = "NaN or infinite" if not all(each.isfinite().all() for each in numbers) else "out of range"
            raise NonFiniteError(
                f"a distribution of {type(self.model).__name__} has parameters that are {why}: "
                f"{str(error).splitlines()[0]}; use a smaller step size or learning rate"
            ) from error
        self._check_likelihood(likelihood, z)
        log_prior, log_likelihood = prior.log_prob(z), likelihood.log_prob(self.data)
        return -log_prior.reshape(len(z), -1).sum(1) - self.power * log_likelihood.reshape(len(z), -1).sum(1)

    def tempered(self, t: float) -> nn.Module:
        """−log p(z; θ) − t log p(data | z; θ), of the same θ: at t = 0 the prior, with `sample` and `log_z` = 0.

        The path of `annealed`, whose estimate of log Z is then that of log p(data; θ).
        """
        t = check_number("t", t)
        if t == 0:
            return Prior(self.model)
        path = Posterior.__new__(Posterior)
        nn.Module.__init__(path)
        path.model, path.power, path.event_shape = self.model, t, self.event_shape
        path.register_buffer("data", self.data, persistent=False)
        return path

    def _check_likelihood(self, likelihood: object, z: Tensor) -> None:
        check_type("what likelihood(z) returns", likelihood, Distribution, "of torch.distributions")
        assert isinstance(likelihood, Distribution)
        shape, expected = tuple(shape_of(likelihood)), (len(z), *self.data.shape)
        if shape != expected:
            raise InvalidInputError(
                f"likelihood(z) of {len(z)} latents is a distribution of shape {shape}; for data of shape "
                f"{tuple(self.data.shape)} it must be (n, *data) = {expected}; {ONE_FOR_EACH}"
            )


class Prior(ShownModule):
    """−log p(z; θ), whose law is the prior and whose log Z is 0.

    Args:
        model: θ, with a method `prior`.
    """

    log_z = 0.0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def _words(self) -> Iterable[str]:
        yield brief(self.model)

    def forward(self, z: Float[Tensor, "n *latent"]) -> Float[Tensor, " n"]:
        """−log p(z)."""
        return -self.model.prior().log_prob(z).reshape(len(z), -1).sum(1)

    @torch.no_grad()
    def sample(self, n: int, noise: Noise, *key: int) -> Float[Tensor, "n *latent"]:
        """Draws from the prior, with shape (n, *latent); the same key gives the same draws.

        Args:
            n: how many.
            noise: source of the random numbers.
            key: which draw of this noise.
        """
        check_type("noise", noise, Noise, "use Noise(0), for example")
        check_integer("n", n)
        prior = self.model.prior()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with GlobalGenerators(noise, *key, device=device):  # torch.distributions know no others
            z: Tensor = prior.sample((n,))
        return z


def shape_of(distribution: Distribution) -> torch.Size:
    """The shape of one draw."""
    return torch.Size(distribution.batch_shape + distribution.event_shape)


def checked_prior(prior: Any) -> Distribution:
    """The prior, if it has a density on all of a space with at least one dimension.

    Raises:
        InvalidInputError: it is something else.
    """
    check_type("what prior() returns", prior, Distribution, "of torch.distributions")
    if not math.prod(shape_of(prior)) or not shape_of(prior):
        raise InvalidInputError(
            f"prior() must be a distribution of z with at least one dimension, got shape {tuple(shape_of(prior))}; "
            f"{ONE_FOR_EACH}"
        )
    support: Any = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is not None and support is not constraints.real:
        raise InvalidInputError(
            f"prior() has the support {support}, but particles move on the whole space; write the model in "
            "unconstrained z, e.g. the logarithm of what is positive, and sum discrete variables out"
        )
    return prior
