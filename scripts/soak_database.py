"""A database of many keyframes: memory, time to load and search, how soon each is on the disk, and
which places a full one still shows.

``python scripts/soak_database.py [--keyframes 100000] [--patches 2]`` prints one JSON object. The
keyframes are synthetic: a robot walks between places, most often to a few of them, and each view
of a place differs from the others of it (cosine about 0.7), as does each from the view before.
Descriptors have 512 numbers as the shipped model's. A keyframe of it has 400 patches (410 KB),
which at 100,000 keyframes would take 41 GB: fewer are stored unless --patches says otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.inference import Description

DIMENSION = 512
SECOND = 10**9
KEYFRAME_S = 0.5
VIEWS = 5
"""Keyframes of a place each time the robot comes by."""


class World:
    """Places along ways; ``walk`` gives (place, descriptor) for ever."""

    def __init__(self, places: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._places = self._unit(self._rng.standard_normal((places, DIMENSION)))
        often = 1 / (1 + np.arange(places))  # Zipf's law
        self._often = often / often.sum()

    def walk(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        while True:
            place = int(self._rng.choice(len(self._places), p=self._often))
            for _ in range(VIEWS):
                yield place, self.view(place)

    def view(self, place: int) -> NDArray[np.float32]:
        noise = self._unit(self._rng.standard_normal(DIMENSION))
        view: NDArray[np.float32] = self._unit(self._places[place] + 0.65 * noise)
        return view

    def _unit(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def open_database(path: Path | str, patches: int, **changes: Any) -> KeyframeDatabase:
    arguments: dict[str, Any] = {"model_id": "soak", "dimension": DIMENSION, "session": "soak"}
    return KeyframeDatabase(path, max_patches=patches, **(arguments | changes))


def parts_of(descriptor: NDArray[np.float32]) -> NDArray[np.float32]:
    """As of an image whose parts look like the whole."""
    return np.tile(descriptor, (3, 1))


def describe(descriptor: NDArray[np.float32], patches: int) -> Description:
    tokens = np.resize(descriptor, (patches, DIMENSION)).astype(np.float16)
    return Description(parts_of(descriptor), tokens, np.zeros((patches, 2), np.float32))


def percentiles_ms(run: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return {f"p{share}": round(float(np.percentile(times, share)), 2) for share in (50, 95)}


def megabytes() -> dict[str, int]:
    """Resident memory of this process now, and the most it ever was."""
    now = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rss_mb": int(now) // 1024, "peak_rss_mb": most // 1024}


def fill(path: Path, keyframes: int, patches: int) -> dict[str, object]:
    """Add that many."""
    walk = World(2000).walk()
    with closing(open_database(path, patches)) as database:
        began = time.perf_counter()
        for number in range(keyframes):
            database.add(round(number * KEYFRAME_S * SECOND), describe(next(walk)[1], patches))
        seconds = time.perf_counter() - began
        return {"add_ms_mean": round(seconds / keyframes * 1e3, 2), **megabytes()}


def load(path: Path, patches: int) -> dict[str, object]:
    """Open what is there and search it; the session is another, so every keyframe is eligible."""
    began = time.perf_counter(), time.process_time()
    with closing(open_database(path, patches, session="next", read_only=True)) as database:
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        loaded = megabytes()
        world = World(2000)
        view = parts_of(world.view(7))
        search = percentiles_ms(lambda: database.search(view, 10, 0, 30 * SECOND), 200)
        ids = [keyframe_id for keyframe_id, _ in database.search(view, 10, 0, 0)]
        read = percentiles_ms(lambda: [database.keyframe(i) for i in ids], 50)
        return {
            "keyframes": len(database),
            "load_s": round(seconds, 2),
            "load_cpu_s": round(busy, 2),
            "search_ten_ms": search,
            "read_ten_ms": read,
            **loaded,
        }


def thin(path: Path, patches: int) -> dict[str, object]:
    """Add to a database that is full."""
    walk = World(2000, seed=1).walk()
    with closing(open_database(path, patches, session="full")) as database:
        database.max_keyframes = full = len(database)
        began = time.perf_counter()
        times, deleted = [], 0
        while deleted < 4 * 64:
            stamp = round(time.time() * SECOND)
            before = len(database)
            start = time.perf_counter()
            database.add(stamp, describe(next(walk)[1], patches))
            if len(database) <= before:
                times.append((time.perf_counter() - start) * 1e3)
                deleted += before + 1 - len(database)
        mean = (time.perf_counter() - began) / deleted * 1e3
        assert len(database) <= full
        return {
            "deleted": deleted,
            "add_that_deletes_ms": round(float(np.median(times)), 1),
            "add_ms_mean": round(mean, 1),
            **megabytes(),
        }


def cover(folder: Path, places: int = 500, full: int = 2000, walked: int = 20_000) -> object:
    """Which of the places that were seen a full database still shows, and how evenly."""
    walk = World(places).walk()
    place_of: dict[int, int] = {}
    with closing(open_database(folder / "cover.db", 0, max_keyframes=full)) as database:
        for number in range(walked):
            place, descriptor = next(walk)
            stamp = round(number * KEYFRAME_S * SECOND)
            place_of[database.add(stamp, describe(descriptor, 0))] = place
        kept = [place_of[i] for i, _ in database.search(parts_of(descriptor), full, 0, 0)]
    seen = list(place_of.values())
    rng = np.random.default_rng(0)
    ways = {
        "densest": kept,
        "oldest": seen[-full:],
        "by_chance": rng.choice(seen, full, replace=False).tolist(),
    }
    once = {place for place, count in Counter(seen).items() if count <= VIEWS}
    return {
        "places_seen": len(set(seen)),
        "seen_once": len(once),
        "keyframes": {"seen": walked, "kept": full},
        **{
            f"deleting_the_{name}": {
                "places_kept": len(set(left)),
                "of_those_seen_once": len(once & set(left)),
                "most_of_one_place": max(Counter(left).values()),
            }
            for name, left in ways.items()
        },
    }


def lag(folder: Path, seconds: float) -> dict[str, object]:
    """How long after ``add`` a keyframe of full size is on the disk, at 10 Hz."""
    world, waiting, lags = World(10), list[tuple[int, float]](), []
    with closing(open_database(folder / "lag.db", 400)) as database:
        began = due = time.monotonic()
        while waiting or time.monotonic() - began < seconds:
            now = time.monotonic()
            while waiting and waiting[0][0] <= database.durable_id:
                lags.append(now - waiting.pop(0)[1])
            if due <= now < began + seconds:
                due += 0.1
                added = database.add(round(now * SECOND), describe(world.view(3), 400))
                waiting.append((added, time.monotonic()))
            time.sleep(0.005)
    return {
        "keyframes": len(lags),
        "median_s": round(float(np.median(lags)), 2),
        "most_s": round(max(lags), 2),
    }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--keyframes", type=int, default=100_000)
    options.add_argument("--patches", type=int, default=2, help="of each keyframe")
    options.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    options.add_argument("--only", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.only:  # a process of its own, whose memory is its own
        path = args.folder / "soak.db"
        steps = {
            "fill": lambda: fill(path, args.keyframes, args.patches),
            "load": lambda: load(path, args.patches),
            "load_again": lambda: load(path, args.patches),
            "thin": lambda: thin(path, args.patches),
            "cover": lambda: cover(args.folder),
            "lag": lambda: lag(args.folder, 20),
        }
        print(json.dumps(steps[args.only]()))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found: dict[str, object] = {"keyframes": args.keyframes, "patches": args.patches}
        for step in ("fill", "load", "load_again", "thin", "cover", "lag"):
            command = [sys.executable, __file__, "--only", step, "--folder", folder]
            command += ["--keyframes", str(args.keyframes), "--patches", str(args.patches)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found[step] = json.loads(done.stdout)
            print(f"{step}: {found[step]}", file=sys.stderr)
        found["file_mb"] = round((Path(folder) / "soak.db").stat().st_size / 1e6)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
