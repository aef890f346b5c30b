"""How durations are told."""

import pytest

from leansd.text import describe_duration


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7199, "1 h 59 min"),
        (7200, "2 h 0 min"),
        (100 * 3600, "4 d 4 h"),
    ],
)
def test_the_two_largest_units_are_told(seconds: float, told: str) -> None:
    assert describe_duration(seconds) == told
