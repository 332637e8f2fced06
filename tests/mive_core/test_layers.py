import pytest

from mive_core.errors import UserError
from mive_core.layers import parse_layers


@pytest.mark.parametrize(
    "spec, num_layers, layers",
    [
        ("first+last", 36, (1, 36)),
        ("1,-1", 36, (1, 36)),
        ("last", 4, (4,)),
        ("first", 4, (1,)),
        ("LAST , first", 4, (4, 1)),
        ("0", 4, (0,)),
        ("-5", 4, (0,)),
        ("0:36:6", 36, (0, 6, 12, 18, 24, 30)),
        (":", 2, (0, 1, 2)),
        ("-3:", 36, (34, 35, 36)),
        ("::-2", 4, (4, 2, 0)),
        ("36,0:12:6+first", 36, (36, 0, 6, 1)),
        ((1, -1), 36, (1, 36)),
        ([0, 3], 4, (0, 3)),
    ],
)
def test_layers_resolve_in_the_order_written(spec, num_layers, layers):
    assert parse_layers(spec, num_layers) == layers


@pytest.mark.parametrize(
    "spec, column",
    [
        ("31..2", 1),
        ("99", 1),
        ("1, -38", 4),
        ("1e9", 1),
        ("9" * 5000, 1),
        ("1,,2", 3),
        ("1,2,", 5),
        ("", 1),
        ("   ", 1),
        ("1,1", 3),
        ("first+1", 7),
        ("-1 + last", 6),
        ("2,5:5", 3),
        ("1,0:9:0", 3),
        ("first last", 1),
        ("1:2:3:4", 1),
        ("²", 1),
        ((), 1),
    ],
)
def test_errors_name_the_column(spec, column):
    with pytest.raises(UserError, match=f"column {column}:"):
        parse_layers(spec, 36)
