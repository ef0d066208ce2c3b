"""The Gaussian denoiser: a network u whose chain has closed forms.

For data X_0 ~ N(μ, diag v) and a process x_t = α x_0 + σ ε (α² + σ² = 1 for diffusion models, α + σ = 1 for flow
matching), all targets of a network are known. With the marginal variance w = α² v + σ² and the centred
state r = (x − αμ)/w (all elementwise),

    score       S = ∇log p_t(x)       = −r
    epsilon     ε̂ = E[ε | x_t = x]    = σ r
    sample      x̂ = E[X_0 | x_t = x]  = μ + α v r
    v           v̂ = α ε̂ − σ x̂        = (1 − v) ασ r − σμ      (Salimans & Ho, arXiv 2202.00512, appendix D)
    flow        E[ε − X_0 | x_t = x]  = ε̂ − x̂                 (Lipman et al., arXiv 2210.02747, from data to noise)

u is affine in x, so a chain of it is a linear Gaussian recursion: means, variances, path KL and the best
control under a quadratic reward are closed forms. It is also the smallest network that can be trained, since
μ is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.errors import (
    InvalidInputError,
    check_call,
    check_choice,
    check_number,
    check_tensor,
    shown,
)
from implicit_diffusion.showing import ShownModule, of_tensor
from implicit_diffusion.tables.flow import is_flow
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_marginal

Marginal = Callable[[Tensor], tuple[Tensor, Tensor]]
PREDICTIONS = ("score", "epsilon", "sample", "v_prediction", "flow_prediction")


class GaussianDenoiser(ShownModule):
    """Exact u(x, t) for data N(mean, diag(variance)) under x_t = α(t) x_0 + σ(t) ε.

    Args:
        mean: μ with the event shape; becomes the trainable parameter `mean`.
        variance: v > 0, a number or a tensor that broadcasts to the event shape; becomes the buffer
            `variance`.
        marginal: t ↦ (α(t), σ(t)), both with the shape of t. `GaussianDenoiser.ornstein_uhlenbeck` and
            `GaussianDenoiser.from_scheduler` supply it.
        prediction: "score", "epsilon", "sample", "v_prediction" or "flow_prediction".

    Raises:
        InvalidInputError: unknown prediction, variance not positive or not of the event's shape.
    """

    mean: nn.Parameter
    variance: Tensor

    def __init__(
        self,
        mean: Float[Tensor, "*event"],
        variance: Float[Tensor, "..."] | float,
        marginal: Marginal,
        prediction: str = "score",
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        check_tensor("mean", mean, "*event", finite=True)
        check_call("marginal", marginal, "t")
        if not isinstance(variance, Tensor):
            variance = check_number("variance", variance, 0)
        elif not variance.is_floating_point() or variance.is_meta or variance.layout != torch.strided:
            raise InvalidInputError(f"variance must hold floating-point numbers, got {shown(variance)}")
        spread = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
        try:
            spread = spread.expand(mean.shape).clone()
        except RuntimeError as error:
            raise InvalidInputError(
                f"variance has shape {tuple(spread.shape)}, which does not broadcast to the mean's {tuple(mean.shape)}."
            ) from error
        if not (spread.isfinite().all() and (spread > 0).all()):
            raise InvalidInputError("variance must be positive and finite in every coordinate.")
        self.mean = nn.Parameter(mean.detach().clone())
        self.register_buffer("variance", spread)
        self.marginal = marginal
        self.prediction = prediction

    def _words(self) -> Iterable[str]:
        return self.prediction, f"mean={of_tensor(self.mean)}"

    @classmethod
    def ornstein_uhlenbeck(
        cls, mean: Float[Tensor, "*event"], variance: Float[Tensor, "..."] | float, prediction: str = "score"
    ) -> GaussianDenoiser:
        """In the time of dX = −X dt + √2 dB, for the chains of `ou_reverse_sde` and `ou_probability_flow`."""
        return cls(mean, variance, ou_marginal, prediction)

    @classmethod
    def from_scheduler(
        cls,
        mean: Float[Tensor, "*event"],
        variance: Float[Tensor, "..."] | float,
        scheduler: Any,
        prediction: str | None = None,
    ) -> GaussianDenoiser:
        """A denoiser in the timesteps of a diffusers scheduler: integers with α² = alphas_cumprod[t], or a flow's t =
        T(1 − α).

        `prediction` defaults to the scheduler's `prediction_type`, which is what its chain expects, and to
        "flow_prediction" for flows.

        Raises:
            InvalidInputError: the scheduler is not of a flow model and has no `alphas_cumprod`.
        """
        if is_flow(scheduler):
            marginal = FlowMarginal(scheduler.config.num_train_timesteps)
            return cls(mean, variance, marginal, "flow_prediction" if prediction is None else prediction)
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            raise InvalidInputError(
                f"{type(scheduler).__name__} has no alphas_cumprod, so its process is not "
                "variance-preserving; give GaussianDenoiser the marginal t ↦ (α, σ) instead."
            )
        return cls(
            mean,
            variance,
            DiscreteMarginal(scheduler.alphas_cumprod),
            scheduler.config.prediction_type if prediction is None else prediction,
        )

    def forward(self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """u(x, t) with one time per sample."""
        alpha, sigma = (c.to(x).reshape(-1, *[1] * (x.ndim - 1)) for c in self.marginal(t))
        r = (x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)
        if self.prediction == "score":
            return -r
        if self.prediction == "epsilon":
            return sigma * r
        if self.prediction == "sample":
            return self.mean + alpha * self.variance * r
        if self.prediction == "flow_prediction":
            return (sigma - alpha * self.variance) * r - self.mean
        return (1 - self.variance) * alpha * sigma * r - sigma * self.mean


class DiscreteMarginal(nn.Module):
    """t ↦ (√ᾱ_t, √(1 − ᾱ_t)) for integer timesteps t, from the T numbers ᾱ (`alphas_cumprod`)."""

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Float[Tensor, " timesteps"]) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().double().clone())

    def forward(self, t: Shaped[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """α and σ with the shape of `t`; times are rounded to integers."""
        alpha_bar = self.alphas_cumprod[t.round().long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class FlowMarginal(nn.Module):
    """t ↦ (1 − σ, σ) with σ = t/T, the straight path of flow matching in the timesteps of diffusers.

    Args:
        timesteps: T, `num_train_timesteps` of the scheduler.
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, t: Shaped[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """α and σ with the shape of `t`."""
        sigma = t.double() / self.timesteps
        return 1 - sigma, sigma
