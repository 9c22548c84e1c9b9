"""Reports: made by one command, read in a real browser, and compared with their JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vpr_lite_ros.bags import write_drive
from vpr_lite_ros.cli import main
from vpr_lite_ros.config import Config, make_config, read_yaml
from vpr_lite_ros.database import KeyframeDatabase
from vpr_lite_ros.inference import PlaceModel, open_model
from vpr_lite_ros.matching import Status
from vpr_lite_ros.replay import replay_recording
from vpr_lite_ros.reporting.decisions import decide
from vpr_lite_ros.reporting.gallery import Pair, draw
from vpr_lite_ros.reporting.recorder import record
from vpr_lite_ros.reporting.recording import RecordingError, read_recording
from vpr_lite_ros.simulation import simulate_drive

Capture = pytest.CaptureFixture[str]
WriteImages = Callable[[Path, Sequence[NDArray[np.uint8]]], list[Path]]
MakePicture = Callable[..., NDArray[np.uint8]]
PLACES, GAP_S = 10, 5.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


# -- what is reported on -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lap(
    tmp_path_factory: pytest.TempPathFactory, make_picture: MakePicture, write_images: WriteImages
) -> Path:
    """Places 10 m apart, a frame a second, seen twice; some look like another, for errors."""
    folder = tmp_path_factory.mktemp("report") / "lap"
    rng = np.random.default_rng(1)
    pictures, rows = [], ["file,stamp_s,x,y"]
    for frame in range(2 * PLACES):
        place = frame % PLACES
        # On the second lap two places look like their neighbours of three before.
        seen = place - 3 if frame >= PLACES and place in (6, 7) else place
        noisy = make_picture(seen).astype(np.int16) + rng.integers(-5, 6, (128, 160, 3))
        pictures.append(noisy.clip(0, 255).astype(np.uint8))
        rows.append(f"{frame:03}.png,{frame},{10 * place},0")
    write_images(folder, pictures)
    (folder / "poses.csv").write_text("\n".join(rows) + "\n")
    return folder


def options(bundle: Path) -> list[str]:
    """Of a model that has learned nothing: checks that it can pass."""
    return [
        "--bundle", str(bundle), "--backend", "onnxruntime", "--threads", "1",
        "--min_time_gap_s", str(GAP_S), "--min_matches", "4", "--min_inliers", "0",
        "--keyframe.max_similarity", "1.0", "--min_agreeing_keyframes", "2",
    ]  # fmt: skip


def settings(bundle: Path, **values: object) -> Config:
    pairs = options(bundle)
    text = dict(zip(pairs[::2], pairs[1::2], strict=True))
    known = {name.removeprefix("--"): value for name, value in text.items()}
    numbers = {
        name: value if name in ("bundle", "backend") else json.loads(value)
        for name, value in known.items()
    }
    return make_config({**numbers, **values})


def report(source: Path, output: Path, *more: str) -> dict[str, Any]:
    """Make a report by the command; what is in its JSON."""
    assert main(["report", str(source), "--output", str(output), *more]) == 0
    return dict(json.loads((output / "report.json").read_text()))


# -- in a browser --------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """What a browser made of a page."""

    texts: dict[str, list[tuple[str, int]]]
    """Text and number of digits of each figure, by its path in the JSON."""
    words: str
    sizes: list[tuple[int, int]]
    """Width and height of each picture as decoded; 0 if it could not be."""
    requests: list[str]
    errors: list[str]
    too_wide: bool


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Seen]]:
    """``look(page)``: open it in headless Chromium, without network, as broad as a phone, too."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            # Root cannot have Chromium's sandbox; the pages are ours.
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts: run scripts/browser.sh ({error.message[:80]})")

        def look(path: Path) -> Seen:
            page = browser.new_page(viewport={"width": 1100, "height": 900}, offline=True)
            requests: list[str] = []
            errors: list[str] = []
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(path.resolve().as_uri())
            texts: dict[str, list[tuple[str, int]]] = {}
            for name, digits, text in page.eval_on_selector_all(
                "[data-figure]",
                "all => all.map(e => [e.dataset.figure, +e.dataset.digits, e.innerText])",
            ):
                texts.setdefault(name, []).append((text, digits))
            too_wide = []
            for width in (390, 1100):
                page.set_viewport_size({"width": width, "height": 900})
                too_wide.append(
                    page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
                )
            seen = Seen(
                texts,
                page.inner_text("body"),
                page.evaluate(
                    "Promise.all([...document.images].map(i => i.decode().catch(() => {})))"
                    ".then(() => [...document.images].map(i => [i.naturalWidth, i.naturalHeight]))"
                ),
                [url for url in requests if not url.startswith(("data:", "file:"))],
                errors,
                any(too_wide),
            )
            page.close()
            return seen

        yield look
        browser.close()


