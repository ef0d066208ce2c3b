"""Three hundred random loops: each trains and resumes to the bit, or is refused by us when it is built."""

import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.api_calls import ESTIMATORS, problems, verdict
from tests.test_fuzz_api import SECONDS, limited

EXAMPLES = 300
TRAINED = 0.3  # the least share of examples that train to their end

DETERMINED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def test_every_estimator_is_tried():
    assert {"Adjoint", "AdjointMatching", "FullBackprop", "ScoreFunction", "TruncatedBackprop"} <= set(ESTIMATORS)


@pytest.mark.slow
def test_every_loop_trains_and_resumes_to_the_bit_or_is_refused(as_users_run, tmp_path):
    seen = Counter()

    @DETERMINED
    @given(problems())
    def holds(problem):
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen[verdict(problem, tmp_path)] += 1

    holds()
    assert sum(seen.values()) >= EXAMPLES and seen["trained"] >= TRAINED * EXAMPLES, seen
    print(seen)
