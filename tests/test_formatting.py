"""Bytes, times and counts read the same everywhere."""

from __future__ import annotations

from orchestrator.formatting import format_bytes, format_count, format_duration


def test_bytes_have_three_digits_and_the_unit_that_suits_them() -> None:
    expected = {0: "0 bytes", 512: "512 bytes", 999.6: "1.00 kB", 1.25e9: "1.25 GB", 41.2e6: "41.2 MB", 412e6: "412 MB"}
    expected |= {99.96e6: "100 MB", 999.4e6: "999 MB", 999.6e6: "1.00 GB", 2.5e15: "2,500 TB"}
    assert {size: format_bytes(size) for size in expected} == expected


def test_durations_are_rounded_before_their_unit_is_chosen() -> None:
    expected = {
        0.42: "0.42 s",
        8.3: "8.3 s",
        59.94: "59.9 s",
        59.96: "1 min 0 s",
        125: "2 min 5 s",
        3599.7: "1 h 0 min",
    }
    assert {seconds: format_duration(seconds) for seconds in expected} == expected
    whole = {0: "0 s", 8.4: "8 s", 59.4: "59 s", 59.6: "1 min 0 s", 7.2e6: "2,000 h 0 min"}
    assert {seconds: format_duration(seconds, whole=True) for seconds in whole} == whole


def test_counts_have_a_plural() -> None:
    assert [format_count(number, "trial") for number in (0, 1, 2000)] == ["0 trials", "1 trial", "2,000 trials"]