def compare(seen: Seen, figures: dict[str, Any]) -> None:
    """Every number on the page is the one in the JSON; nothing came from elsewhere."""
    assert seen.texts, "the page shows no figure"
    for name, shown in seen.texts.items():
        value: Any = figures
        for key in name.split("."):
            value = value[key]
        for text, digits in shown:
            assert text == ("–" if value is None else f"{value:.{digits}f}"), name
    assert figures["verdict"]["text"] in seen.words
    for one in figures["advice"]:
        assert " ".join(one["text"].split()) in " ".join(seen.words.split())
    assert seen.sizes and all(width > 100 and height > 30 for width, height in seen.sizes)
    assert not seen.requests and not seen.errors and not seen.too_wide


def test_a_report_with_poses(
    lap: Path, tiny_bundle: Path, tmp_path: Path, look: Callable[[Path], Seen]
) -> None:
    figures = report(lap, tmp_path, *options(tiny_bundle), "--radius", "1")
    seen = look(tmp_path / "report.html")
    compare(seen, figures)
    for name in ("evaluation.precision", "evaluation.recall", "latency_ms.match.p95",
                 "recall_at.reranked.recall_at_5", "scores.similarity.roc_auc"):  # fmt: skip
        assert name in seen.texts
    # Errors were built in, and are shown.
    assert figures["verdict"]["level"] != "good"
    assert figures["evaluation"]["findable_keyframes"] == PLACES
    assert 0 < figures["evaluation"]["recall"] < 1
    kinds = figures["gallery"]
    assert len(seen.sizes) == 5 + sum(map(len, kinds.values())) and kinds["best"]
    assert all(re.match(r"frame 1\d and frame \d, 0.0 m apart", one) for one in kinds["missed"])
    _shows_the_query_at_the_left(lap, tiny_bundle, tmp_path)
    assert figures["recommended"]["yaml"].strip() in seen.words
    yaml = tmp_path / "copied.yaml"
    yaml.write_text(figures["recommended"]["yaml"])
    assert make_config(read_yaml(yaml)).min_time_gap_s == GAP_S


def _shows_the_query_at_the_left(lap: Path, bundle: Path, tmp_path: Path) -> None:
    config = settings(bundle)
    model = _open(config)
    recording = record(lap, tmp_path / "shown", config, model)
    decisions = decide(recording, config, model)
    pair = Pair(len(recording) - 1, 0)
    ((picture,),) = draw(recording, {"one": [pair]}, decisions, None, config, model).values()
    shown = cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR)
    half = shown.shape[1] // 2
    for frame, drawn in ((-1, shown[:, :half]), (0, shown[:, half:])):
        right, wrong = (
            cv2.resize(cv2.imread(str(sorted(lap.glob("*.png"))[one])), drawn.shape[1::-1])
            for one in (frame, -1 - frame)
        )
        apart = [float(np.abs(drawn - one.astype(float)).mean()) for one in (right, wrong)]
        assert apart[0] < apart[1] / 2


def test_without_ground_truth_it_says_what_cannot_be_said(
    lap: Path, tiny_bundle: Path, tmp_path: Path, look: Callable[[Path], Seen]
) -> None:
    # The name would be markup, if anything were not escaped.
    folder = tmp_path / "<img src=x onerror=alert(1)> & <b>co"
    shutil.copytree(lap, folder)
    (folder / "poses.csv").unlink()
    figures = report(folder, tmp_path / "out", *options(tiny_bundle))
    assert figures["evaluation"] is None and figures["recommended"] is None
    seen = look(tmp_path / "out" / "report.html")
    compare(seen, figures)
    assert folder.name in seen.words
    assert "Precision, recall, curves" in seen.words and "--poses FILE" in seen.words
    assert "which frame is where which one was" in seen.words
    assert figures["closures"] > 0 and "surest" in figures["gallery"]
    assert "evaluation.precision" not in seen.texts


