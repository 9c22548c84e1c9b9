"""Walks that run alongside each other are found, and chance is not taken for one."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="torch is not installed: pip install torch")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from vpr_lite_ros.datasets import load_posed_images
from vpr_lite_ros.training import align


def noise(rows: int, columns: int, seed: int = 0, alike: float = 0.02) -> NDArray[np.int64]:
    """Inliers that frames of different places have; now and then a door looks like another."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(24, (rows, columns))
    counts[rng.random(counts.shape) < alike] += 20
    counts[rng.permuted(np.tile(np.arange(columns) >= 6, (rows, 1)), axis=1)] = 0
    return counts.astype(np.int64)


def test_the_best_chain_goes_forward_in_both() -> None:
    inliers = np.zeros((4, 5), np.int64)
    inliers[0, 1], inliers[1, 0], inliers[2, 2], inliers[3, 4] = 60, 90, 40, 34
    chain, weight = align.best_chain(inliers)
    # (1, 0) alone outweighs (0, 1), with which it cannot go; 34 inliers are too few.
    assert chain == [(1, 0), (2, 2)] and weight == 65 + 15


def test_frames_between_those_of_a_chain_get_positions() -> None:
    inliers = noise(30, 40, seed=3)
    inliers[(inliers > 34) & (inliers < 60)] = 0
    for i in range(4, 24):
        if i not in (9, 10, 15, 16, 17, 18, 19):
            inliers[i, i + 6] = 80
    found = align.positions(inliers)
    assert found is not None
    assert np.isnan(found[:4]).all() and np.isnan(found[24:]).all()
    assert found[4:15] == pytest.approx(np.arange(10, 21))
    assert np.isnan(found[15:20]).all(), "a wide gap"
    assert found[20:24] == pytest.approx(np.arange(26, 30))


def test_clips_of_different_places_are_left_alone() -> None:
    assert all(align.positions(noise(40, 40, seed)) is None for seed in range(20))
    doors = [noise(40, 40, seed, alike=0.5) for seed in range(20)]
    assert all(align.positions(inliers) is None for inliers in doors), "chance goes both ways"
    few = np.zeros((40, 40), np.int64)
    few[range(5), range(5)] = 300
    assert align.positions(few) is None, "five frames are no walk"


def test_a_missing_column_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "frames.csv"
    table.write_text("file,clip\na.jpg,1\n")
    monkeypatch.setattr(sys, "argv", ["align", str(table), "x.onnx", "out", "--same", "floor"])
    with pytest.raises(SystemExit) as caught:
        align.main()
    assert caught.value.code == 2
    assert f"{table} has no column floor, only file, clip" in capsys.readouterr().err


def test_two_sides_of_a_corridor(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of two walks along one corridor, and of one along another floor's."""
    tower = data_dir / "train" / "ie_tower"
    with (tower / "frames.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {"f17_hallway_alt": range(16, 29), "f17_hallway_main": range(16, 33)}
    wanted["f21_hallway_main"] = range(16, 22)
    table = tmp_path / "frames.csv"
    lines = [
        f"{tower / row['file']},{row['clip']}"
        for row in rows
        if int(row["order_in_clip"]) in wanted.get(row["clip"], ())
    ]
    table.write_text("\n".join(["file,clip", *lines]))
    xfeat, output = data_dir / "teachers" / "xfeat.onnx", tmp_path / "found"
    monkeypatch.setattr(sys, "argv", ["align", str(table), str(xfeat), str(output)])
    align.main()
    assert [path.name for path in output.iterdir()] == ["f17_hallway_alt-f17_hallway_main.csv"]
    dataset = load_posed_images(output / "f17_hallway_alt-f17_hallway_main.csv", 1.5, 4)
    partners = [dataset.queries[i].name[:15] for i in dataset.positives(0)]
    assert dataset.queries[0].name.startswith("f17_hallway_alt")
    assert "f17_hallway_mai" in partners
