"""CSV tables that come with image folders."""

from __future__ import annotations

import csv
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePath

from vpr_lite_ros.bags.errors import SourceError


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header row; one dict a row, keyed by column.

    Raises
    ------
    SourceError
        If the file cannot be read as text or holds no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [
                {(key or "").strip(): (value or "").strip() for key, value in row.items() if key}
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as a CSV table: {error}") from error
    if not rows:
        raise SourceError(f"{path} holds no rows below its header")
    return rows


def frame_key(name: str) -> str:
    """Return what identifies a frame: its file name without folder, suffix and leading zeros.

    >>> frame_key("images/000042.jpg"), frame_key("42"), frame_key("left_7.png")
    ('42', '42', 'left_7')
    """
    path = PurePath(name)
    stem = path.name if path.suffix[1:].isdigit() else path.stem
    return str(int(stem)) if stem.isdecimal() else stem


def frame_column(row: dict[str, str]) -> str | None:
    """Return the column that names the frame, if the table has one."""
    return next((column for column in ("file", "frame", "image", "name") if column in row), None)


def parse_stamp(row: dict[str, str], where: str) -> int | None:
    """Return a row's stamp in nanoseconds (`stamp_ns` or `stamp_s`), or None if it has none."""
    for column, scale in (("stamp_ns", 1), ("stamp_s", 10**9)):
        if column in row:
            return seconds_to_ns(row[column], where, scale)
    return None


def seconds_to_ns(text: str, where: str, scale: int = 10**9) -> int:
    """Convert decimal text to integer nanoseconds, exactly (a float keeps 200 ns of a stamp)."""
    try:
        return round(Decimal(text) * scale)
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise SourceError(f"{where}: {text!r} is not a time stamp") from error


def read_stamps(path: Path) -> dict[str, int]:
    """Return stamps in nanoseconds by `frame_key`; empty if the table has no stamps."""
    rows = read_table(path)
    column = frame_column(rows[0])
    stamps: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        stamp_ns = parse_stamp(row, f"{path}, line {number}")
        if column is None or stamp_ns is None:
            return {}
        stamps[frame_key(row[column])] = stamp_ns
    return stamps