def test_kitti_with_its_poses_and_camera(
    data_dir: Path, tiny_bundle: Path, tmp_path: Path, look: Callable[[Path], Seen]
) -> None:
    """The whole sequence by one command, with a model that is quick: figures, not quality."""
    folder = data_dir / "eval" / "kitti00"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    chosen = [*options(tiny_bundle), "--keyframe.min_interval_s", "1.0", "--min_time_gap_s", "30"]
    figures = report(folder, tmp_path, *chosen)
    compare(look(tmp_path / "report.html"), figures)
    assert figures["frames"] == 850 and figures["epipolar_check"]
    assert figures["truth"]["source"] == "poses.csv"
    assert figures["evaluation"]["true_if"] == "taken within 5 m"
    assert figures["evaluation"]["findable_keyframes"] > 5
    apart = figures["evaluation"]["false_apart_m"]
    assert len(apart) == figures["evaluation"]["false_closures"] > 1 and apart == sorted(apart)
    assert apart[0] > 5
    told = f"({apart[0]:.1f} to {apart[-1]:.1f} m apart)"
    assert any(told in one["text"] for one in figures["advice"])


def test_the_corridor_with_its_pairs_and_the_real_model(
    corridor: tuple[Path, Path], look: Callable[[Path], Seen]
) -> None:
    folder, work = corridor
    figures = report(folder, work)
    compare(look(work / "report.html"), figures)
    assert figures["frames"] == figures["keyframes"] == 84
    assert figures["evaluation"]["findable_keyframes"] == 44
    assert figures["evaluation"]["precision"] > 0.95 and figures["evaluation"]["recall"] > 0.5
    assert figures["evaluation"]["false_apart_m"] is None
    page = (work / "report.html").read_text(encoding="utf-8")
    assert 'id="matches"' in page and 'id="trajectory"' not in page
    assert any("list of pairs" in one for one in figures["cannot"])
    assert any("no epipolar check" in one["text"] for one in figures["advice"])


def test_the_demo_drive_from_its_bag(
    tiny_bundle: Path, tmp_path: Path, look: Callable[[Path], Seen]
) -> None:
    drive = simulate_drive(image_size=(160, 120))
    # A stretch of the first lap, and what comes near it on the second.
    early, late = np.arange(40, 80, 4), np.flatnonzero(drive.laps == 2)
    away = drive.poses[late, None, :2] - drive.poses[None, early, :2]
    kept = np.r_[early, late[np.linalg.norm(away, axis=2).min(axis=1) < 8][::3]]
    drive = dataclasses.replace(
        drive, stamps_ns=drive.stamps_ns[kept], poses=drive.poses[kept], laps=drive.laps[kept]
    )
    bag = write_drive(drive, tmp_path / "drive", storage="mcap")
    figures = report(bag, tmp_path / "out", *options(tiny_bundle), "--radius", "10")
    compare(look(tmp_path / "out" / "report.html"), figures)
    assert figures["truth"]["source"] == "/ground_truth (nav_msgs/msg/Odometry)"
    assert figures["truth"]["known_keyframes"] == figures["keyframes"] > 10
    assert figures["odometry"] == "/odom" and figures["epipolar_check"]
    assert figures["evaluation"]["findable_keyframes"] > 0


