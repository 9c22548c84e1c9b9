"""One thread that works on the newest of what it is given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Worker(Generic[Item]):
    """Calls ``work`` with one item at a time, in a thread of its own.

    While it works, one item waits; a newer one takes its place. So latency is bounded by two
    items' work, and memory by two items, however fast they come.

    Parameters
    ----------
    work
        Must not raise: there is nobody to catch it.
    """

    def __init__(self, work: Callable[[Item], None], name: str) -> None:
        self._work = work
        self._wakes = threading.Condition()
        self._waiting: Item | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def give(self, item: Item) -> bool:
        """Have ``item`` worked on next; True if another one that waited will not be."""
        with self._wakes:
            replaced = self._waiting is not None
            self._waiting = item
            self._wakes.notify()
        return replaced

    def stop(self) -> None:
        """Let the item in hand be finished, and one that waits go; return when that is so."""
        with self._wakes:
            self._stopping = True
            self._wakes.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wakes:
                self._wakes.wait_for(lambda: self._stopping or self._waiting is not None)
                if self._stopping:
                    return
                item, self._waiting = self._waiting, None
            assert item is not None
            self._work(item)
