"""One way to read images from a rosbag2, a ROS 1 bag, a folder of images or a video.

>>> with open_source("drive/") as source:          # doctest: +SKIP
...     for frame in source.frames():
...         detector.process(frame.image, frame.stamp_ns)

Frames are read one at a time: no source ever holds more than one image.
"""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.bags.errors import SourceError
from vpr_lite_ros.bags.pixels import UnusableImage, decode_file, decode_message
from vpr_lite_ros.bags.rosbag import Bag, is_bag
from vpr_lite_ros.bags.tables import frame_key, read_stamps, seconds_to_ns

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
)
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO_TYPE = "sensor_msgs/msg/CameraInfo"
Wanted = Callable[[int], bool]
"""Whether a frame of this number, from 0, is wanted."""


@dataclass(frozen=True)
class Frame:
    """One image of a source.

    Attributes
    ----------
    stamp_ns : int
        Time of exposure in nanoseconds, on the source's own clock.
    image : (H, W, 3) uint8 array
        RGB.
    name : str
        File name in a folder, topic in a bag, frame number in a video.
    frame_id : str
        Of the camera; empty where the source does not know it.
    """

    stamp_ns: int
    image: NDArray[np.uint8]
    name: str
    frame_id: str = ""


class Source(ABC):
    """Recorded images, in order. Use it as a context manager.

    Attributes
    ----------
    path : Path
        What was opened.
    camera_matrix : (3, 3) float64 array or None
        Pinhole matrix in pixels, where the source knows it.
    image_size : (width, height) or None
        The size in pixels that `camera_matrix` belongs to.
    skipped : dict of str to int
        Frames that could not be used so far, counted by cause.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.camera_matrix: NDArray[np.float64] | None = None
        self.image_size: tuple[int, int] | None = None
        self.skipped: dict[str, int] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Return how many frames are stored, usable or not (for a progress bar)."""

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """Yield the usable frames from the start; may be called again.

        Raises
        ------
        SourceError
            If the recording turns out to be damaged on the way.
        """

    def close(self) -> None:  # noqa: B027 (most sources hold nothing open)
        """Release files."""

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _skip(self, cause: str, where: str) -> None:
        """Count a frame that cannot be used and say so, once for each cause."""
        if cause not in self.skipped:
            logger.warning("%s: %s at %s; frames like it are skipped", self.path, cause, where)
        self.skipped[cause] = self.skipped.get(cause, 0) + 1


def open_source(
    path: str | Path, *, image_topic: str | None = None, rate_hz: float = 1.0
) -> Source:
    """Open whatever holds images.

    Parameters
    ----------
    path
        A rosbag2 folder (sqlite3 or mcap) or one file of it, a ROS 1 `.bag`, a folder of
        images (or one with a sub-folder `images`), or a video file.
    image_topic
        Which topic of a bag to read; needed only where a bag has several.
    rate_hz
        Frames per second of a folder whose images have no stamps. Stamps come from a
        `poses.csv` in the folder or beside it, if it has the columns `stamp_s` and `frame`
        or `file`, or from the files' names, if all are stamps: EuRoC's nanoseconds, TUM's
        seconds. Videos keep their own rate.

    Raises
    ------
    SourceError
        If there is nothing there that can be read, with what to pass instead.
    """
    path = Path(path)
    if not (math.isfinite(rate_hz) and rate_hz > 0):
        raise SourceError(f"rate_hz must be a positive number, not {rate_hz}")
    if not path.exists():
        raise SourceError(f"{path} does not exist. Pass a bag, a folder of images or a video")
    if is_bag(path):
        return BagSource(path, image_topic)
    if path.is_dir():
        return FolderSource(path, rate_hz)
    return VideoSource(path, rate_hz)


class BagSource(Source):
    """Images of one topic of a rosbag2 or ROS 1 bag, stamped by their headers."""

    def __init__(self, path: Path, image_topic: str | None = None) -> None:
        super().__init__(path)
        self._bag = Bag(path)
        try:
            self.topic = self._bag.choose_topic(IMAGE_TYPES, image_topic, "image", "--image-topic")
            self._read_camera_info()
        except BaseException:
            self._bag.close()
            raise

    def __len__(self) -> int:
        return self._bag.count(self.topic)

    def frames(self) -> Iterator[Frame]:
        unstamped = False
        for bag_time_ns, message in self._bag.messages(self.topic):
            stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
            if stamp_ns == 0:
                if not unstamped:
                    logger.warning(
                        "%s: images on %s have no header stamp; using the time of recording",
                        self.path,
                        self.topic,
                    )
                unstamped = True
                stamp_ns = bag_time_ns
            try:
                image = decode_message(message)
            except UnusableImage as cause:
                self._skip(str(cause), f"{self.topic} at {stamp_ns / 1e9:.3f} s")
                continue
            yield Frame(stamp_ns, image, self.topic, message.header.frame_id)

    def close(self) -> None:
        self._bag.close()

    def _read_camera_info(self) -> None:
        """Take the calibration published beside the images, or the only one in the bag."""
        topics = self._bag.topics(CAMERA_INFO_TYPE)
        base = re.sub(r"/(compressed|theora|ffmpeg)$", "", self.topic)
        beside = base.rsplit("/", 1)[0] + "/camera_info"
        topic = beside if beside in topics else topics[0] if len(topics) == 1 else None
        if topic is None:
            return
        for _, info in self._bag.messages(topic):
            # ROS 1 spells the fields K and P. Rectified images have the projection's matrix.
            intrinsic = np.asarray(info.K if hasattr(info, "K") else info.k).reshape(3, 3)
            projection = np.asarray(info.P if hasattr(info, "P") else info.p).reshape(3, 4)
            matrix = projection[:, :3] if "rect" in base.rsplit("/", 1)[-1] else intrinsic
            if matrix[0, 0] > 0:
                self.camera_matrix = matrix.astype(np.float64)
                self.image_size = (int(info.width), int(info.height))
                return