# -- what the figures rest on --------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"min_agreeing_keyframes": 1, "match_threshold": 0.2},
        {"similarity_threshold": 0.3, "min_agreeing_keyframes": 3, "min_matches": 8},
    ],
)
def test_recorded_scores_decide_as_the_detector_does(
    lap: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    values: dict[str, object],
) -> None:
    # Reports count every keyframe that is recognised.
    config = settings(tiny_bundle, min_closure_interval_s=0.0, **values)
    replay_recording(lap, tmp_path / "replay", config)
    model = _open(config)
    recording = record(lap, tmp_path, config, model)
    decisions = decide(recording, config, model)
    lines = [
        json.loads(line) for line in (tmp_path / "replay/decisions.jsonl").read_text().splitlines()
    ]
    replayed = [
        (line["query_frame"], line["match_frame"], line["status"])
        for line in lines
        if line["match_frame"] is not None
    ]
    queries = np.repeat(recording.frame, np.diff(recording.first))
    names = [Status(end).name for end in decisions.status.tolist()]
    decided = zip(queries.tolist(), recording.frame[recording.match].tolist(), names, strict=True)
    assert list(decided) == replayed
    compared = [line for line in lines if line["match_score"] is not None]
    assert any(line["num_correlated"] for line in compared)
    assert [line["num_correlated"] for line in lines if line["match_frame"] is not None] == [
        count if name != "LOW_SIMILARITY" else 0
        for count, name in zip(recording.num_correlated.tolist(), names, strict=True)
    ]
    assert sum(decisions.match >= 0) == sum(line["status"] == "ACCEPTED" for line in lines) > 0


def _open(config: Config) -> PlaceModel:
    return open_model(Path(config.bundle), config.backend, config.threads)


def scores_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of scores without the times."""
    (file,) = folder.glob("recording-*/scores.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "ms"} for line in lines]


class Stop:
    """Ends a recording after some keyframes, in one of the ways in which it may end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        self.added, self.after, self.error = 0, after, error
        self._add = KeyframeDatabase.add
        monkeypatch.setattr(KeyframeDatabase, "add", lambda *a, **k: self(*a, **k))

    def __call__(self, *args: Any, **named: Any) -> int:
        keyframe_id = self._add(*args, **named)
        self.added += 1
        if self.added == self.after:
            # The keyframe is stored, its line is not yet written.
            raise self.error
        return keyframe_id


