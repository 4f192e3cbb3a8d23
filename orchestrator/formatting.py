"""Bytes, times and counts as text, the same in the terminal, in messages and in reports."""

from __future__ import annotations


def format_bytes(num_bytes: float) -> str:
    """Return `512 bytes`, `1.25 GB`, `412 MB`: three digits, in powers of 1000."""
    size, unit = num_bytes, "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    digits = 0 if unit == "bytes" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{digits}f} {unit}"


def format_duration(seconds: float, whole: bool = False) -> str:
    """Return `0.42 s`, `8.3 s`, `2 min 5 s`, `3 h 20 min`.

    Args:
        whole: round to whole seconds, as for a time that is an estimate.
    """
    rounded = round(seconds)
    if seconds < (59.5 if whole else 59.95):
        return f"{seconds:.{0 if whole else 2 if seconds < 1 else 1}f} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600:,} h {rounded % 3600 // 60} min"


def format_count(number: int, noun: str) -> str:
    """Return `1 trial`, `2,000 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
