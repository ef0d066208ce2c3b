"""What a chain is worth, and how good it can get."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.evaluation.bounds import Bound, bound
    from implicit_diffusion.evaluation.chains import Evaluation, evaluate
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["Bound", "Evaluation", "bound", "evaluate"]
