"""The command line, as a user types it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from vpr_lite_ros.cli import main
from vpr_lite_ros.config import parameters, shipped_yaml
from vpr_lite_ros.inference import load_bundle

MakePicture = Callable[..., NDArray[np.uint8]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_picture: MakePicture) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "three"
    folder.mkdir()
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), make_picture(number))
    return folder


def refused(capsys: Capture, *argv: object) -> str:
    """The one line on stderr with which wrong use is refused."""
    assert main([str(one) for one in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "Traceback" not in err
    return err


def failed(capsys: Capture, *argv: object) -> str:
    """The one line on stderr after which the command gave up."""
    assert main([str(one) for one in argv]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    return err


def test_version_and_help(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"vpr-lite \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out
    for command in ("replay", "demo", "evaluate", "simulate", "export", "parameters"):
        assert command in commands
        assert main([command, "--help"]) == 0
        assert "Traceback" not in capsys.readouterr().err


def test_no_command_is_refused(capsys: Capture) -> None:
    assert "COMMAND" in refused(capsys)


def test_parameters_prints_the_shipped_file(capsys: Capture) -> None:
    assert main(["parameters"]) == 0
    assert capsys.readouterr().out == shipped_yaml()


@pytest.mark.parametrize("command", ["replay", "demo"])
def test_every_parameter_is_an_option_with_its_sentence(capsys: Capture, command: str) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in parameters().items():
        assert f"--{name} " in text
        assert parameter.help[:30] in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--top_k", "0"], "parameter top_k: 0 is out of range, expected 1 to 1000"),
        (["--top_k", "many"], "parameter top_k: 'many' is no int"),
        (["--min_time_gap_s", "-1"], "parameter min_time_gap_s: -1.0 is out of range"),
        (["--similarity_threshold", "2"], "parameter similarity_threshold: 2.0 is out of range"),
        (["--backend", "abacus"], "parameter backend: 'abacus' is unknown, choose auto"),
        (["--top-k", "5"], "unknown option --top-k; did you mean --top_k?"),
        (["--keyframe.interval", "5"], "unknown option --keyframe.interval"),
        (["--radius", "0"], "argument --radius: 0 is no positive number"),
        (["--rate", "fast"], "argument --rate"),
        (["more"], "unknown argument more"),
        (["--poses", "a", "--pairs", "b"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    capsys: Capture, images: Path, tmp_path: Path, options: list[str], complaint: str
) -> None:
    error = refused(capsys, "replay", images, "--output", tmp_path / "out", *options)
    assert complaint in error
    assert not (tmp_path / "out").exists()


def test_options_are_not_abbreviated(capsys: Capture, images: Path) -> None:
    # `--min_in` might become ambiguous with the next release.
    assert "unknown option --min_in" in refused(capsys, "replay", images, "--min_in", "3")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "/**:\n  ros__parameters:\n    topk: 3\n",
            "parameter topk is unknown; did you mean top_k",
        ),
        ("top_k: 3.5\n", "parameter top_k: 3.5 is a float, expected int"),
        ("keyframe:\n  min_interval_s: -2\n", "parameter keyframe.min_interval_s"),
        ("- 1\n", "holds no `name: value` lines"),
        (None, "No such file"),
    ],
)
def test_wrong_parameter_files_are_refused(
    capsys: Capture, images: Path, tmp_path: Path, content: str | None, complaint: str
) -> None:
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_text(content)
    assert complaint in refused(capsys, "replay", images, "--params", file)


def test_options_go_before_the_file_and_the_file_before_defaults(
    capsys: Capture, images: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("/**:\n  ros__parameters:\n    top_k: 3\n    min_matches: 4\n")
    command = ["replay", images, "--output", tmp_path / "out", "--params", file]
    command += ["--bundle", tiny_bundle, "--backend", "onnxruntime", "--top_k", "7"]
    command += ["--keyframe.min_interval_s", "2"]
    assert main([str(one) for one in command]) == 0
    summary = yaml.safe_load((tmp_path / "out" / "summary.json").read_text())
    used = summary["parameters"]
    assert (used["top_k"], used["min_matches"], used["session_id"]) == (7, 4, "replay")
    assert used["keyframe"]["min_interval_s"] == 2.0
    # Of three frames a second apart, two are two seconds apart.
    assert summary["keyframes"] == 2
    printed = capsys.readouterr().out
    assert "3 frames, 2 keyframes, 0 closures" in printed
    assert "keyframes without a candidate: 2" in printed


def test_replay_writes_beside_what_is_there_by_default(
    images: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(images), "--bundle", str(tiny_bundle)]) == 0
    names = {path.name for path in (tmp_path / "build" / "replay" / "three").iterdir()}
    assert names == {"closures.csv", "closures.jsonl", "decisions.jsonl", "summary.json"}


def test_what_cannot_be_read_is_named(
    capsys: Capture, images: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    assert "nowhere does not exist" in failed(capsys, "replay", "nowhere")
    replay = ("replay", images, "--output", tmp_path / "out", "--bundle")
    assert f"no model bundle at {tmp_path}" in failed(capsys, *replay, tmp_path)
    assert "other.csv does not exist" in failed(
        capsys, *replay, tiny_bundle, "--poses", tmp_path / "other.csv"
    )
    assert "calib.yaml" in failed(capsys, *replay, tiny_bundle, "--camera", tmp_path / "calib.yaml")
    database = tmp_path / "notes.db"
    database.write_text("no database at all, but long enough to look like a file with a header")
    assert str(database) in failed(capsys, *replay, tiny_bundle, "--database_path", database)


def test_simulate_writes_a_bag_and_leaves_one_that_is_there(
    capsys: Capture, tmp_path: Path
) -> None:
    from vpr_lite_ros.bags import open_source

    bag = tmp_path / "town"
    assert main(["simulate", str(bag), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{bag}\n"
    with open_source(bag) as source:
        assert len(source) > 200
        assert next(source.frames()).image.shape == (480, 640, 3)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in bag.iterdir())
    assert main(["simulate", str(bag)]) == 1
    assert f"{bag} exists already" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in bag.iterdir()) == before


def test_export_makes_a_bundle_that_opens(
    capsys: Capture, tiny_networks: tuple[Any, Any], tmp_path: Path
) -> None:
    from vpr_lite_ros.export import save_networks

    checkpoint = tmp_path / "tiny.safetensors"
    place, match = tiny_networks
    save_networks(checkpoint, place, match, {"training": "none"})
    output = tmp_path / "bundle"
    command = ["export", checkpoint, "--output", output, "--name", "small"]
    assert main([str(one) for one in [*command, "--max-patches", 12]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    bundle = load_bundle(output)
    assert bundle.name == "small" and bundle.max_patches == 12
    assert bundle.card["training"] == "none"


def test_export_names_a_checkpoint_that_is_none(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not tensors")
    error = failed(capsys, "export", path, "--output", tmp_path / "b", "--name", "x")
    assert str(path) in error
    assert "--max-patches: 0 is less than 1" in refused(
        capsys, "export", path, "--output", "b", "--name", "x", "--max-patches", "0"
    )
