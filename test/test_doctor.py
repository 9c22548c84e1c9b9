"""What doctor says of machines and recordings: each finding where its cause is, only there."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from test_bags import (
    SECOND,
    Item,
    camera_info,
    encoded,
    header,
    jpeg,
    odometry,
    raw,
    write_bag,
    write_bag1,
)

from vpr_lite_ros import doctor, inspection, installation
from vpr_lite_ros.cli import main
from vpr_lite_ros.config import Config, make_config
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.health import Finding, Severity
from vpr_lite_ros.inference import DEFAULT_BUNDLE, Bundle, load_bundle

Image = NDArray[np.uint8]
MakePicture = Callable[..., Image]
SIZE = (320, 240)


def bad(findings: Iterable[Finding]) -> dict[str, Finding]:
    """By name, what is not well; each finding of that kind has a way out, the others none."""
    found = list(findings)
    assert all(bool(finding.remedy) is (finding.severity > Severity.OK) for finding in found)
    return {finding.name: finding for finding in found if finding.severity > Severity.OK}


def recording(path: Path, image_topic: str | None = None) -> dict[str, Finding]:
    return bad(inspection.recording(path, image_topic=image_topic, odom_topic=None, rate_hz=1.0))


def darken(image: Image) -> Image:
    return (image // 40).astype(np.uint8)


# --- recordings


@pytest.fixture
def good(make_picture: MakePicture) -> list[Item]:
    """Two seconds of a well recorded camera, calibrated, with odometry."""
    items: list[Item] = []
    info = camera_info(SIZE[0] * 0.8)
    info.width, info.height = SIZE
    info.k[2], info.k[5] = SIZE[0] / 2, SIZE[1] / 2
    for number in range(20):
        now = 100 * SECOND + number * SECOND // 10
        items.append(("/cam/camera_info", now, info))
        items.append(("/cam/image_raw", now, raw(make_picture(number, SIZE), "rgb8", now)))
        items.append(("/odom", now, odometry(number, now)))
    return items


def changed(items: list[Item], topic: str, change: Callable[[int, object], object]) -> list[Item]:
    """``items`` with the messages of one topic replaced; None leaves one out."""
    out: list[Item] = []
    number = 0
    for name, now, message in items:
        if name == topic:
            message = change(number, message)
            number += 1
        if message is not None:
            out.append((name, now, message))
    return out


def test_nothing_is_wrong_with_a_good_bag(tmp_path: Path, good: list[Item]) -> None:
    findings = list(
        inspection.recording(
            write_bag(tmp_path / "bag", good), image_topic=None, odom_topic=None, rate_hz=1
        )
    )
    assert bad(findings) == {}
    text = "\n".join(f"{finding.name}: {finding.seen}" for finding in findings)
    assert "/cam/image_raw: 20 images rgb8 320x240, 10 a second; 20 looked at" in text
    assert "camera_info: /cam/camera_info: 320x240, fx 256" in text
    assert "odometry: /odom: a pose for 20 of 20 images" in text


def pictures_become(change: Callable[[Image], Image]) -> Callable[[list[Item]], list[Item]]:
    def alter(number: int, message: object) -> object:
        pixels = message.data.reshape(SIZE[1], SIZE[0], 3)  # type: ignore[attr-defined]
        stamp = 100 * SECOND + number * SECOND // 10
        return raw(change(pixels), "rgb8", stamp)

    return lambda items: changed(items, "/cam/image_raw", alter)


def stamps_become(change: Callable[[int], int]) -> Callable[[list[Item]], list[Item]]:
    def alter(number: int, message: object) -> object:
        message.header = header(change(number))  # type: ignore[attr-defined]
        return message

    return lambda items: changed(items, "/cam/image_raw", alter)


def info_becomes(**fields: object) -> Callable[[list[Item]], list[Item]]:
    def alter(_: int, message: object) -> object:
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return lambda items: changed(items, "/cam/camera_info", alter)


@pytest.mark.parametrize(
    ("name", "words", "spoil"),
    [
        ("dark", "20 of 20", pictures_become(darken)),
        ("overexposed", "20 of 20", pictures_become(lambda image: cv2.add(image, 235))),
        ("blurred", "20 of 20", pictures_become(lambda i: cv2.GaussianBlur(i, (0, 0), 5))),
        ("zero stamps", "20 of 20", stamps_become(lambda number: 0)),
        (
            "stamps go back",
            "1 of 19",
            stamps_become(lambda number: 100 * SECOND + number % 10 * SECOND // 10),
        ),
        (
            "stamps jump",
            "3e+03 s",
            stamps_become(lambda n: 100 * SECOND + (n + 30000 * (n > 9)) * SECOND // 10),
        ),
        ("camera_info", "the bag has none", lambda items: changed(
            items, "/cam/camera_info", lambda *_: None)),
        ("camera_info", "not calibrated", info_becomes(k=np.zeros(9))),
        ("camera_info", "320x320", info_becomes(height=320)),
        ("camera_info", "degrees wide", info_becomes(
            k=np.array([9.0, 0, 160, 0, 9, 120, 0, 0, 1]))),
        ("camera_info", "far from the image's", info_becomes(
            k=np.array([256.0, 0, 10, 0, 256, 120, 0, 0, 1]))),
        ("camera_info", "'mirror_ball' is unknown", info_becomes(distortion_model="mirror_ball")),
        ("odometry", "0 of 20", stamps_become(lambda n: 900 * SECOND + n * SECOND // 10)),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_bag_is_found_and_nothing_else(
    tmp_path: Path,
    good: list[Item],
    name: str,
    words: str,
    spoil: Callable[[list[Item]], list[Item]],
) -> None:
    found = recording(write_bag(tmp_path / "bag", spoil(good)))
    # Without stamps, images cannot be told to belong to poses.
    expected = {name, "odometry"} if name == "zero stamps" else {name}
    assert set(found) == expected
    assert words in found[name].seen


def test_a_bag_without_images_says_what_it_holds(tmp_path: Path, good: list[Item]) -> None:
    bag = write_bag(tmp_path / "bag", [item for item in good if item[0] == "/odom"])
    found = recording(bag)
    assert set(found) == {"recording"} and found["recording"].severity is Severity.ERROR
    assert "/odom (nav_msgs/msg/Odometry)" in found["recording"].seen


def test_a_bag_with_two_cameras_is_looked_at_twice(tmp_path: Path, good: list[Item]) -> None:
    dark = pictures_become(darken)(good)
    more = [("/rear/image_raw", now, one) for topic, now, one in dark if topic == "/cam/image_raw"]
    bag = write_bag(tmp_path / "bag", [*good, *more])
    found = recording(bag)
    assert "/cam/image_raw, /rear/image_raw" in found["image topics"].seen
    assert "dark" in found
    assert recording(bag, image_topic="/cam/image_raw") == {}
    assert "has no image topic '/front'" in recording(bag, image_topic="/front")["recording"].seen


def test_images_that_cannot_be_decoded_are_counted(
    tmp_path: Path, good: list[Item], make_picture: MakePicture
) -> None:
    whole = encoded(make_picture(1, SIZE))
    items: list[Item] = [
        ("/cam/image_raw/compressed", now, jpeg(whole[: len(whole) // 2] if n % 4 else whole, now))
        for n, (topic, now, _) in enumerate(good)
        if topic == "/cam/image_raw"
    ]
    found = recording(write_bag(tmp_path / "bag", items))
    assert found["unusable images"].severity is Severity.ERROR
    assert "truncated JPEG" in found["unusable images"].seen


def test_a_ros1_bag_is_looked_at_too(tmp_path: Path, make_picture: MakePicture) -> None:
    from test_bags import ROS1, camera_info1

    items: list[Item] = [
        ("/cam/image_raw/compressed", n * SECOND,
         jpeg(encoded(make_picture(n, SIZE)), n * SECOND, ROS1)) for n in range(1, 9)
    ]  # fmt: skip
    items.append(("/cam/camera_info", 9 * SECOND, camera_info1(50.0)))
    found = recording(write_bag1(tmp_path / "old.bag", items))
    assert found == {}


def write_video(path: Path, images: Iterable[Image]) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, SIZE)
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def test_a_dark_and_a_blurred_video(tmp_path: Path, make_picture: MakePicture) -> None:
    images = [make_picture(number, SIZE) for number in range(10)]
    assert recording(write_video(tmp_path / "good.avi", images)) == {}
    dark = recording(write_video(tmp_path / "dark.avi", [darken(image) for image in images]))
    assert set(dark) == {"dark"}
    soft = [np.asarray(cv2.GaussianBlur(image, (0, 0), 5), np.uint8) for image in images]
    assert set(recording(write_video(tmp_path / "soft.avi", soft))) == {"blurred"}


def test_a_long_recording_is_sampled_throughout() -> None:
    chosen = [index for index in range(100_000) if inspection._is_sample(index, 100_000)]
    assert len(chosen) <= inspection.LOOKED_AT
    assert chosen[1] - chosen[0] == 1 and chosen[-1] > 99_000
    assert all(inspection._is_sample(index, 400) for index in range(400))


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_of_a_long_bag_stretches_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, make_picture: MakePicture
) -> None:
    monkeypatch.setattr(inspection, "READ", 200)
    monkeypatch.setattr(inspection, "LOOKED_AT", 40)
    data = [encoded(make_picture(number, SIZE)) for number in range(20)]
    items: list[Item] = []
    for number in range(3000):
        now = 100 * SECOND + number * SECOND // 10
        # A clock that was set back by ten seconds, between two stretches.
        stamp = now - (10 * SECOND if number >= 1516 else 0)
        items.append(("/cam/image/compressed", now, jpeg(data[number % 20], stamp)))
        items.append(("/odom", now, odometry(0.1 * number, stamp)))
    bag = write_bag(tmp_path / "bag", items, storage)
    looked_at: list[object] = []
    decode = inspection.decode_message

    def counted(message: object) -> Image:
        looked_at.append(message)
        return decode(message)

    monkeypatch.setattr(inspection, "decode_message", counted)
    found = {
        finding.name: finding
        for finding in inspection.recording(bag, image_topic=None, odom_topic=None, rate_hz=1)
    }
    assert found["/cam/image/compressed"].seen == (
        "3000 images jpeg 320x240, 10 a second; 40 looked at, stamps of 200 read, evenly spread"
    )
    assert len(looked_at) == 40
    assert set(bad(found.values())) == {"stamps go back", "camera_info"}
    assert "by up to" in found["stamps go back"].seen
    assert found["odometry"].seen == "/odom: a pose for 200 of 200 images"


def test_of_a_long_folder_only_some_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_picture: MakePicture
) -> None:
    monkeypatch.setattr(inspection, "LOOKED_AT", 40)
    data = [encoded(make_picture(number, SIZE)).tobytes() for number in range(2)]
    folder = tmp_path / "drive"
    folder.mkdir()
    for number in range(1000):  # those that are not looked at could not be decoded
        looked_at = inspection._is_sample(number, 1000)
        (folder / f"{number}.jpg").write_bytes(data[number % 2] if looked_at else b"")
    (folder / "poses.csv").write_text(
        "file,stamp_s,x,y\n" + "".join(f"{n}.jpg,{n - 9 * (n == 501)},0,0\n" for n in range(1000))
    )
    findings = list(inspection.recording(folder, image_topic=None, odom_topic=None, rate_hz=1))
    assert findings[0].seen == "1000 images 320x240, 1 a second; 40 looked at"
    assert set(bad(findings)) == {"stamps go back"}, "stamps are all read"
    calibration = {"fx": 256, "fy": 256, "cx": 160, "cy": 120, "width": 320, "height": 240}
    (folder / "calib.json").write_text(json.dumps(calibration))
    assert set(recording(folder)) == {"stamps go back"}
    (folder / "calib.json").write_text(json.dumps({**calibration, "width": 640}))
    assert "of another format" in recording(folder)["camera_info"].remedy


# --- what is installed


OLD_BINARY = """
import os, sys
class CvBridge:
    def cv2_to_imgmsg(self, image, encoding):
        return image
    def imgmsg_to_cv2(self, message, encoding):
        {fate}
