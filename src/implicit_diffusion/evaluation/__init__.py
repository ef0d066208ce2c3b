"""What a chain is worth, and how good it can get."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.evaluation.bounds import Bound, bound, captured, memory_of_start, most_kl, sharpest
    from implicit_diffusion.evaluation.chains import Evaluation, evaluate, mean_and_error
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Bound",
    "Evaluation",
    "bound",
    "captured",
    "evaluate",
    "mean_and_error",
    "memory_of_start",
    "most_kl",
    "sharpest",
]
