"""The handwritten digits that ship with this package: the data, two classifiers, and the quality of samples."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.digits.classifiers import (
        ASSETS,
        DigitClassifier,
        accuracy,
        digit_log_probability,
        fit_judge,
        load_classifier,
        save_classifier,
        train_classifier,
    )
    from implicit_diffusion.digits.data import EVENT_SHAPE, Digits, load_digits
    from implicit_diffusion.digits.quality import Appearance, Quality, judge_samples, nearest_distance, squared_mmd
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ASSETS",
    "EVENT_SHAPE",
    "Appearance",
    "DigitClassifier",
    "Digits",
    "Quality",
    "accuracy",
    "digit_log_probability",
    "fit_judge",
    "judge_samples",
    "load_classifier",
    "load_digits",
    "nearest_distance",
    "save_classifier",
    "squared_mmd",
    "train_classifier",
]
