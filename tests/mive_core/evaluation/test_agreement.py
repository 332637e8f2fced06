import math

import numpy as np
import pytest

from mive_core.evaluation.agreement import krippendorff_alpha

NONE = math.nan
PUBLISHED = np.array(  # Krippendorff, 2011, section C: four observers, twelve units
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
)


@pytest.mark.parametrize("level, alpha", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_example(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def test_two_raters_by_hand():
    """Ten items, two raters, 0 or 1 (Krippendorff, 2011, section A): 1 - 19 * 4 / (14 * 6) = 0.095."""
    ratings = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])
    assert krippendorff_alpha(ratings) == pytest.approx(0.095, abs=5e-4)


def test_perfect_chance_and_opposite():
    values = np.arange(200) % 5
    assert krippendorff_alpha(np.stack([values, values]), "interval") == 1
    random = np.random.default_rng(0).integers(0, 3, (4, 2000)).astype(float)
    assert abs(krippendorff_alpha(random)) < 0.03
    assert krippendorff_alpha(np.stack([values, 4 - values]), "interval") < -0.9


@pytest.mark.parametrize("ratings", [np.array([[1, NONE], [NONE, 2]]), np.array([[2.0, 2], [2, 2]]), np.full((3, 4), NONE), np.zeros((2, 0))])
def test_undefined(ratings):
    assert krippendorff_alpha(ratings) is None
