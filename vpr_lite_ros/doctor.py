"""What ``vpr-lite doctor`` says, and what it finds of the database.

The machine is looked at in ``installation.py``, recordings in ``inspection.py``, topics in
``live.py``.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from vpr_lite_ros.config import Config
from vpr_lite_ros.health import Finding, Severity
from vpr_lite_ros.inference import Bundle
from vpr_lite_ros.storage import DatabaseError, KeyframeFile, OldSchemaError

FINE, PROBLEMS, WARNINGS = 0, 1, 3
"""Exit codes."""
LEAST_KEYFRAMES, ENOUGH_KEYFRAMES = 100, 5000
"""With disk space for fewer keyframes there is an error, or a warning."""
WORDS = {Severity.OK: "ok", Severity.WARNING: "warning", Severity.ERROR: "PROBLEM"}


# -- saying it ---------------------------------------------------------------------------------


class Report:
    """Prints findings as they come and remembers the worst."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def section(self, title: str, findings: Iterable[Finding]) -> None:
        print(f"{title}", flush=True)
        for finding in findings:
            self.findings.append(finding)
            print(_lines(finding), flush=True)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    def end(self) -> int:
        """Print the sum and return the exit code."""
        problems, warnings = self.count(Severity.ERROR), self.count(Severity.WARNING)
        print(f"{number(problems, 'problem')}, {number(warnings, 'warning')}")
        return PROBLEMS if problems else WARNINGS if warnings else FINE


def _lines(finding: Finding) -> str:
    head = f"  {WORDS[finding.severity]:8}{finding.name}: {finding.seen}"
    if not finding.remedy:
        return head
    return head + "\n" + textwrap.indent(textwrap.fill(finding.remedy, 90), 10 * " ")


def number(count: int, what: str) -> str:
    """How many, for people: no problems, 1 problem."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def ok(name: str, seen: str) -> Finding:
    return Finding(name, Severity.OK, seen)


def warning(name: str, seen: str, remedy: str) -> Finding:
    return Finding(name, Severity.WARNING, seen, remedy)


def problem(name: str, seen: str, remedy: str) -> Finding:
    return Finding(name, Severity.ERROR, seen, remedy)


# -- database ----------------------------------------------------------------------------------


_RIGHTS = "Give this user the right (chown, chmod, remount), or pass another database_path."


def database(settings: Config, bundle: Bundle | None) -> Iterator[Finding]:
    """Can the node open ``database_path`` and go on writing to it? Nothing is written here.

    ``bundle`` is None if it could not be loaded.
    """
    if not settings.database_path:
        yield ok("database", "database_path is empty: keyframes are gone when the node ends")
        return
    try:
        yield from _database(settings, bundle)
    except OSError as error:  # a folder on the way that this user may not enter
        yield problem("database", str(error), _RIGHTS)


def _database(settings: Config, bundle: Bundle | None) -> Iterator[Finding]:
    path = Path(settings.database_path).expanduser()
    if settings.database_path.startswith("~") and not Path(settings.database_path).exists():
        yield warning(
            "database",
            f"{settings.database_path} begins with ~, which only a shell replaces",
            f"Write {path} into the parameter file.",
        )
    reads_only = settings.mode == "localization"
    exists = path.exists()
    if path.is_dir():
        yield problem("database", f"{path} is a folder", f"Pass a file: {path / 'map.db'}")
        return
    if not path.parent.is_dir():
        yield problem(
            "database", f"the folder {path.parent} does not exist", f"mkdir -p {path.parent}"
        )
        return
    if bundle is not None and exists and (path.stat().st_size or reads_only):
        yield _stored(path, bundle, reads_only)
    elif exists or not reads_only:
        yield ok("database", f"{path} {'is empty' if exists else 'is not there yet: it is made'}")
    else:
        yield problem(
            "database", f"{path} does not exist", "Map the place first: mode mapping makes it."
        )
    if reads_only:
        return
    for place in (path.parent, *([path] if exists else [])):
        if not os.access(place, os.W_OK):
            yield problem("database", f"{place} cannot be written by user {os.getuid()}", _RIGHTS)
            return
    yield _space(path.parent.resolve(), bundle)


def _stored(path: Path, bundle: Bundle, reads_only: bool) -> Finding:
    """What the node will say when it opens the file: the same code reads it, all descriptors."""
    try:
        with closing(
            KeyframeFile(
                str(path),
                model_id=bundle.model_id,
                dimension=bundle.dimension,
                max_patches=bundle.max_patches,
                read_only=True,
            )
        ) as file:
            drives = Counter((head.robot_id, head.session) for head in file.heads())
    except OldSchemaError as error:
        if not reads_only:
            return warning("database", error.seen, "Keep a copy before this release opens it.")
        return problem("database", str(error), "A copy of it will do, if it is to stay as it is.")
    except DatabaseError as error:
        return problem("database", str(error), "The node does not start with it as it is.")
    return ok(
        "database",
        f"{path}: {number(sum(drives.values()), 'keyframe')} of "
        f"{number(len(drives), 'session')}, {path.stat().st_size / 1e6:.1f} MB",
    )


def _space(folder: Path, bundle: Bundle | None) -> Finding:
    free = shutil.disk_usage(folder).free
    each = 13_000  # the thumbnail; with it float32 descriptors and centres, float16 tokens
    if bundle is not None:
        each += 4 * bundle.parts * bundle.dimension
        each += bundle.max_patches * (2 * bundle.dimension + 8)
    room = free // each
    seen = f"{free / 1e9:.1f} GB free at {folder}: room for {room} keyframes"
    remedy = "Free some space, or pass a database_path on another disk."
    if room < LEAST_KEYFRAMES:
        return problem("disk space", seen, remedy)
    return (
        warning("disk space", seen, remedy) if room < ENOUGH_KEYFRAMES else ok("disk space", seen)
    )
