import json

import numpy as np
import pytest

from mive_core.evaluation.loss_curve import FAINT, INK, LEVEL, SIZE, axis_ticks, draw_losses, first_and_last_mean, read_losses, running_mean


def test_a_log_is_read_as_it_went_last(tmp_path):
    """A crash leaves a line cut off, and the resumed run does steps again."""
    log = tmp_path / "log.jsonl"
    lines = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 0, "loss": 1.0}, {"validation": 1.0}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    assert read_losses(log) == {0: 1.0, 1: 2.0}


def test_a_mean_runs_over_the_last_values():
    assert running_mean(np.array([4.0, 2.0, 0.0, 2.0]), 2).tolist() == [4.0, 3.0, 1.0, 1.0]
    assert first_and_last_mean({step: float(step) for step in range(40)}) == (1.5, 37.5)


def test_the_curve_shows_where_the_loss_goes():
    """The ink of a falling curve lies higher at the left; what is not finite is left out."""
    losses = {step: 1.0 - step / 100 for step in range(100)} | {50: float("nan")}
    picture = np.array(draw_losses(losses))
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    drawn = (picture == FAINT).all(-1)
    rows, columns = np.nonzero(drawn)
    assert rows[columns < 200].mean() < rows[columns > 760].mean() - 100
    assert (picture == INK).all(-1).any()


def test_one_step_is_a_curve_and_none_is_not():
    assert draw_losses({7: 0.5}).size == SIZE
    with pytest.raises(ValueError):
        draw_losses({})


def test_the_axis_fits_the_values():
    """Axes once started at 0: a rise from 18.3 to 18.9 dB was a flat line at the top."""
    for values in ([18.31, 18.9], [0.0, 1.0], [0.193, 0.198], [-3.0, 250.0], [5.0, 5.0], [0.0]):
        ticks = axis_ticks(values)
        assert 2 <= len(ticks) <= 7 and ticks[0] <= min(values) + 1e-9 and ticks[-1] >= max(values) - 1e-9
        span = max(values) - min(values)
        assert not span or ticks[-1] - ticks[0] <= 2.5 * span
    picture = np.array(draw_losses({0: 18.31, 50: 18.9}))
    rows, _ = np.nonzero((picture == FAINT).all(-1))
    assert rows.max() - rows.min() > 0.4 * SIZE[1]


def test_levels_are_lines_and_count_for_the_axis():
    plain, compared = (np.array(draw_losses({0: 20.0, 9: 22.0}, "psnr", levels)) for levels in (None, {"ceiling": 26.0}))
    assert not (plain == LEVEL).all(-1).any() and (compared == LEVEL).all(-1).sum() > 200
