"""An opened bag, rosbag2 or ROS 1, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import Stores, get_typestore

from vpr_lite_ros.bags.errors import SourceError

_STORAGE_SUFFIXES = (".db3", ".mcap")


def is_bag(path: Path) -> bool:
    """Tell whether a path looks like a bag: by its suffix, or by what lies in the folder."""
    if path.is_dir():
        return (path / "metadata.yaml").is_file() or bool(_storage_files(path))
    return path.suffix in (".bag", *_STORAGE_SUFFIXES)


class Bag:
    """A bag opened for reading.

    Parameters
    ----------
    path
        rosbag2 folder, one `.db3` or `.mcap` file, or a ROS 1 `.bag`.

    Raises
    ------
    SourceError
        If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        storage = path
        if path.is_dir() and not (path / "metadata.yaml").is_file():
            # A recorder that was killed leaves no metadata; a single file can do without.
            files = _storage_files(path)
            if len(files) > 1:
                raise SourceError(
                    f"{path} has no metadata.yaml. Write it with `ros2 bag reindex {path}`, "
                    f"or pass one of its files: {', '.join(file.name for file in files)}"
                )
            storage = files[0]
        try:
            # Bags of Humble and before hold no message definitions. The few types read here
            # have not changed since, so Jazzy's serve for them.
            self._reader = AnyReader([storage], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()
            self._is_open = True
        except Exception as error:  # Storage libraries raise whatever they like.
            raise self._damaged(error) from error

    def topics(self, *types: str) -> list[str]:
        """Return the names of topics of the given types that hold messages, sorted."""
        return sorted(
            {
                connection.topic
                for connection in self._reader.connections
                if connection.msgtype in types and connection.msgcount > 0
            }
        )

    def count(self, topic: str) -> int:
        """Return the number of messages on a topic."""
        return sum(connection.msgcount for connection in self._connections(topic))

    def type_of(self, topic: str) -> str:
        """Return the type of a topic's messages."""
        return next(c.msgtype for c in self._reader.connections if c.topic == topic)

    def choose_topic(self, types: Sequence[str], wanted: str | None, what: str, option: str) -> str:
        """Find the topic to read.

        Parameters
        ----------
        types
            Message types that will do.
        wanted
            The user's choice, or None to take the only topic there is.
        what, option
            What the topic holds and the option that names it, for error messages.

        Raises
        ------
        SourceError
            If there is none, or several and no choice, or not the wanted one.
        """
        topics = self.topics(*types)
        listed = ", ".join(f"{topic} ({self.count(topic)} messages)" for topic in topics)
        if wanted is not None:
            for topic in topics:
                if topic.strip("/") == wanted.strip("/"):
                    return topic
            known = f"its {what} topics are: {listed}" if topics else f"it has no {what} topic"
            raise SourceError(f"{self.path} has no {what} topic {wanted!r}; {known}")
        if not topics:
            everything = sorted({f"{c.topic} ({c.msgtype})" for c in self._reader.connections})
            raise SourceError(
                f"{self.path} has no {what} topic ({' or '.join(types)}) with messages; "
                f"it holds: {', '.join(everything) or 'nothing'}"
            )
        if len(topics) > 1:
            raise SourceError(
                f"{self.path} has several {what} topics: {listed}. Choose one with {option}"
            )
        return topics[0]

    @property
    def times_ns(self) -> tuple[int, int]:
        """When the first message was recorded and, exclusive, the last, nanoseconds."""
        return int(self._reader.start_time), int(self._reader.end_time)

    def messages(
        self, topic: str, start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (time of recording in nanoseconds, message) of a topic in order of time.

        With ``start_ns`` and ``stop_ns`` only those recorded from the one to before the other.

        Raises
        ------
        SourceError
            If the bag is damaged.
        """
        messages = self._reader.messages(
            connections=self._connections(topic), start=start_ns, stop=stop_ns
        )
        while True:
            try:
                connection, time_ns, raw = next(messages)
                message = self._reader.deserialize(raw, connection.msgtype)
            except StopIteration:
                return
            except Exception as error:
                raise self._damaged(error) from error
            yield time_ns, message

    def close(self) -> None:
        """Close the files; doing so twice does no harm."""
        if self._is_open:
            self._is_open = False
            self._reader.close()

    def _connections(self, topic: str) -> list[Connection]:
        return [c for c in self._reader.connections if c.topic == topic]

    def _damaged(self, error: Exception) -> SourceError:
        tool = "rosbag" if self.path.suffix == ".bag" else "ros2 bag"
        return SourceError(
            f"{self.path} cannot be read as a bag: {error or type(error).__name__}. If the "
            f"recording was cut short, try `{tool} reindex {self.path}`"
        )


def _storage_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _STORAGE_SUFFIXES)
