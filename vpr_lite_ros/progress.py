"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None, total: int, unit: str, what: str) -> Any:
    """A tqdm bar that is lively in a terminal and a line now and then in a log file."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, unit=unit, desc=what, mininterval=pause, dynamic_ncols=True)