"""
REFUSED = """sys.stderr.write(
            "A module that was compiled using NumPy 1.x cannot be run in\\n"
            "NumPy 2.2.6 as it may crash. To support both 1.x and 2.x\\n")
        raise SystemError("initialization of cv_bridge_boost raised unreported exception")"""
CRASH = "os.kill(os.getpid(), 11)"


@pytest.mark.parametrize(
    ("fate", "words"), [(REFUSED, "compiled using NumPy 1.x"), (CRASH, "crashes (SIGSEGV)")]
)
def test_a_cv_bridge_of_numpy_1_under_numpy_2_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str, words: str
) -> None:
    """What a binary built for NumPy 1 was seen to print under NumPy 2.2.6, and its other end."""
    (tmp_path / "cv_bridge.py").write_text(OLD_BINARY.format(fate=fate))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "_version", lambda package: "2.2.6")
    finding = installation._cv_bridge()
    assert finding.severity is Severity.ERROR
    assert "NumPy 2.2.6" in finding.seen and words in finding.seen
    assert "pip install 'numpy<2'" in finding.remedy


def test_a_cv_bridge_that_fits_is_fine() -> None:
    pytest.importorskip("cv_bridge")
    finding = installation._cv_bridge()
    assert finding.severity is Severity.OK and "NumPy" in finding.seen


def test_a_middleware_that_is_not_installed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy")
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_pigeon_cpp")
    found = bad(installation._ros())
    assert "rmw_pigeon_cpp" in found["ROS"].remedy


def test_a_probe_says_how_it_ended() -> None:
    assert installation.probe("raise SystemExit('no such GPU')") == {"error": "no such GPU"}
    assert installation.probe("import os; os.abort()") == {"error": "it crashes (SIGABRT)"}
    assert installation.probe("import time; time.sleep(60)", timeout_s=0.5) == {
        "error": "no answer within 0.5 s"
    }


def test_a_cpu_without_avx2_is_found() -> None:
    text = "processor : 0\nflags\t\t: fpu sse sse2 avx f16c\n"
    finding = installation.judge_cpu("x86_64", text, 4)
    assert finding.severity is Severity.WARNING and "lacks avx2, fma" in finding.seen
    assert installation.judge_cpu("aarch64", "Features : fp asimd\n", 4).severity is Severity.OK
    assert installation.judge_cpu("x86_64", "", 4).severity is Severity.OK, "unknown is not bad"


def test_opencv_installed_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_version", lambda package: "4.11.0.86")
    finding = installation._package("opencv", installation.PACKAGES["opencv"][:2])
    assert finding.severity is Severity.WARNING and "pip uninstall" in finding.remedy


# --- model and database


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(DEFAULT_BUNDLE)


def test_each_backend_that_is_here_runs_the_model() -> None:
    findings = {finding.name: finding for finding in installation.model(DEFAULT_BUNDLE, "auto", 2)}
    assert bad(findings.values()) == {}
    assert "describes an image in" in findings["onnxruntime"].seen
    assert DEFAULT_BUNDLE.name in findings["bundle"].seen


def test_a_backend_that_is_asked_for_and_not_here_is_a_problem() -> None:
    answers = {"onnxruntime": {"ms": 1.0}}
    refused = {"error": "tensorrt is not installed", "refused": True}
    wanted = installation._judge_backend("tensorrt", refused, answers, needed=True)
    assert wanted.severity is Severity.ERROR
    assert (
        installation._judge_backend("tensorrt", refused, answers, needed=False).severity
        is Severity.OK
    )
    crashed = installation._judge_backend(
        "openvino", {"error": "it crashes"}, answers, needed=False
    )
    assert crashed.severity is Severity.WARNING


def test_an_answer_that_is_not_finite_or_another_is_a_problem() -> None:
    fine = {"version": "1", "ms": 1.0, "open_s": 1.0, "finite": True, "descriptor": [1.0, 0.0]}
    works = {"onnxruntime": fine}
    judge = installation._judge_backend
    assert judge("openvino", fine, works, needed=False).severity is Severity.OK
    broken = judge("openvino", {**fine, "finite": False}, works, needed=False)
    assert broken.severity is Severity.ERROR and "not finite" in broken.seen
    other = judge("openvino", {**fine, "descriptor": [0.6, 0.8]}, works, needed=False)
    assert other.severity is Severity.ERROR and "cosine 0.6000" in other.seen


def test_a_missing_bundle_is_a_problem(tmp_path: Path) -> None:
    found = bad(installation.model(tmp_path, "auto", 1))
    assert set(found) == {"bundle"} and str(tmp_path) in found["bundle"].seen


def as_of_schema_1(path: Path) -> Path:
    sql = sqlite3.connect(path)
    sql.executescript("DROP INDEX heads; DROP TABLE checksums; PRAGMA user_version = 1;")
    sql.close()
    return path


def stored_in(path: Path | str, **values: object) -> Config:
    return make_config({"database_path": str(path), **values})


def test_databases(tmp_path: Path, bundle: Bundle) -> None:
    def look(path: Path | str) -> dict[str, Finding]:
        return bad(doctor.database(stored_in(path), bundle))

    assert look("") == {} and look(tmp_path / "new.db") == {}
    assert not (tmp_path / "new.db").exists(), "nothing is made"
    assert "does not exist" in look("/nowhere/map.db")["database"].seen
    assert "is a folder" in look(tmp_path)["database"].seen
    home = [finding.seen for finding in doctor.database(stored_in("~/surely/not/here.db"), bundle)]
    assert "only a shell replaces" in home[0] and "does not exist" in home[1]

    def store(name: str, model_id: str) -> Path:
        path = tmp_path / name
        KeyframeDatabase(
            path, model_id=model_id, dimension=bundle.dimension,
            max_patches=bundle.max_patches, session="test",
        ).close()  # fmt: skip
        return path

    ours = store("ours.db", bundle.model_id)
    before = ours.read_bytes()
    assert look(ours) == {}
    assert ours.read_bytes() == before, "nothing is written"
    assert "made with model other" in look(store("other.db", "other"))["database"].seen
    assert look(ours) == {}
    for mode, severity in (("mapping", Severity.WARNING), ("localization", Severity.ERROR)):
        old = as_of_schema_1(store(f"{mode}.db", bundle.model_id))
        finding = bad(doctor.database(stored_in(old, mode=mode), bundle))["database"]
        assert "has schema 1" in finding.seen and finding.severity is severity
    missing = stored_in(tmp_path / "none.db", mode="localization")
    assert "does not exist" in bad(doctor.database(missing, bundle))["database"].seen
    newer = store("newer.db", bundle.model_id)
    sql = sqlite3.connect(newer)
    sql.execute("PRAGMA user_version = 99")
    sql.close()
    assert "schema 99" in look(newer)["database"].seen
    foreign = tmp_path / "foreign.db"
    sql = sqlite3.connect(foreign)
    sql.execute("CREATE TABLE notes (text)")
    sql.close()
    assert "not made by vpr_lite_ros" in look(foreign)["database"].seen
    foreign.write_bytes(b"no database, but long enough to look like one with a header" * 20)
    assert "no database of vpr_lite_ros" in look(foreign)["database"].seen


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; another user may not."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_database_that_this_user_may_not_write_is_a_problem(
    tmp_path: Path, bundle: Bundle
) -> None:
    folder = tmp_path / "inner"
    folder.mkdir(mode=0o555)
    above = [tmp_path, *tmp_path.parents[:2]]
    modes = [one.stat().st_mode for one in above]
    try:
        with as_nobody():  # who may not even enter the folders above
            assert "database" in bad(doctor.database(stored_in(folder / "map.db"), bundle))
        for one in above:
            one.chmod(0o755)
        with as_nobody():
            found = bad(doctor.database(stored_in(folder / "map.db"), bundle))
    finally:
        for one, mode in zip(above, modes, strict=True):
            one.chmod(mode)
    assert "cannot be written by user" in found["database"].seen
    assert "chown" in found["database"].remedy


def test_a_full_disk_is_found(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = type(shutil.disk_usage(tmp_path))
    for free, severity in ((10**7, Severity.ERROR), (10**9, Severity.WARNING)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**12, 0, free))
        found = bad(doctor.database(stored_in(tmp_path / "map.db"), bundle))
        assert found["disk space"].severity is severity


# --- the command


def test_exit_codes_tell_problems_from_warnings(
    tmp_path: Path, good: list[Item], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(installation, "installation", lambda: iter([doctor.ok("Python", "3.11")]))
    monkeypatch.setattr(installation, "model", lambda *_: iter([doctor.ok("bundle", "there")]))
    assert main(["doctor", str(write_bag(tmp_path / "good", good))]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "no problems, no warnings"
    assert "  ok      /cam/image_raw: 20 images" in out
    plain = changed(good, "/cam/camera_info", lambda *_: None)
    assert main(["doctor", str(write_bag(tmp_path / "plain", plain))]) == 3
    out = capsys.readouterr().out
    assert "  warning camera_info: the bag has none" in out
    assert "          Without it there is no epipolar check" in out
    assert out.splitlines()[-1] == "no problems, 1 warning"
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "  PROBLEM recording:" in capsys.readouterr().out
    assert main(["doctor", "bag", "--topic", "/image"]) == 2


def test_doctor_runs_from_any_folder_without_ros(tmp_path: Path) -> None:
    """As after `pip install .`: no rclpy, and a folder that hides a module must do no harm."""
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    program = textwrap.dedent("""
        import sys, importlib.util
        real = importlib.util.find_spec
        hidden = ("rclpy", "cv_bridge")
        importlib.util.find_spec = lambda name, *more: None if name in hidden else real(name, *more)
        from vpr_lite_ros.cli import main
        code = main(["doctor", "--database_path", "/nowhere/map.db"])
        assert "rclpy" not in sys.modules
        sys.exit(code)
    """)
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", program],
        cwd=tmp_path, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "ROS_DISTRO"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rclpy is not there: the node does not run here" in done.stdout
    assert "PROBLEM database: the folder /nowhere does not exist" in done.stdout
    assert "1 problem, no warnings" in done.stdout
