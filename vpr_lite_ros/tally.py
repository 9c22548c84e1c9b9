"""What the node counts and times, for ``/diagnostics``: bounded in memory, safe between threads."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

TIMINGS_KEPT = 1000
ERROR_LASTS_S = 30.0
"""How long the last error is what the node's diagnostics begin with."""


class Tally:
    """Counts by name, timings by stage, and the last error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._timings_ms: dict[str, deque[float]] = {}
        self._last_error, self._error_at = "", -ERROR_LASTS_S

    def count(self, name: str) -> int:
        """One more of ``name``; how many there are now."""
        with self._lock:
            self._counts[name] += 1
            return self._counts[name]

    def failed(self, text: str) -> None:
        """Something went wrong; the node lives on."""
        with self._lock:
            self._last_error, self._error_at = text, time.monotonic()

    def took(self, timings_ms: Mapping[str, float]) -> None:
        """How long each stage of an image took, in milliseconds."""
        with self._lock:
            for stage, milliseconds in timings_ms.items():
                self._timings_ms.setdefault(stage, deque(maxlen=TIMINGS_KEPT)).append(milliseconds)

    @property
    def images(self) -> int:
        return self._counts["images"]

    @property
    def recent_error(self) -> str:
        """The last error if it is still news, else nothing."""
        with self._lock:
            recent = time.monotonic() - self._error_at < ERROR_LASTS_S
            return self._last_error if recent else ""

    def values(self) -> dict[str, str]:
        """Everything, by name, for people and programs to read."""
        with self._lock:
            values = {"images": "0", "odometry": "0"}
            values |= {name: str(count) for name, count in sorted(self._counts.items())}
            for stage, timings in self._timings_ms.items():
                p50, p95 = np.percentile(np.array(timings), (50, 95))
                values |= {f"{stage}_ms_p50": f"{p50:.1f}", f"{stage}_ms_p95": f"{p95:.1f}"}
            values["last_error"] = self._last_error
        return values


def resident_mb() -> float:
    """RAM that this process holds, in MB; NaN where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
