import numpy as np
import pytest
from scipy.stats import binom

from mive_core.preference.statistics import bradley_terry, holm, percentile_interval, resampled_clips, sign_test, wilson_interval

# American League 1987, Agresti, Categorical Data Analysis, table 10.10: wins of the row's team over the column's
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
WINS = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)
PUBLISHED = (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0)  # Baltimore is 0: the vignette of R's BradleyTerry2, baseballModel1


def test_bradley_terry_on_a_published_example():
    strengths = bradley_terry(WINS)
    assert strengths - strengths[-1] == pytest.approx(PUBLISHED, abs=5e-5)
    assert strengths.mean() == pytest.approx(0, abs=1e-12)


def test_bradley_terry_of_many_samples_at_once():
    doubled = bradley_terry(np.stack([WINS, WINS.T, 2 * WINS]))
    assert doubled[0] == pytest.approx(bradley_terry(WINS)) and doubled[2] == pytest.approx(doubled[0])
    assert doubled[1] == pytest.approx(-doubled[0])


def test_a_system_that_never_loses_has_a_finite_score_with_a_prior():
    """Two systems: with half a win on either side the odds are (n + 1/2) to 1/2."""
    strengths = bradley_terry(np.array([[0, 10], [0, 0]]), prior=0.5)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(10.5 / 0.5))
    assert bradley_terry(np.zeros((3, 3)), prior=0.5) == pytest.approx(np.zeros(3))


@pytest.mark.parametrize(
    "wins, decided, low, high",  # Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_as_published(wins, decided, low, high):
    assert wilson_interval(wins, decided) == pytest.approx((low, high), abs=5e-5)


def test_sign_test():
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert sign_test(3, 17) == pytest.approx(2 * binom.cdf(3, 20, 0.5))
    assert sign_test(5, 5) == 1


def test_without_a_decision_there_is_no_figure():
    assert wilson_interval(0, 0) is None and sign_test(0, 0) is None and percentile_interval(np.array([np.nan])) is None


def test_holm():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]


def test_resampled_clips_draw_as_many_as_there_are():
    samples = resampled_clips(12, 500)
    assert samples.shape == (500, 12) and (samples.sum(axis=1) == 12).all()
    assert samples.mean(axis=0) == pytest.approx(np.ones(12), abs=0.2)
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