class FolderSource(Source):
    """Image files, in the natural order of their names (9.jpg before 10.jpg)."""

    def __init__(self, path: Path, rate_hz: float = 1.0) -> None:
        super().__init__(path)
        folder = path
        files = _image_files(folder)
        if not files and (path / "images").is_dir():
            folder = path / "images"
            files = _image_files(folder)
        if not files:
            inside = [child.name for child in sorted(path.iterdir()) if child.is_dir()]
            below = [name for name in inside if _image_files(path / name)]
            hint = f"; its sub-folders {', '.join(below)} do: pass one of them" if below else ""
            raise SourceError(
                f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) and is no rosbag2"
                f" (no metadata.yaml){hint}"
            )
        self._files = files
        self._stamps: dict[str, int] | None = None
        for table in (folder / "poses.csv", folder.parent / "poses.csv"):
            if table.is_file() and (stamps := read_stamps(table)):
                if not any(frame_key(file.name) in stamps for file in files):
                    raise SourceError(
                        f"{table} has a stamp for none of the images in {folder}: correct its "
                        "column frame or file, or move it away"
                    )
                self._stamps = stamps
                break
        if self._stamps is None:
            self._stamps = _stamps_in_names(files)
        self._period_ns = 1e9 / rate_hz

    @property
    def stamped(self) -> bool:
        """Whether stamps come from a table and not from `rate_hz`."""
        return self._stamps is not None

    def __len__(self) -> int:
        return len(self._files)

    def listing(self) -> list[tuple[int | None, str]]:
        """Stamp (nanoseconds; None if poses.csv lacks it) and name of every file, none read."""
        if self._stamps is None:
            return [
                (round(index * self._period_ns), file.name)
                for index, file in enumerate(self._files)
            ]
        return [(self._stamps.get(frame_key(file.name)), file.name) for file in self._files]

    def frames(self) -> Iterator[Frame]:
        return self.sample(lambda index: True)

    def sample(self, wanted: Wanted) -> Iterator[Frame]:
        """The usable frames of the ``wanted`` numbers; other files are not read."""
        for index, (file, (stamp_ns, _)) in enumerate(
            zip(self._files, self.listing(), strict=True)
        ):
            if not wanted(index):
                continue
            if stamp_ns is None:
                self._skip("no stamp in poses.csv", file.name)
                continue
            try:
                image = decode_file(file.read_bytes())
            except UnusableImage as cause:
                self._skip(str(cause), file.name)
                continue
            yield Frame(stamp_ns, image, file.name)


class VideoSource(Source):
    """Frames of a video file, stamped by number and frame rate from zero."""

    def __init__(self, path: Path, rate_hz: float = 1.0) -> None:
        super().__init__(path)
        capture = self._open()
        try:
            self._count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            rate = capture.get(cv2.CAP_PROP_FPS)
            # Containers without a frame rate answer 0, or nonsense such as 90 000.
            self.rate_hz = rate if 0 < rate <= 1000 else rate_hz
        finally:
            capture.release()

    def __len__(self) -> int:
        return self._count

    def sample(self, wanted: Wanted) -> Iterator[Frame]:
        """Frames of the ``wanted`` numbers, as exactly as the video can be wound to them."""
        capture = self._open()
        try:
            at = 0
            for index in filter(wanted, range(self._count)):
                if index != at:
                    capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                found, bgr = capture.read()
                if not found:
                    return
                yield self._frame(index, bgr)
                at = index + 1
        finally:
            capture.release()

    def _frame(self, index: int, bgr: Any) -> Frame:
        image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        return Frame(round(index * 1e9 / self.rate_hz), image, str(index))

    def frames(self) -> Iterator[Frame]:
        capture = self._open()
        try:
            index = 0
            while True:
                found, bgr = capture.read()
                if not found:
                    break
                yield self._frame(index, bgr)
                index += 1
        finally:
            capture.release()
        if index == 0:
            raise SourceError(f"{self.path}: no frame of this video could be decoded")
        if index < self._count:
            self.skipped["missing at the end of the video"] = self._count - index
            logger.warning(
                "%s: the video ends after %d of %d frames", self.path, index, self._count
            )

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise SourceError(
                f"{self.path} is neither a bag (.bag, .mcap, .db3, a folder with metadata.yaml) "
                "nor a folder of images nor a video that OpenCV can open"
            )
        return capture


def _image_files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((file for file in files if file.is_file()), key=lambda f: _natural(f.name))


def _stamps_in_names(files: list[Path]) -> dict[str, int] | None:
    """Stamps by `frame_key`, if every file is named by one: 1403636579763555584, 1305031102.17."""
    stamps: dict[str, int] = {}
    for file in files:
        if re.fullmatch(r"\d{18,19}", file.stem):
            stamps[frame_key(file.name)] = int(file.stem)
        elif re.fullmatch(r"\d{9,10}\.\d{2,9}", file.stem):
            stamps[frame_key(file.name)] = seconds_to_ns(file.stem, file.name)
        else:
            return None
    return stamps


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key in which numbers compare as numbers."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part] + [(2, name)]
