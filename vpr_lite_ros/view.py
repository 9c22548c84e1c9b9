"""``vpr-lite view``: the pairs found and why the others were not, in the terminal, as it happens.

From a running node (``view_node.py``) or from the folder of a replay, running or done.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vpr_lite_ros.matching import Status

POLL_S = 0.2
REDRAW_S = 0.1
DECISIONS, SUMMARY = "decisions.jsonl", "summary.json"


class ViewError(RuntimeError):
    """There is nothing to view; the message says what to pass."""


@dataclass(frozen=True)
class Pair:
    """One candidate: a query, the keyframe proposed for it, and what became of it."""

    query_ns: int
    match_ns: int
    status: str
    """A name of ``matching.Status``."""
    similarity: float
    match_score: float | None
    confidence: float | None
    num_matches: int
    num_inliers: int
    match_session: str = ""

    def line(self) -> str:
        """For people: what was found, and how sure that is."""
        apart = (self.query_ns - self.match_ns) / 1e9
        session = f" of session {self.match_session}" if self.match_session else ""
        return (
            f"{self.query_ns / 1e9:.3f} s is where {self.match_ns / 1e9:.3f} s{session} was "
            f"({apart:+.1f} s): similarity {self.similarity:.2f}, score "
            f"{_figure(self.match_score)}, confidence {_figure(self.confidence)}, "
            f"{self.num_inliers} of {self.num_matches} matches agree, {self.status}"
        )


def _figure(value: float | None) -> str:
    return "unknown" if value is None or value != value else f"{value:.2f}"


class Tally:
    """Counts decisions; prints a line a closure and, in a terminal, redraws one line of counts."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._lively = self._out.isatty()
        self._drawn = 0.0
        self._last_query_ns = -1
        self.keyframes = 0
        self.closures = 0
        self.statuses: Counter[str] = Counter()

    def count(self, query_ns: int, status: str) -> None:
        """Take what became of one candidate; those of one query come one after the other."""
        if query_ns != self._last_query_ns:
            self._last_query_ns = query_ns
            self.keyframes += 1
        self.statuses[status] += 1
        self._redraw()

    def closure(self, pair: Pair) -> None:
        self.closures += 1
        self.say(f"closure {self.closures}: {pair.line()}")

    def say(self, line: str) -> None:
        """Print a line above the counts."""
        self._wipe()
        print(line, file=self._out, flush=True)
        self._redraw(now=True)

    def end(self) -> None:
        """Leave the counts as the last line."""
        self._wipe()
        print(self.text(), file=self._out, flush=True)

    def text(self) -> str:
        turned_down = {
            name: count
            for name, count in self.statuses.most_common()
            if name not in (Status.ACCEPTED.name, Status.NO_CANDIDATE.name)
        }
        reasons = ", ".join(f"{name} {count}" for name, count in turned_down.items()) or "none"
        lonely = self.statuses[Status.NO_CANDIDATE.name]
        return (
            f"{self.keyframes} keyframes, {self.closures} closures; candidates turned down: "
            f"{reasons}; keyframes without a candidate: {lonely}"
        )

    def _redraw(self, now: bool = False) -> None:
        if not self._lively or not (now or time.monotonic() - self._drawn > REDRAW_S):
            return
        self._drawn = time.monotonic()
        width = shutil.get_terminal_size().columns
        self._out.write(f"\r\x1b[K{self.text()[: width - 1]}")
        self._out.flush()

    def _wipe(self) -> None:
        if self._lively:
            self._out.write("\r\x1b[K")


def view_replay(folder: Path, tally: Tally) -> None:
    """Show the decisions of a replay, those to come as well, until it has ended.

    Raises
    ------
    ViewError
        If the folder holds no replay, or a line of it cannot be read.
    """
    file = folder / DECISIONS
    if not file.is_file():
        raise ViewError(
            f"{file} does not exist. Pass the folder that `vpr-lite replay` writes to (--output), "
            "or nothing, to watch a running node"
        )
    for number, line in enumerate(_lines(file, folder / SUMMARY), 1):
        try:
            record = json.loads(line)
            tally.count(record["query_stamp_ns"], record["status"])
            if record["status"] == Status.ACCEPTED.name:
                tally.closure(_pair(record))
        except (ValueError, KeyError, TypeError) as error:
            raise ViewError(
                f"{file}, line {number} is no decision of a replay ({error!r}): replay again"
            ) from error


def _pair(record: Mapping[str, Any]) -> Pair:
    return Pair(
        query_ns=record["query_stamp_ns"],
        match_ns=record["match_stamp_ns"],
        status=record["status"],
        similarity=record["similarity"],
        match_score=record["match_score"],
        confidence=record["confidence"],
        num_matches=record["num_matches"],
        num_inliers=record["num_inliers"],
        match_session="" if record["match_frame"] is not None else record["match_session"],
    )


def _lines(file: Path, ended: Path) -> Iterator[str]:
    """Whole lines of a file that grows, until ``ended`` is at least as new as it is."""
    rest = ""
    with file.open(encoding="utf-8") as stream:
        while True:
            # Looked up first: what was written before the end is still read after it.
            over = ended.is_file() and ended.stat().st_mtime_ns >= file.stat().st_mtime_ns
            while chunk := stream.readline():
                rest += chunk
                if rest.endswith("\n"):
                    yield rest
                    rest = ""
            if over:
                return
            time.sleep(POLL_S)
