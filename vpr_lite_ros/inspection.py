"""Does this recording fit? Images, stamps, calibration and odometry, as `doctor` sees them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpr_lite_ros.bags import SourceError, open_source
from vpr_lite_ros.bags.pixels import UnusableImage, decode_message
from vpr_lite_ros.bags.rosbag import Bag, is_bag
from vpr_lite_ros.bags.sources import CAMERA_INFO_TYPE, IMAGE_TYPES, FolderSource, VideoSource
from vpr_lite_ros.camera_file import camera_beside, read_camera
from vpr_lite_ros.doctor import ok, problem, warning
from vpr_lite_ros.health import SIZE, Finding, Severity, StreamHealth
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.odometry import ODOMETRY_TOLERANCE_NS, ODOMETRY_TYPE, odometry_topics
from vpr_lite_ros.progress import progress

LOOKED_AT = 400
"""Images of a recording that are decoded, evenly spread and two at a time."""
READ = 2000
"""Messages of a bag with more images than this that are read, ..."""
IN_A_ROW = 20
"""... so many at a time, for their stamps to tell the pace."""
AROUND_NS = 1_000_000_000
"""Poses recorded this long before and after some images are looked for theirs."""
RECORDED_SHARE = 0.05
"""Share of bad images from which there is a warning: a recording is judged as a whole."""
STAMPS_KEPT = 1_000_000


class Stream:
    """What was seen of one stream of images: a topic, live or recorded, a folder or a video."""

    def __init__(self, health: StreamHealth, unit: str) -> None:
        self.health, self.unit = health, unit
        self.count = 0
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.encodings: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()
        self.stamps_ns: list[int] = []

    def note_message(
        self, message: Any, stamp_ns: int, arrival_ns: int, follows: bool = True
    ) -> None:
        """Take a sensor_msgs Image or CompressedImage, its pixels not yet looked at.

        It does not follow the one before if others came between that nobody read.
        """
        self.count += 1
        self.encodings[getattr(message, "format", "") or getattr(message, "encoding", "")] += 1
        self.frames[message.header.frame_id] += 1
        if len(self.stamps_ns) < STAMPS_KEPT:
            self.stamps_ns.append(stamp_ns)
        self.health.see_stamp(stamp_ns, arrival_ns, follows=follows)

    def look_at(self, message: Any) -> None:
        """Decode a message and judge its pixels."""
        try:
            image = decode_message(message)
        except UnusableImage as cause:
            self.unusable[str(cause)] += 1
            return
        self.note_picture(image)

    def note_picture(self, image: Any) -> None:
        self.sizes[(image.shape[1], image.shape[0])] += 1
        self.health.see_image(image)

    def findings(self, name: str, total: int | None = None) -> Iterator[Finding]:
        """What there is, and what is wrong with it; the first line names the stream.

        ``total`` says how many images there are, if not all were counted.
        """
        looked = sum(self.sizes.values())
        sizes = ", ".join(f"{width}x{height}" for (width, height), _ in self.sizes.most_common(3))
        encodings = ", ".join(name or "''" for name, _ in self.encodings.most_common(3))
        rate = self.health.rate_hz
        pace = "" if math.isnan(rate) else f", {rate:.3g} a second"
        kind = f" {encodings}" if encodings else ""
        seen = f"{looked} looked at"
        if total is not None and self.count < total:
            seen += f", stamps of {self.count} read, evenly spread"
        yield ok(name, f"{total or self.count} {self.unit}{kind} {sizes}{pace}; {seen}")
        for cause, count in self.unusable.items():
            total = looked + sum(self.unusable.values())
            yield Finding(
                "unusable images",
                Severity.ERROR if count > total / 2 else Severity.WARNING,
                f"{count} of {total}: {cause}",
                "Record or publish a colour or grey image (rgb8, bgr8, mono8, Bayer, YUV 4:2:2) "
                "or JPEG or PNG; look whether the link loses packets.",
            )
        if len(self.sizes) > 1:
            yield warning(
                "sizes",
                f"images of {len(self.sizes)} sizes: {sizes}",
                "Keep to one: camera_info holds for one size only.",
            )
        for (width, height), _ in self.sizes.most_common(1):
            if width * height < SIZE[0] * SIZE[1] / 4:
                yield warning(
                    "small images",
                    f"{width}x{height}; the network takes {SIZE[0]}x{SIZE[1]}",
                    "Let the camera send at least half of that each way.",
                )
        if self.frames and "" in self.frames:
            yield warning(
                "frame_id",
                f"empty on {self.frames['']} of {self.count} images",
                "Let the driver fill it in: without it relative poses take the camera to look "
                "forward.",
            )
        yield from self.health.findings()


# -- recordings --------------------------------------------------------------------------------


def recording(
    path: Path, *, image_topic: str | None, odom_topic: str | None, rate_hz: float
) -> Iterator[Finding]:
    """Look at a bag, a folder of images or a video.

    ``rate_hz`` is of images without stamps.
    """
    try:
        if path.exists() and is_bag(path):
            yield from _bag(path, image_topic, odom_topic)
        else:
            yield from _files(path, rate_hz)
    except SourceError as error:
        yield problem("recording", str(error), "Pass a recording that `vpr-lite replay` can read.")


def _bag(path: Path, image_topic: str | None, odom_topic: str | None) -> Iterator[Finding]:
    bag = Bag(path)
    try:
        topics = bag.topics(*IMAGE_TYPES)
        if image_topic is not None or not topics:
            topics = [bag.choose_topic(IMAGE_TYPES, image_topic, "image", "--image-topic")]
        elif len(topics) > 1:
            yield warning(
                "image topics",
                f"{len(topics)}: {', '.join(topics)}",
                "Choose one with --image-topic; here each is looked at.",
            )
        for topic in topics:
            yield from _bag_topic(bag, topic, odom_topic)
    finally:
        bag.close()


def _bag_topic(bag: Bag, topic: str, odom_topic: str | None) -> Iterator[Finding]:
    total = bag.count(topic)
    stream = Stream(StreamHealth(LOOKED_AT, STAMPS_KEPT, RECORDED_SHARE), "images")
    stretches: list[list[int]] = []
    for follows, is_sample, time_ns, message in _read(bag, topic, total):
        stamp = message.header.stamp
        stream.note_message(message, stamp.sec * 10**9 + stamp.nanosec, time_ns, follows)
        if not follows or not stretches:
            stretches.append([time_ns, time_ns])
        stretches[-1][1] = time_ns
        if is_sample:
            stream.look_at(message)
    yield from stream.findings(topic, total)
    size = next((size for size, _ in stream.sizes.most_common(1)), None)
    yield from _bag_camera(bag, topic, size)
    yield _bag_odometry(bag, odom_topic, stream.stamps_ns, stretches)


def _read(bag: Bag, topic: str, total: int) -> Iterator[tuple[bool, bool, int, Any]]:
    """All messages of a topic, or, of many, stretches of them, evenly spread in time.

    With each: whether it follows the one before, whether to look at its pixels, and the time of
    recording.
    """
    if total <= READ:
        messages = progress(bag.messages(topic), total, "image", f"looking at {topic}")
        for index, (time_ns, message) in enumerate(messages):
            yield True, _is_sample(index, total), time_ns, message
        return
    count = READ // IN_A_ROW
    begin, end = bag.times_ns
    edges = [begin + (end - begin) * number // count for number in range(count + 1)]
    for start, stop in progress(itertools.pairwise(edges), count, "stretch", f"looking at {topic}"):
        for index, (time_ns, message) in enumerate(
            itertools.islice(bag.messages(topic, start, stop), IN_A_ROW)
        ):
            yield index > 0, index < LOOKED_AT // count, time_ns, message


def _is_sample(index: int, total: int) -> bool:
    """Whether a frame is one of the evenly spread pairs that are decoded."""
    every = max(1, 2 * math.ceil(total / LOOKED_AT)) if total > LOOKED_AT else 1
    return index % every < 2


def _bag_camera(bag: Bag, topic: str, size: tuple[int, int] | None) -> Iterator[Finding]:
    topics = bag.topics(CAMERA_INFO_TYPE)
    wanted = camera_info_beside(topic)
    chosen = wanted if wanted in topics else topics[0] if len(topics) == 1 else None
    if chosen is None:
        yield no_camera_info(f"the bag has {', '.join(topics) or 'none'}, expected {wanted}")
        return
    _, info = next(bag.messages(chosen))
    # ROS 1 spells the fields K and D.
    matrix, distortion = getattr(info, "k", None), getattr(info, "d", None)
    yield judge_camera(
        chosen,
        (int(info.width), int(info.height)),
        info.K if matrix is None else matrix,
        info.D if distortion is None else distortion,
        info.distortion_model,
        size,
    )


def _bag_odometry(
    bag: Bag, wanted: str | None, stamps_ns: Sequence[int], stretches: Sequence[Sequence[int]]
) -> Finding:
    """Of the images of some stretches, from when to when they were recorded."""
    topics = odometry_topics(bag)
    if wanted is None and len(topics) > 1:
        return warning(
            "odometry",
            f"{len(topics)} topics: {', '.join(topics)}",
            "Choose one with --odom-topic; without, none is used.",
        )
    if (wanted is None and not topics) or wanted == "":
        return NO_ODOMETRY
    topic = bag.choose_topic((ODOMETRY_TYPE,), wanted, "odometry", "--odom-topic")
    poses_ns = [
        message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        for begin, end in stretches
        for _, message in bag.messages(topic, begin - AROUND_NS, end + AROUND_NS)
    ]
    return judge_odometry(topic, with_a_pose(stamps_ns, poses_ns), len(stamps_ns))


def _files(path: Path, rate_hz: float) -> Iterator[Finding]:
    with open_source(path, rate_hz=rate_hz) as source:
        stream = Stream(StreamHealth(LOOKED_AT, STAMPS_KEPT, RECORDED_SHARE), "images")
        stream.count = total = len(source)
        stamped = isinstance(source, FolderSource) and source.stamped
        if isinstance(source, FolderSource) and stamped:
            stamps = [stamp_ns for stamp_ns, _ in source.listing() if stamp_ns is not None]
            for stamp_ns in stamps:
                # A table may begin at zero, which in a message says that there is no stamp.
                stream.health.see_stamp(stamp_ns - min(stamps[0], 0) + 1)
        assert isinstance(source, (FolderSource, VideoSource))
        chosen = source.sample(lambda index: _is_sample(index, total))
        for frame in progress(chosen, min(total, LOOKED_AT), "image", f"looking at {path.name}"):
            stream.note_picture(frame.image)
        if not stream.sizes and not source.skipped:
            raise SourceError(f"{path}: no frame of this video could be decoded")
        stream.unusable.update(source.skipped)
        yield from stream.findings(path.name)
        if isinstance(source, VideoSource):
            yield ok("stamps", f"by frame number, {source.rate_hz:g} a second")
        elif not stamped:
            yield ok("stamps", f"none: taken as {rate_hz:g} a second (--rate)")
        yield _camera_of_files(path, stream)


def _camera_of_files(path: Path, stream: Stream) -> Finding:
    file = camera_beside(path) if path.is_dir() else None
    if file is None:
        return ok("camera_info", "none: `replay` and `report` take a calibration with --camera")
    camera = read_camera(file)
    size = next((size for size, _ in stream.sizes.most_common(1)), None)
    matrix, distortion, model = camera.matrix, camera.distortion, camera.model
    return judge_camera(file.name, (camera.width, camera.height), matrix, distortion, model, size)


# -- what live topics are judged by, too -------------------------------------------------------


def camera_info_beside(image_topic: str) -> str:
    """Where drivers publish the calibration of an image topic."""
    parts = image_topic.split("/")
    if parts[-1] in ("compressed", "theora", "ffmpeg"):
        parts.pop()
    return "/".join([*parts[:-1], "camera_info"])


def no_camera_info(seen: str) -> Finding:
    return warning(
        "camera_info",
        seen,
        "Without it there is no epipolar check and no relative pose: calibrate the camera "
        "(camera_calibration) and let the driver publish it.",
    )


NO_ODOMETRY = ok("odometry", "none: keyframes are chosen by appearance, which does as well")


def with_a_pose(stamps_ns: Sequence[int], poses_ns: Sequence[int]) -> int:
    """How many of the images have a pose near enough to their stamp; both in any order."""
    poses = np.sort(np.array(poses_ns, np.int64))
    stamps = np.array(stamps_ns, np.int64)
    first = np.searchsorted(poses, stamps - ODOMETRY_TOLERANCE_NS, "left")
    last = np.searchsorted(poses, stamps + ODOMETRY_TOLERANCE_NS, "right")
    return int((last > first).sum())


def judge_odometry(topic: str, known: int, images: int) -> Finding:
    """``known`` of ``images`` have a pose near their stamp."""
    seen = f"{topic}: a pose for {known} of {images} images"
    if images and known < images / 2:
        return warning(
            "odometry",
            seen,
            "Let both bear stamps of one clock, and let odometry come at least 5 times a second: "
            "an image without a pose is a keyframe by time alone.",
        )
    return ok("odometry", seen)


def judge_camera(
    topic: str,
    size: tuple[int, int],
    matrix: Any,
    distortion: Any,
    model: str,
    image_size: tuple[int, int] | None,
) -> Finding:
    """Is a calibration there, of these images, and one that a camera can have?

    ``size`` and ``image_size`` are (width, height) in pixels, ``matrix`` is K, nine numbers.
    """
    calibrate = "Calibrate the camera (camera_calibration) and give the file to the driver."
    values = np.asarray(matrix, np.float64).ravel()
    try:
        Camera(
            size[0],
            size[1],
            tuple(values.tolist()),
            tuple(np.asarray(distortion, np.float64).ravel().tolist()),
            model or "plumb_bob",
        )
    except ValueError as error:
        return warning("camera_info", f"{topic}: {error}", f"It is not used. {calibrate}")
    fx, cx, fy, cy = values[0], values[2], values[4], values[5]
    seen = f"{topic}: {size[0]}x{size[1]}, fx {fx:.0f}, fy {fy:.0f}, cx {cx:.0f}, cy {cy:.0f}"
    if image_size is not None and abs(size[0] / size[1] - image_size[0] / image_size[1]) > 0.02:
        return problem(
            "camera_info",
            f"{seen}; images are {image_size[0]}x{image_size[1]}",
            "The calibration is of another format of the image: " + calibrate,
        )
    half = size[0] / 2 / fx
    across = 2 * math.degrees(half if model == "equidistant" else math.atan(half))
    odd = []
    if not 15 <= across <= (220 if model == "equidistant" else 150):
        odd.append(f"{across:.0f} degrees wide")
    if abs(cx / size[0] - 0.5) > 0.25 or abs(cy / size[1] - 0.5) > 0.25:
        odd.append("its centre is far from the image's")
    if not 0.5 <= fx / fy <= 2:
        odd.append("pixels are far from square")
    if odd:
        return warning("camera_info", f"{seen}; {', '.join(odd)}", f"Is that so? {calibrate}")
    return ok("camera_info", f"{seen}, {across:.0f} degrees wide")