def test_an_interrupted_report_shows_its_part_and_goes_on(
    lap: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    chosen = [*options(tiny_bundle), "--radius", "1"]
    report(lap, tmp_path / "whole", *chosen)
    command = ["report", str(lap), "--output", str(tmp_path / "part"), *chosen]
    with monkeypatch.context() as patch:
        Stop(patch, 13, KeyboardInterrupt())
        assert main(command) == 130
    part = json.loads((tmp_path / "part" / "report.json").read_text())
    assert part["stopped"] == "interrupted" and part["keyframes"] == 12
    assert "goes on from there" in part["advice"][0]["text"]
    capsys.readouterr()

    described = []
    describe = PlaceModel.describe

    def counted(*args: Any) -> Any:
        described.append(1)
        return describe(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PlaceModel, "describe", counted)
        whole = report(lap, tmp_path / "part", *chosen)
        # What was finished is not worked out again.
        assert len(described) == 2 * PLACES - 12
        report(lap, tmp_path / "part", *chosen)
        assert len(described) == 2 * PLACES - 12
    assert whole["stopped"] is None and whole["keyframes"] == 2 * PLACES
    assert scores_of(tmp_path / "part") == scores_of(tmp_path / "whole")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vpr_lite_ros.reporting.report.tune", interrupted)
    capsys.readouterr()
    assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def bag_with_a_jump(lap: Path, path: Path) -> Path:
    """The same laps with odometry; the clock is set back within the second one, and again."""
    bags = importlib.import_module("test_bags")
    items = []
    for number, file in enumerate(sorted(lap.glob("*.png"))):
        picture = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        stamp = (100 + number - 6 * (number >= 12) - 7 * (number >= 17)) * bags.SECOND
        now = (100 + number) * bags.SECOND
        items.append(("/camera/image", now, bags.raw(picture, "rgb8", stamp)))
        items.append(("/odom", now, bags.odometry(10.0 * (number % PLACES), stamp)))
    return bags.write_bag(path, items)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_wherever_a_recording_was_interrupted_it_ends_the_same(
    lap: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:  # fmt: skip
    """Asked to stop or killed; also just before and just after the clock jumps."""
    bag = bag_with_a_jump(lap, tmp_path / "bag")
    config = settings(tiny_bundle)
    model = _open(config)
    whole = record(bag, tmp_path / "whole", config, model)
    assert sorted(set(whole.session)) == ["recording", "recording-2", "recording-3"]
    assert whole.odometry and np.isfinite(whole.travelled_m).any()
    work = tmp_path / "part"
    for keyframes in range(1, 2 * PLACES, 2):  # so many more each time
        with monkeypatch.context() as patch:
            Stop(patch, 3, error)
            try:
                record(bag, work, config, model)
            except MemoryError:
                (folder,) = work.iterdir()
                with (folder / "scores.jsonl").open("a") as file:
                    file.write('{"frame": 8, "stamp_ns"')
        assert len(read_recording(next(work.iterdir()))) == min(keyframes + 1, 2 * PLACES)
    part = record(bag, work, config, model)
    assert not part.stopped and part.frames == 2 * PLACES
    assert scores_of(work) == scores_of(tmp_path / "whole")


def test_scores_that_were_damaged_are_named(lap: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    config = settings(tiny_bundle)
    folder = record(lap, tmp_path, config, _open(config)).folder
    text = (folder / "scores.jsonl").read_text().splitlines()
    text[3] = text[3].replace('"candidates"', '"kandidates"')
    (folder / "scores.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(RecordingError, match=r"scores.jsonl, line 4.*to record anew"):
        read_recording(folder)


def test_other_settings_or_images_are_another_recording(
    lap: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    config, other = settings(tiny_bundle), settings(tiny_bundle, top_k=3)
    stricter = settings(tiny_bundle, match_threshold=0.5, min_agreeing_keyframes=1)
    model = _open(config)
    source = tmp_path / "images"
    shutil.copytree(lap, source)
    folders = [record(source, tmp_path / "work", one, model).folder for one in
               (config, stricter, other)]  # fmt: skip
    assert folders[0] == folders[1] != folders[2]
    told = {**model.bundle.card, "calibration": {"created": "today"}}
    again = PlaceModel(dataclasses.replace(model.bundle, card=told), model._place, model._match)
    assert record(source, tmp_path / "work", config, again).folder not in folders
    last = sorted(source.glob("*.png"))[-1]
    cv2.imwrite(str(last), np.zeros((128, 160, 3), np.uint8))
    assert record(source, tmp_path / "work", config, model).folder not in folders


# -- what cannot be used -------------------------------------------------------------------------


def test_what_cannot_be_reported_on_says_what_to_pass(
    lap: Path, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    bags = importlib.import_module("test_bags")
    images = bags.three_images()
    poses = [("/odom", 1, bags.odometry(1.0, bags.SECOND))]
    without = bags.write_bag(tmp_path / "without", poses)
    two = bags.write_bag(tmp_path / "two", images + bags.three_images("/rear/image"))
    empty = bags.write_bag(tmp_path / "empty", [])
    cut_short = bags.write_bag(tmp_path / "cut", images, "mcap")
    file = next(cut_short.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])

    cases = {
        without: r"has no image topic.*it holds: /odom",
        two: r"several image topics: /cam/image.*Choose one with --image-topic",
        empty: r"has no image topic.*it holds: nothing",
        cut_short: r"cannot be read as a bag.*ros2 bag reindex",
        tmp_path / "nothing": r"does not exist. Pass a bag, a folder of images or a video",
    }
    for command in (["report"], ["tune", "-o", str(tmp_path / "my.yaml")]):
        for source, message in cases.items():
            work = ["--work" if command[0] == "tune" else "--output", str(tmp_path / "out")]
            assert main([*command, str(source), *work, *options(tiny_bundle)]) == 1
            said = capsys.readouterr().err
            assert re.search(message, said), said
            assert len(said.splitlines()) == 1

    work = ["--work", str(tmp_path / "out")]
    bare = tmp_path / "bare"
    shutil.copytree(lap, bare)
    (bare / "poses.csv").unlink()
    tune = ["tune", str(bare), "-o", str(tmp_path / "my.yaml"), *work, *options(tiny_bundle)]
    assert main(tune) == 1
    assert re.search(r"without ground truth. Pass --poses FILE", capsys.readouterr().err)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("query,match\n900,1\n")
    assert main([*tune, "--pairs", str(wrong)]) == 1
    assert re.search(r"lists frame 900, but the recording has 20", capsys.readouterr().err)
    assert not (tmp_path / "my.yaml").exists()
