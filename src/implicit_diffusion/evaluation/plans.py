"""The plan before a run: what each KL weight β can buy, from pretrained samples alone.

A few trajectories from each of many x_0, scored once, give for every β the reward gain and the path KL of the tilted
law dP* ∝ e^{R/β} dP_0, which no fine-tuning can beat in J = −E R + β·KL (`implicit_diffusion.evaluation.bounds`). They
also show how far the chain is from memoryless. For a Gaussian reward of standard deviation σ the gain is σ²/β, so the
plan tries those β that would gain round multiples of σ.

Where samples are drawn under prompts or class labels, the sampler does not control these either: the bound is then the
one given the start (x_0 and its prompt), and σ is the deviation between samples of one start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.bounds import Bound, bound
from implicit_diffusion.evaluation.chains import Evaluation, mean_and_error
from implicit_diffusion.evaluation.each_reward import RewardPlan, deviation, plan_rewards
from implicit_diffusion.evaluation.gains import gain, gain_of_j, memory_of_start
from implicit_diffusion.showing import Shown, brief, with_error

GAINS = (0.25, 0.5, 1.0, 1.5, 2.0)  # in standard deviations of the pretrained reward


@dataclass(frozen=True, repr=False)
class PlanRow(Shown):
    """What one β can buy: gains relative to the pretrained chain, J in units of reward, standard errors as `…_se`."""

    kl_weight: float
    reward_gain: float
    reward_gain_se: float
    reward_gain_in_std: float
    path_kl: float
    path_kl_se: float
    j_gain: float
    j_gain_se: float
    effective_samples: float
    trusted: bool


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What each β can buy.

    Args:
        reward: E R of the pretrained chain.
        reward_se: its standard error.
        reward_std: standard deviation of R between samples.
        bounds: the optimum for each β, the largest β first. They are unconditional bounds, which are never too
            pessimistic and are tight where `memory_of_start` is small, or bounds given the start where `conditional` is
            set. Empty where the plan was asked for no β.
        gain_se: standard error of each bound's gain of reward.
        j_gain_se: standard error of each bound's gain of J.
        memory_of_start: share of the reward's variance that x_0 decides; 0 for a memoryless chain.
        memory_of_start_se: its standard error.
        conditional: whether the bounds are given the start.
        rewards: what of each reward is gained at each β, where R is made of several; otherwise empty.
    """

    reward: float
    reward_se: float
    reward_std: float
    bounds: tuple[Bound, ...]
    gain_se: tuple[float, ...]
    j_gain_se: tuple[float, ...]
    memory_of_start: float
    memory_of_start_se: float
    conditional: bool = False
    rewards: tuple[RewardPlan, ...] = ()

    def _words(self) -> Iterable[str]:
        yield f"reward={with_error(self.reward, self.reward_se)}"
        yield f"reward_std={self.reward_std:.3g}"
        yield f"betas={brief([b.beta for b in self.bounds])}"
        yield f"memory_of_start={with_error(self.memory_of_start, self.memory_of_start_se)}"

    def rows(self) -> list[PlanRow]:
        """The table: one row per β."""
        return [
            PlanRow(
                kl_weight=b.beta,
                reward_gain=b.reward - self.reward,
                reward_gain_se=gain_se,
                reward_gain_in_std=(b.reward - self.reward) / self.reward_std,
                path_kl=b.path_kl,
                path_kl_se=b.path_kl_se,
                j_gain=-self.reward - b.j,
                j_gain_se=j_gain_se,
                effective_samples=b.effective_samples,
                trusted=b.trusted,
            )
            for b, gain_se, j_gain_se in zip(self.bounds, self.gain_se, self.j_gain_se, strict=True)
        ]

    def beta_for_gain(self, deviations: float = 1.0) -> float:
        """The β, among those of the plan, whose optimum gains most nearly `deviations` standard deviations of reward.

        Raises:
            InvalidInputError: the plan has no β.
        """
        if not self.bounds:
            raise InvalidInputError("the plan was asked for no β; make one with make_plan(evaluation)")
        return min(self.rows(), key=lambda row: abs(row.reward_gain_in_std - deviations)).kl_weight

    def to_json(self) -> dict[str, Any]:
        """The statistics of the reward and the table, as plain numbers."""
        statistics = {
            name: getattr(self, name)
            for name in ("reward", "reward_se", "reward_std", "memory_of_start", "memory_of_start_se")
        }
        several = {"rewards": [asdict(each) for each in self.rewards]} if self.rewards else {}
        return statistics | {"rows": [asdict(row) for row in self.rows()]} | several

    def state_dict(self) -> dict[str, Any]:
        """All fields as plain numbers, from which `from_state` makes the plan again."""
        return asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Plan:
        """The plan whose `state_dict` this is."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in state.items()
        }
        fields["rewards"] = tuple(
            RewardPlan(**each | {name: tuple(each[name]) for name in ("gain", "gain_se")}) for each in state["rewards"]
        )
        return Plan(**fields | {"bounds": tuple(Bound(**b) for b in state["bounds"])})


def make_plan(
    evaluation: Evaluation,
    betas: Sequence[float] | None = None,
    *,
    asked: float | None = None,
    conditional: bool = False,
) -> Plan:
    """The plan from trajectories of the pretrained chain, several per start.

    Args:
        evaluation: of the pretrained chain; 256 starts with 16 repeats resolve a gain of two deviations.
        betas: KL weights to try, in reward per nat; by default those of `GAINS`. With an empty sequence the plan has
            the statistics of the reward alone, as for a penalty that is not a KL and has no bound.
        asked: a further KL weight.
        conditional: use the bounds given the start, as for chains under prompts or class labels.

    Raises:
        InvalidInputError: the reward does not vary over the samples, so that nothing can be tilted; fewer than 3
            starts or 2 repeats; a KL weight that `bound` refuses.
    """
    reward, reward_se = mean_and_error(evaluation.reward)
    std = deviation(evaluation.reward, conditional=conditional)
    if not std > 0:
        raise InvalidInputError(f"reward is {reward:g} for every pretrained sample; fine-tuning needs one that varies")
    tried = [std / share for share in GAINS] if betas is None else betas
    chosen = sorted({*tried, *([asked] if asked else [])}, reverse=True)
    share, share_se = memory_of_start(evaluation.reward)
    bounds = [bound(evaluation, beta, conditional=False) for beta in chosen]
    if conditional:  # from rewards less the mean of their start: a tilt given the start shifts with it
        centred = replace(evaluation, reward=evaluation.reward - evaluation.reward.mean(1, keepdim=True))
        given_start = [bound(centred, beta) for beta in chosen]
        bounds = [replace(b, reward=b.reward + reward, j=b.j - reward) for b in given_start]
    gain_se, j_gain_se = (
        tuple(of(evaluation, beta, conditional=conditional)[1] for beta in chosen) for of in (gain, gain_of_j)
    )
    several = () if evaluation.rewards is None else plan_rewards(evaluation, chosen, conditional=conditional)
    return Plan(reward, reward_se, std, tuple(bounds), gain_se, j_gain_se, share, share_se, conditional, several)
