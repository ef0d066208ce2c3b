"""Reward functions as people write them: what they are called with, and one number per sample in what they return."""

from implicit_diffusion.reward_values.arguments import given_as, like, of_tensors, takes_condition
from implicit_diffusion.reward_values.results import scores_of

__all__ = ["given_as", "like", "of_tensors", "scores_of", "takes_condition"]
