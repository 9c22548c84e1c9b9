"""Image sources and ground truth: real bags, videos and folders, whole and damaged."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from vpr_lite_ros.bags import (
    Poses,
    SourceError,
    open_source,
    read_pairs,
    read_poses,
    write_drive,
)
from vpr_lite_ros.simulation import simulate_drive

ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_JAZZY)
# ROS 1 calls it by the one name or the other, by how old the recording is.
for transforms in ("tf2_msgs/msg/TFMessage", "tf/msg/tfMessage"):
    ROS1.register(get_types_from_msg("geometry_msgs/TransformStamped[] transforms", transforms))
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
INFO, ODOMETRY = "sensor_msgs/msg/CameraInfo", "nav_msgs/msg/Odometry"
SECOND = 10**9

Image = NDArray[np.uint8]
Item = tuple[str, int, Any]  # topic, time of recording in nanoseconds, message


# --- what goes into the bags


def picture(number: int = 0) -> Image:
    """A smooth RGB image (48, 64, 3), so that JPEG and YUV keep it almost as it is."""
    rows, columns = np.mgrid[0:48, 0:64]
    red, green = columns * 3 + 20, rows * 4 + 10
    blue = np.full_like(red, (40 + 37 * number) % 256)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def header(stamp_ns: int, store: Any = ROS2) -> Any:
    time = store.types["builtin_interfaces/msg/Time"](
        sec=stamp_ns // SECOND, nanosec=stamp_ns % SECOND
    )
    extra = {"seq": 0} if store is ROS1 else {}
    return store.types["std_msgs/msg/Header"](stamp=time, frame_id="camera", **extra)


def raw(pixels: NDArray[Any], encoding: str, stamp_ns: int = SECOND, **changed: Any) -> Any:
    store = changed.pop("store", ROS2)
    fields: dict[str, Any] = {
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "encoding": encoding,
        "is_bigendian": 0,
        "step": pixels.strides[0],
        "data": np.frombuffer(pixels.tobytes(), np.uint8),
    }
    return store.types[IMAGE](header=header(stamp_ns, store), **{**fields, **changed})


def encoded(image: Image, suffix: str = ".jpg") -> Image:
    return np.asarray(cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]).reshape(-1)


def jpeg(data: NDArray[np.uint8], stamp_ns: int = SECOND, store: Any = ROS2) -> Any:
    return store.types[COMPRESSED](header=header(stamp_ns, store), format="jpeg", data=data)


def camera_info1(focal: float) -> Any:
    roi = ROS1.types["sensor_msgs/msg/RegionOfInterest"](
        x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    matrix = np.array([focal, 0, 32, 0, focal, 24, 0, 0, 1.0])
    return ROS1.types[INFO](
        header=header(SECOND, ROS1), height=48, width=64, distortion_model="plumb_bob",
        D=np.zeros(5), K=matrix, R=np.eye(3).reshape(-1), P=np.zeros(12), binning_x=0,
        binning_y=0, roi=roi,
    )  # fmt: skip


def camera_info(focal: float) -> Any:
    roi = ROS2.types["sensor_msgs/msg/RegionOfInterest"](
        x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    matrix = np.array([focal, 0, 32, 0, focal, 24, 0, 0, 1.0])
    projection = np.array([focal + 1, 0, 32, 0, 0, focal + 1, 24, 0, 0, 0, 1, 0.0])
    return ROS2.types[INFO](
        header=header(SECOND), height=48, width=64, distortion_model="plumb_bob",
        d=np.zeros(5), k=matrix, r=np.eye(3).reshape(-1), p=projection, binning_x=0,
        binning_y=0, roi=roi,
    )  # fmt: skip


def odometry(x: float, stamp_ns: int) -> Any:
    types = ROS2.types
    vector = types["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
    return types[ODOMETRY](
        header=header(stamp_ns),
        child_frame_id="base_link",
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=pose(x), covariance=np.zeros(36)),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            twist=types["geometry_msgs/msg/Twist"](linear=vector, angular=vector),
            covariance=np.zeros(36),
        ),
    )


def pose(x: float) -> Any:
    types = ROS2.types
    return types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](x=x, y=2 * x, z=0.5),
        orientation=types["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=0.0, w=1.0),
    )


def write_bag(path: Path, items: Iterable[Item], storage: str = "sqlite3") -> Path:
    plugin = {"sqlite3": StoragePlugin.SQLITE3, "mcap": StoragePlugin.MCAP}[storage]
    connections: dict[str, Any] = {}
    with Writer2(path, version=8, storage_plugin=plugin) as writer:
        for topic, time_ns, message in items:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=ROS2)
            writer.write(connections[topic], time_ns, ROS2.serialize_cdr(message, kind))
    return path


def write_bag1(path: Path, items: Iterable[Item], compressed: bool = False) -> Path:
    connections: dict[str, Any] = {}
    writer = Writer1(path)
    if compressed:
        writer.set_compression(Writer1.CompressionFormat.BZ2)
    with writer:
        for topic, time_ns, message in items:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=ROS1)
            writer.write(connections[topic], time_ns, ROS1.serialize_ros1(message, kind))
    return path


def three_images(topic: str = "/cam/image") -> list[Item]:
    return [(topic, (n + 10) * SECOND, raw(picture(n), "rgb8", (n + 1) * SECOND)) for n in range(3)]


def only_image(bag: Path) -> Image:
    with open_source(bag) as source:
        (frame,) = source.frames()
    return frame.image


# --- bags


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_rosbag2_gives_images_with_their_header_stamps(tmp_path: Path, storage: str) -> None:
    path = write_bag(tmp_path / "bag", three_images(), storage)
    with open_source(path) as source:
        assert len(source) == 3
        frames = list(source)
        assert [frame.stamp_ns for frame in frames] == [SECOND, 2 * SECOND, 3 * SECOND]
        assert {frame.name for frame in frames} == {"/cam/image"}
        for number, frame in enumerate(frames):
            np.testing.assert_array_equal(frame.image, picture(number))
        assert source.skipped == {}
        assert len(list(source.frames())) == 3, "frames() starts again"


@pytest.mark.parametrize(("storage", "suffix"), [("sqlite3", ".db3"), ("mcap", ".mcap")])
def test_one_file_of_a_rosbag2_will_do(tmp_path: Path, storage: str, suffix: str) -> None:
    path = write_bag(tmp_path / "bag", three_images(), storage)
    (path / "metadata.yaml").unlink()  # as a recorder leaves it that was killed
    for source_path in (path, next(path.glob(f"*{suffix}"))):
        with open_source(source_path) as source:
            assert len(list(source)) == 3


def test_ros1_bag(tmp_path: Path) -> None:
    items: list[Item] = [
        ("/cam/image_raw/compressed", n * SECOND,
         jpeg(encoded(picture(n)), n * SECOND + 5, ROS1)) for n in (1, 2)
    ]  # fmt: skip
    items.append(("/cam/camera_info", 3 * SECOND, camera_info1(50.0)))
    with open_source(write_bag1(tmp_path / "old.bag", items)) as source:
        assert source.camera_matrix is not None
        assert source.camera_matrix[0, 0] == 50
        frames = list(source)
        assert [frame.stamp_ns for frame in frames] == [SECOND + 5, 2 * SECOND + 5]
        assert np.abs(frames[1].image.astype(int) - picture(2)).mean() < 3


def test_images_without_a_stamp_take_the_time_of_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [("/cam", n * SECOND, raw(picture(), "rgb8", 0)) for n in (7, 8)]
    with caplog.at_level(logging.WARNING), open_source(write_bag(tmp_path / "bag", items)) as bag:
        assert [frame.stamp_ns for frame in bag] == [7 * SECOND, 8 * SECOND]
    assert len([r for r in caplog.records if "no header stamp" in r.message]) == 1


def yuv422(image: Image) -> Image:
    """UYVY (48, 64, 2), written out from the definition of BT.601."""
    red, green, blue = np.moveaxis(image.astype(float), 2, 0)
    luma = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    u = 128 + (-37.797 * red - 74.203 * green + 112.0 * blue) / 255
    v = 128 + (112.0 * red - 93.786 * green - 18.214 * blue) / 255
    chroma = np.where(np.arange(64) % 2 == 0, u, v)
    return np.stack([chroma, luma], axis=2).round().astype(np.uint8)


def test_encodings(tmp_path: Path) -> None:
    image = picture()
    grey = image[..., 0].copy()
    bgr = np.ascontiguousarray(image[..., ::-1])
    alpha = np.full((48, 64, 1), 255, np.uint8)
    cases: dict[str, tuple[Any, Image, float]] = {
        "rgb8": (raw(image, "rgb8"), image, 0),
        "bgr8": (raw(bgr, "bgr8"), image, 0),
        "8UC3": (raw(bgr, "8UC3"), image, 0),
        "rgba8": (raw(np.concatenate([image, alpha], axis=2), "rgba8"), image, 0),
        "bgra8": (raw(np.concatenate([bgr, alpha], axis=2), "bgra8"), image, 0),
        "mono8": (raw(grey, "mono8"), np.dstack([grey] * 3), 0),
        "mono16": (raw(grey.astype("<u2") * 257, "mono16"), np.dstack([grey] * 3), 1),
        "mono16be": (
            raw(grey.astype(">u2") * 257, "mono16", is_bigendian=1),
            np.dstack([grey] * 3),
            1,
        ),
        "yuv422": (raw(yuv422(image), "yuv422"), image, 6),
        "png": (jpeg(encoded(image, ".png")), image, 0),
        "jpeg": (jpeg(encoded(image)), image, 20),
        "grey jpeg": (jpeg(np.asarray(cv2.imencode(".jpg", grey)[1]).reshape(-1)),
                      np.dstack([grey] * 3), 8),
    }  # fmt: skip
    for name, (message, expected, tolerance) in cases.items():
        found = only_image(write_bag(tmp_path / name, [("/cam", SECOND, message)]))
        assert found.dtype == np.uint8, name
        assert found.shape == expected.shape, name
        assert np.abs(found.astype(int) - expected).max() <= tolerance, name


def test_bayer_gives_colours(tmp_path: Path) -> None:
    red_only = np.zeros((48, 64), np.uint8)
    red_only[::2, ::2] = 200  # rggb: red sits on even rows and columns
    found = only_image(write_bag(tmp_path / "b", [("/c", 1, raw(red_only, "bayer_rggb8"))]))
    red, green, blue = found[8:-8, 8:-8].reshape(-1, 3).mean(axis=0)
    assert red > 150
    assert green < 20
    assert blue < 20


def test_padded_rows(tmp_path: Path) -> None:
    padded = np.zeros((48, 64 * 3 + 10), np.uint8)
    padded[:, : 64 * 3] = picture().reshape(48, -1)
    for name, data in (("whole", padded.reshape(-1)), ("last", padded.reshape(-1)[:-10])):
        message = raw(picture(), "rgb8", step=padded.shape[1], data=data)
        found = only_image(write_bag(tmp_path / name, [("/cam", SECOND, message)]))
        np.testing.assert_array_equal(found, picture())


def test_unusable_frames_are_counted_said_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = encoded(picture())
    start = whole.tobytes().index(b"\xff\xc0") + 5
    huge = whole[:start].tobytes() + b"\xfd\xe8" * 2 + whole[start + 4 :].tobytes()
    compressed = [
        jpeg(whole), jpeg(whole[: len(whole) // 2]), jpeg(whole[: len(whole) // 3]),
        jpeg(whole[:0]), jpeg(np.arange(200, dtype=np.uint8)),
        jpeg(encoded(picture(), ".png")[:-40]),
        jpeg(np.append(whole, np.zeros(9, np.uint8))),  # some cameras pad
        jpeg(np.frombuffer(huge, np.uint8)),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        path = write_bag(tmp_path / "a", [("/cam", n + 1, m) for n, m in enumerate(compressed)])
        with open_source(path) as source:
            assert len(source) == 8
            assert len(list(source)) == 2
            assert source.skipped == {
                "too many pixels": 1,
                "truncated JPEG": 2,
                "empty image": 1,
                "undecodable image data": 1,
                "truncated PNG": 1,
            }
    assert sum("truncated JPEG" in record.message for record in caplog.records) == 1

    plain = [
        raw(picture(), "rgb8"),
        raw(picture(), "rgb8", data=picture().reshape(-1)[:100]),
        raw(picture(), "rgb8", data=np.zeros(0, np.uint8)),
        raw(picture(), "hsv7"),
        raw(np.ones((48, 64), np.float32), "32FC1"),
        raw(np.zeros((1, 640, 3), np.uint8), "rgb8"),
    ]
    path = write_bag(tmp_path / "b", [("/cam", n + 1, m) for n, m in enumerate(plain)])
    with open_source(path) as source:
        assert len(list(source)) == 1
        assert source.skipped == {
            "truncated image": 1,
            "empty image": 1,
            "encoding 'hsv7' is not a colour or grey image": 1,
            "encoding '32FC1' is not a colour or grey image": 1,
            "not a picture": 1,
        }


def test_topics_are_chosen_and_errors_list_them(tmp_path: Path) -> None:
    items = [*three_images("/left/image"), *three_images("/right/image")]
    path = write_bag(tmp_path / "two", items)
    with pytest.raises(
        SourceError, match=r"/left/image \(3 messages\), /right/image.*--image-topic"
    ):
        open_source(path)
    with open_source(path, image_topic="right/image") as source:
        assert next(iter(source)).name == "/right/image"
    with pytest.raises(SourceError, match=r"'/up/image'.*its image topics are: /left/image"):
        open_source(path, image_topic="/up/image")

    path = write_bag(tmp_path / "none", [("/odom", 1, odometry(0.0, 1))])
    with pytest.raises(SourceError, match=r"no image topic.*it holds: /odom \(nav_msgs"):
        open_source(path)
    with pytest.raises(SourceError, match=r"no image topic '/cam'; it has no image topic"):
        open_source(path, image_topic="/cam")


def test_camera_info_beside_the_images_is_taken(tmp_path: Path) -> None:
    items: list[Item] = [
        ("/other/camera_info", 1, camera_info(10.0)),
        ("/front/camera_info", 2, camera_info(20.0)),
        ("/front/image_raw/compressed", 3, jpeg(encoded(picture()))),
        ("/front/image_rect", 3, raw(picture(), "rgb8")),
        ("/back/image", 3, raw(picture(), "rgb8")),
    ]
    path = write_bag(tmp_path / "bag", items)
    with open_source(path, image_topic="/front/image_raw/compressed") as source:
        assert source.camera_matrix is not None
        np.testing.assert_array_equal(source.camera_matrix, [[20, 0, 32], [0, 20, 24], [0, 0, 1]])
        assert source.image_size == (64, 48)
    with open_source(path, image_topic="/front/image_rect") as source:
        assert source.camera_matrix is not None
        assert source.camera_matrix[0, 0] == 21, "rectified images have the projection's matrix"
    with open_source(path, image_topic="/back/image") as source:
        assert source.camera_matrix is None, "two cameras and neither is this one"


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_truncated_rosbag2(tmp_path: Path, storage: str) -> None:
    items = [("/cam", n + 1, raw(picture(n), "rgb8")) for n in range(30)]
    path = write_bag(tmp_path / "bag", items, storage)
    (file,) = (f for f in path.iterdir() if f.name != "metadata.yaml")
    data = file.read_bytes()
    for share in (0.0, 0.02, 0.5, 0.9):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SourceError, match=r"cannot be read as a bag.*ros2 bag reindex"):  # noqa: SIM117
            with open_source(path) as source:
                assert len(list(source)) == 30


def test_truncated_ros1_bag(tmp_path: Path) -> None:
    items = [("/cam", n + 1, raw(picture(n), "rgb8", store=ROS1)) for n in range(5)]
    path = write_bag1(tmp_path / "old.bag", items)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match=r"cannot be read as a bag.*`rosbag reindex"):
        open_source(path)
    path.write_bytes(b"no bag at all")
    with pytest.raises(SourceError, match=r"cannot be read as a bag"):
        open_source(path)


def test_split_bag_without_metadata(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", three_images())
    (path / "metadata.yaml").unlink()
    (file,) = path.glob("*.db3")
    shutil.copy(file, path / "other.db3")
    with pytest.raises(SourceError, match=r"no metadata\.yaml.*ros2 bag reindex.*other\.db3"):
        open_source(path)


def test_reading_a_bag_keeps_one_image_at_a_time(tmp_path: Path) -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    items = [("/cam", n + 1, raw(image, "rgb8")) for n in range(40)]
    path = write_bag(tmp_path / "bag", items)
    with open_source(path) as source:
        tracemalloc.start()
        count = sum(1 for _ in source)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == 40
    assert peak < 8 * image.nbytes


# --- folders and videos


def write_images(folder: Path, names: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(number), Path(name).suffix).tobytes())


def test_folder_in_natural_order_at_a_rate(tmp_path: Path) -> None:
    write_images(tmp_path, ["10.png", "9.png", "notes_2.JPG", "notes_10.jpg"])
    (tmp_path / "readme.txt").write_text("no image")
    with open_source(tmp_path, rate_hz=4.0) as source:
        assert len(source) == 4
        assert source.camera_matrix is None
        frames = list(source)
    assert [frame.name for frame in frames] == ["9.png", "10.png", "notes_2.JPG", "notes_10.jpg"]
    assert [frame.stamp_ns for frame in frames] == [0, 250_000_000, 500_000_000, 750_000_000]
    np.testing.assert_array_equal(frames[1].image, picture(0))


def test_folder_with_stamps_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images", ["000000.png", "000002.png", "000004.png"])
    (tmp_path / "poses.csv").write_text(
        "index,frame,stamp_s,x,y,z\n0,0,1700000000.123456789,0,0,0\n1,2,1700000000.5,1,0,0\n"
    )
    for path in (tmp_path, tmp_path / "images"):
        with caplog.at_level(logging.WARNING), open_source(path) as source:
            stamps = [frame.stamp_ns for frame in source]
        assert stamps == [1_700_000_000_123_456_789, 1_700_000_000_500_000_000]
        assert source.skipped == {"no stamp in poses.csv": 1}
    (tmp_path / "poses.csv").write_text("file,stamp_s,x,y\nimages/a.png,1,0,0\n")
    with pytest.raises(SourceError, match=r"poses\.csv has a stamp for none of the images"):
        open_source(tmp_path)


def test_folder_with_damaged_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:300])
    (tmp_path / "c.jpg").write_bytes(b"")
    with open_source(tmp_path) as source:
        assert [frame.name for frame in source] == ["a.jpg"]
        assert source.skipped == {"truncated JPEG": 1, "empty image": 1}


def write_video(path: Path, count: int, rate: float) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (64, 48))
    assert writer.isOpened()
    for number in range(count):
        writer.write(cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    writer.release()


def test_video(tmp_path: Path) -> None:
    path = tmp_path / "drive.avi"
    write_video(path, 6, 12.5)
    with open_source(path) as source:
        assert len(source) == 6
        frames = list(source)
        assert len(list(source)) == 6
    assert [frame.stamp_ns for frame in frames] == [n * 80_000_000 for n in range(6)]
    assert [frame.name for frame in frames[:2]] == ["0", "1"]
    assert np.abs(frames[3].image.astype(int) - picture(3)).mean() < 5


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"holds no images"):
        open_source(tmp_path / "empty")
    write_images(tmp_path / "above" / "left", ["1.png"])
    with pytest.raises(SourceError, match=r"its sub-folders left do"):
        open_source(tmp_path / "above")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(SourceError, match=r"neither a bag .* nor a video"):
        open_source(tmp_path / "text.txt")
    with pytest.raises(SourceError, match=r"rate_hz.*0"):
        open_source(tmp_path / "above" / "left", rate_hz=0)


# --- ground truth


def test_poses_of_a_csv_table(tmp_path: Path) -> None:
    table = tmp_path / "poses.csv"
    table.write_text("frame, stamp_s, x, y, z\n2, 2.5, 3, 4, 5\n0, 0.5, 1, 2, 3\n")
    poses = read_poses(table)
    assert poses.names == ("0", "2")
    np.testing.assert_array_equal(poses.xyz, [[1, 2, 3], [3, 4, 5]])
    assert poses.stamps_ns is not None
    assert poses.stamps_ns.tolist() == [500_000_000, 2_500_000_000]
    np.testing.assert_array_equal(read_poses(tmp_path).xyz, poses.xyz)

    table.write_text("index,file,x,y,yaw\n0,images/000.jpg,1,2,0\n")
    poses = read_poses(table)
    assert poses.stamps_ns is None
    np.testing.assert_array_equal(poses.xyz, [[1, 2, 0]])


def test_poses_of_a_tum_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "truth.txt"
    path.write_text("# stamp tx ty tz qx qy qz qw\n1700000000.000000001 1 2 3 0 0 0 1\n\n")
    poses = read_poses(path)
    assert poses.stamps_ns is not None
    assert poses.stamps_ns.tolist() == [1_700_000_000_000_000_001]
    np.testing.assert_array_equal(poses.xyz, [[1, 2, 3]])


def test_poses_of_a_bag(tmp_path: Path) -> None:
    items = [("/odom", n, odometry(float(n), n * SECOND)) for n in (1, 2)]
    path = write_bag(tmp_path / "one", items)
    poses = read_poses(path)
    np.testing.assert_array_equal(poses.xyz, [[1, 2, 0.5], [2, 4, 0.5]])

    stamped = ROS2.types["geometry_msgs/msg/PoseStamped"](header=header(SECOND), pose=pose(9.0))
    two = [*items, ("/gps", 3, stamped)]
    path = write_bag(tmp_path / "two", two)
    # Odometry drifts, so what else there is goes before it.
    assert read_poses(path).source == "/gps (geometry_msgs/msg/PoseStamped)"
    assert read_poses(path).xyz[0, 0] == 9.0
    odometry_poses = read_poses(path, topic="/odom")
    assert odometry_poses.xyz[0, 0] == 1.0 and odometry_poses.drifts
    path = write_bag(tmp_path / "both", [*two, ("/map_pose", 3, stamped)])
    with pytest.raises(SourceError, match=r"several pose topics: /gps \(1 messages\), /map_pose"):
        read_poses(path)

    path = write_bag(tmp_path / "three", [*items, ("/ground_truth", 3, stamped)])
    assert read_poses(path).xyz[0, 0] == 9.0
    path = write_bag(tmp_path / "four", three_images())
    with pytest.raises(SourceError, match=r"no pose topic"):
        read_poses(path)


def transform(parent: str, child: str, x: float, stamp_ns: int, yaw: float = 0.0) -> Any:
    """``child`` at (x, 0, 0) in ``parent``, turned by ``yaw`` radians."""
    types = ROS2.types
    about = dataclasses.replace(header(stamp_ns), frame_id=parent)
    return types["geometry_msgs/msg/TransformStamped"](
        header=about,
        child_frame_id=child,
        transform=types["geometry_msgs/msg/Transform"](
            translation=types["geometry_msgs/msg/Vector3"](x=x, y=0.0, z=0.0),
            rotation=types["geometry_msgs/msg/Quaternion"](
                x=0.0, y=0.0, z=float(np.sin(yaw / 2)), w=float(np.cos(yaw / 2))
            ),
        ),
    )


def fix(latitude: float, longitude: float, stamp_ns: int, status: int = 0) -> Any:
    types = ROS2.types
    return types["sensor_msgs/msg/NavSatFix"](
        header=header(stamp_ns),
        status=types["sensor_msgs/msg/NavSatStatus"](status=status, service=1),
        latitude=latitude, longitude=longitude, altitude=100.0,
        position_covariance=np.zeros(9), position_covariance_type=0,
    )  # fmt: skip


def tf(*transforms: Any) -> Any:
    return ROS2.types["tf2_msgs/msg/TFMessage"](transforms=list(transforms))


def where_it_was(kind: str, x: float, at: int) -> tuple[str, Any]:
    """Topic and message that say: at nanosecond ``at`` it was at ``x`` metres."""
    types = ROS2.types
    match kind:
        case "odometry":
            return "/odom", odometry(x, at)
        case "pose":
            named = types["geometry_msgs/msg/PoseStamped"]
            return "/pose", named(header=header(at), pose=pose(x))
        case "point":
            named = types["geometry_msgs/msg/PointStamped"]
            point = types["geometry_msgs/msg/Point"](x=x, y=0.0, z=0.0)
            return "/leica", named(header=header(at), point=point)
        case "transform":
            return "/vicon", transform("world", "body", x, at)
        case "tf":
            return "/tf", tf(transform("map", "base_link", x, at))
    # One degree of longitude at the equator is 111.3 km.
    return "/fix", fix(0.0, x / 111319.49, at)


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
@pytest.mark.parametrize("kind", ["odometry", "pose", "point", "transform", "tf", "fix"])
def test_each_ground_truth_of_a_bag(tmp_path: Path, storage: str, kind: str) -> None:
    said = [(n, *where_it_was(kind, float(n), n * SECOND)) for n in range(1, 5)]
    items = three_images() + [(topic, n * SECOND, message) for n, topic, message in said]
    poses = read_poses(write_bag(tmp_path / "bag", items, storage))
    # Images are at 1, 2 and 3 s.
    found = poses.positions_for([SECOND, 2 * SECOND, 5 * SECOND // 2])
    # Fixes are counted from the first one.
    expected = np.array([1, 2, 2.5]) - (1.0 if kind == "fix" else 0.0)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-4)
    assert said[0][1] in poses.source
    assert poses.drifts == (kind == "odometry")


def test_transforms_are_followed_from_the_map_to_the_body(tmp_path: Path) -> None:
    quarter = np.pi / 2
    items: list[Item] = [
        ("/tf_static", 0, tf(transform("base_footprint", "base_link", 0.5, 0))),
        ("/tf", SECOND, tf(transform("odom", "base_footprint", 1.0, SECOND))),
        ("/tf", 2 * SECOND, tf(transform("map", "odom", 10.0, 2 * SECOND, quarter),
                               transform("odom", "base_footprint", 2.0, 2 * SECOND))),
        ("/tf", 3 * SECOND, tf(transform("base_link", "arm", 9.0, 3 * SECOND))),
    ]  # fmt: skip
    poses = read_poses(write_bag(tmp_path / "bag", items))
    assert poses.source == "/tf (map to base_link)" and not poses.drifts
    # The map turns the odometry's frame by a quarter: 2.5 m ahead is 2.5 m to the left.
    np.testing.assert_allclose(poses.xyz[-1], [10, 2.5, 0], atol=1e-12)
    assert poses.stamps_ns is not None and poses.stamps_ns.tolist() == [SECOND, 2 * SECOND]

    arm = [("/tf", SECOND, tf(transform("map", "gripper", 1.0, SECOND)))]
    with pytest.raises(SourceError, match=r"base_link.*only gripper, map.*--poses"):
        read_poses(write_bag(tmp_path / "arm", arm))
    # Rather odometry than nothing.
    wheels = [("/odom", SECOND, odometry(4.0, SECOND))]
    assert read_poses(write_bag(tmp_path / "both", arm + wheels)).xyz[0, 0] == 4.0


def test_fixes_are_metres_east_and_north(tmp_path: Path) -> None:
    items = [
        ("/fix", SECOND, fix(48.0, 11.0, SECOND)),
        ("/fix", 2 * SECOND, fix(0.0, 0.0, 2 * SECOND, status=-1)),  # no fix
        ("/fix", 3 * SECOND, fix(48.001, 11.001, 3 * SECOND)),
        ("/fix", 4 * SECOND, fix(float("nan"), 11.0, 4 * SECOND)),
    ]
    poses = read_poses(write_bag(tmp_path / "bag", items))
    # Lengths of a degree at 48 degrees, as tables of the WGS84 ellipsoid give them.
    np.testing.assert_allclose(poses.xyz, np.array([[0.0, 0, 0], [74.63, 111.20, 0]]), atol=0.02)
    none = [("/fix", SECOND, fix(0.0, 0.0, SECOND, status=-1))]
    with pytest.raises(SourceError, match="no message on /fix holds a fix"):
        read_poses(write_bag(tmp_path / "none", none))


def test_trajectories_of_kitti_and_euroc(tmp_path: Path) -> None:
    kitti = tmp_path / "00.txt"
    kitti.write_text("1 0 0 5 0 1 0 6 0 0 1 7\n1 0 0 8 0 1 0 9 0 0 1 10\n")
    at = read_poses(kitti).positions_for([0, 0], ["000001.png", "000000.png"])
    np.testing.assert_array_equal(at, [[8, 9, 10], [5, 6, 7]])
    euroc = tmp_path / "data.csv"
    euroc.write_text(
        "#timestamp, p_RS_R_x [m], p_RS_R_y [m], p_RS_R_z [m], q_RS_w []\n"
        "1403636579763555584,4.6,-1.7,0.8,0.5\n1403636580763555584,4.8,-1.9,0.8,0.5\n"
    )
    at = read_poses(euroc).positions_for([1403636580263555584])
    np.testing.assert_allclose(at, [[4.7, -1.8, 0.8]])
    kitti.write_text("1 2 3\n")
    with pytest.raises(SourceError, match=r"8 numbers a line.*KITTI 12.*this one has 3"):
        read_poses(kitti)


@pytest.mark.parametrize(
    ("names", "stamps"),
    [
        (
            ["1403636579763555584", "1403636579813555584"],
            [1403636579763555584, 1403636579813555584],
        ),
        (["1305031102.175304", "1305031102.211214"], [1305031102175304000, 1305031102211214000]),
        (["1305031102.175304", "cover"], [0, SECOND]),
        (["000001", "000002"], [0, SECOND]),
    ],
)
def test_names_that_are_stamps_are_taken_as_such(
    tmp_path: Path, names: list[str], stamps: list[int]
) -> None:
    for name in names:
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture())
    with open_source(tmp_path) as source:
        assert [frame.stamp_ns for frame in source] == stamps


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,stamp_s\n1,2\n", "no column y.*x,stamp_s"),
        ("a.csv", "x,y\n1,2\n", "which image it belongs to"),
        ("a.csv", "x,y,stamp_s\n1,two,3\n", "line 2.*'two'"),
        ("a.csv", "x,y,stamp_s\n1,2,soon\n", "line 2: 'soon' is not a time stamp"),
        ("a.csv", "x,y,stamp_s\n1,nan,3\n", "pose 0 is not finite"),
        ("a.csv", "x,y,stamp_s\n", "no rows"),
        ("a.txt", "1 2 3\n", "line 1: a TUM trajectory has 8 numbers.*has 3"),
        ("a.txt", "# nothing\n", "holds no poses"),
        ("a.txt", "1 2 x 3 0 0 0 1\n", "line 1.*'x'"),
    ],
)
def test_unusable_poses(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        read_poses(tmp_path / name)


def test_missing_poses(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"does not exist"):
        read_poses(tmp_path / "none.csv")
    with pytest.raises(SourceError, match=r"folder without poses\.csv"):
        read_poses(tmp_path)


def test_positions_by_stamp_and_by_name() -> None:
    start = 1_700_000_000 * SECOND
    stamps = start + np.array([0, 1, 2, 10], np.int64) * SECOND
    poses = Poses(np.array([[0, 0, 0], [2, 0, 0], [4, 2, 0], [9, 9, 9.0]]), stamps)
    asked = [start, start + SECOND // 2, start + 2 * SECOND, start + 5 * SECOND, start - 1]
    found = poses.positions_for(asked)
    np.testing.assert_allclose(found[:3], [[0, 0, 0], [1, 0, 0], [4, 2, 0]], atol=1e-9)
    assert np.isnan(found[3:]).all(), "inside a gap, and before the first"

    named = Poses(np.array([[1, 1, 1], [2, 2, 2.0]]), None, ("0", "images/000002.jpg"))
    found = named.positions_for([0, 0, 0], ["000000.png", "2", "7.png"])
    np.testing.assert_array_equal(found[:2], [[1, 1, 1], [2, 2, 2]])
    assert np.isnan(found[2]).all()
    assert np.isnan(named.positions_for([0])).all()


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "loops.csv"
    path.write_text("query,match\n40,0\n40,1\n")
    assert read_pairs(path) == [(40, 0), (40, 1)]
    path.write_text("query,place\n40,0\n")
    with pytest.raises(SourceError, match=r"no column 'match'.*query,place"):
        read_pairs(path)
    path.write_text("query,match\n40,x\n")
    with pytest.raises(SourceError, match=r"line 2"):
        read_pairs(path)
    with pytest.raises(SourceError, match=r"does not exist"):
        read_pairs(tmp_path / "none.csv")


# --- the demo drive


@pytest.mark.parametrize(("compressed", "storage"), [(True, "sqlite3"), (False, "mcap")])
def test_a_written_drive_reads_back(tmp_path: Path, compressed: bool, storage: str) -> None:
    drive = simulate_drive(3, image_size=(96, 64)).part(10, 14)
    path = write_drive(drive, tmp_path / "drive", compressed=compressed, storage=storage)
    with open_source(path) as source:
        assert source.camera_matrix is not None
        np.testing.assert_array_equal(source.camera_matrix, drive.camera_matrix)
        assert source.image_size == (96, 64)
        frames = list(source)
    assert len(frames) == 4
    for frame, drawn in zip(frames, drive.frames(), strict=True):
        assert frame.stamp_ns == drawn.stamp_ns
        difference = np.abs(frame.image.astype(int) - drawn.image)
        assert difference.mean() < 6 if compressed else difference.max() == 0
    truth = read_poses(path).positions_for([frame.stamp_ns for frame in frames])
    np.testing.assert_allclose(truth[:, :2], drive.poses[:, :2], atol=1e-9)
    wheels = read_poses(path, topic="/odom")
    np.testing.assert_allclose(
        wheels.xyz[:, :2], [sample.pose[:2] for sample in drive.odometry()], atol=1e-12
    )
    with pytest.raises(SourceError, match=r"exists already"):
        write_drive(drive, path)


def test_unknown_storage(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"sqlite3, mcap, not 'tape'"):
        write_drive(simulate_drive(), tmp_path / "bag", storage="tape")
