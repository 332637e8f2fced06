"""Alpha's published values."""

import pytest

from mive_core.evaluation.agreement import krippendorff_alpha

OBSERVERS = [  # Krippendorff (2011), section D: four observers, twelve units, missing values
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize("level, published", [("interval", 0.849), ("ordinal", 0.815)])
def test_the_published_example(level, published):
    assert krippendorff_alpha(list(zip(*OBSERVERS)), level) == pytest.approx(published, abs=5e-4)


def test_its_ends():
    assert krippendorff_alpha([(1, 1), (4, 4), (7.5, 7.5)]) == pytest.approx(1)
    assert krippendorff_alpha([(1, 5), (5, 1)]) == pytest.approx(-0.5)
    assert krippendorff_alpha([(3, 3), (3, 3)]) is None and krippendorff_alpha([(3, None)]) is None and krippendorff_alpha([]) is None
