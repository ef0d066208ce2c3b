"""Tables: a sampler as numbers, one row (a, b, s, m, t) per step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.tables.flow import memoryless_flow
    from implicit_diffusion.tables.named import NAMED_SAMPLERS, default_sampler, pipeline_for, scheduler_for, table_for
    from implicit_diffusion.tables.ornstein_uhlenbeck import ou_marginal, ou_probability_flow, ou_reverse_sde
    from implicit_diffusion.tables.scheduler import read_table
    from implicit_diffusion.tables.table import ChainTable
    from implicit_diffusion.tables.transition import Transition
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "NAMED_SAMPLERS",
    "ChainTable",
    "Transition",
    "default_sampler",
    "memoryless_flow",
    "ou_marginal",
    "ou_probability_flow",
    "ou_reverse_sde",
    "pipeline_for",
    "read_table",
    "scheduler_for",
    "table_for",
]
