"""Time in which the database did not answer makes nobody stale."""

from datetime import UTC, datetime, timedelta

import pytest

from r3mes_vllm.backend.outages import Outages

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("past", "now", "oldest"),
    [
        ([], 100, 40),
        # Over before a minute ago; half of it since then; all of it; two of them.
        ([(0, 30)], 100, 40),
        ([(0, 50)], 100, -10),
        ([(60, 90)], 100, 10),
        ([(50, 60), (80, 90)], 100, 20),
        ([(0, 30), (60, 90)], 100, -20),
        # The first of them is over more than a minute ago, if the second is left out.
        ([(0, 5), (60, 90)], 100, 10),
        # It lasts.
        ([(60, None)], 100, 0),
        ([(60, None)], 360, 0),
        # No longer than five minutes.
        ([(60, None)], 361, 1),
        ([(60, 1000)], 1010, 650),
    ],
)
def test_a_minute_is_a_minute_of_a_database_that_answers(
    past: list[tuple[float, float | None]], now: float, oldest: float
) -> None:
    outages = Outages()
    for began, ended in past:
        outages.begin(at(began))
        outages.begin(at(began + 1))  # which is the same one
        if ended is not None:
            outages.end(at(ended))
    assert outages.oldest(at(now), 60) == at(oldest)


def test_they_are_forgotten_in_the_end() -> None:
    outages = Outages()
    for number in range(1000):
        outages.begin(at(number))
        outages.end(at(number + 0.5))
    assert outages.oldest(at(1000), 60) == at(1000 - 60 - 32)
