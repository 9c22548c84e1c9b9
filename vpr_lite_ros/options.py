"""The options of ``vpr-lite``; what its commands do is in ``cli.py``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from vpr_lite_ros import config

WRONG_USE = 2
"""Exit code."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest option that exists."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        for option in unknown:
            # Reported here, by the subcommand's parser, which knows what exists instead.
            name = option.split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            kind = "option" if option.startswith("-") else "argument"
            self.error(f"unknown {kind} {name}{hint}")
        return namespace, unknown


def make_parser(commands: Iterable[Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Options of the program, of which each command is a function with a docstring."""
    parser = _Parser(prog="vpr-lite", description="Visual place recognition and loop closures.")
    parser.add_argument("--version", action="version", version=f"vpr-lite {_version()}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for run in commands:
        about = (run.__doc__ or "").splitlines()[0]
        options = group.add_parser(run.__name__.replace("_", "-"), help=about, description=about)
        options.set_defaults(run=run, params=None)
        if run.__name__ in _OPTIONS_OF:
            _OPTIONS_OF[run.__name__](options)
    return parser


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="folder for results; empty: build/replay/<name of source>"
    )
    _add_recording_options(parser)
    parser.add_argument(
        "--depth-topic", metavar="TOPIC",
        help="of a bag: depth images in register with the camera's; closures are in metres then",
    )  # fmt: skip
    _add_all_parameters(parser)


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="folder for results; empty: build/report/<name of source>"
    )
    parser.add_argument(
        "--target-precision", type=_share, default=0.99, metavar="P",
        help="recommend parameters with which this share of closures is true",
    )  # fmt: skip
    _add_recording_options(parser)
    _add_all_parameters(parser)


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="parameter file to write"
    )
    parser.add_argument(
        "--target-precision", type=_share, default=0.99, metavar="P",
        help="share of closures that are to be true",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER",
        help="where scores are kept, those of vpr-lite report, too; empty: "
        "build/report/<name of source>",
    )  # fmt: skip
    _add_recording_options(parser)
    _add_all_parameters(parser)


def _add_recording_options(parser: argparse.ArgumentParser) -> None:
    """What to read of a recording, and what is true of it."""
    parser.add_argument("source", type=Path, help="rosbag2, ROS 1 bag, folder of images or video")
    parser.add_argument("--image-topic", metavar="TOPIC", help="where a bag has several")
    parser.add_argument(
        "--odom-topic",
        metavar="TOPIC",
        help="odometry that chooses keyframes; empty: the bag's only one, '': none",
    )
    parser.add_argument(
        "--rate", type=_positive, default=1.0, metavar="HZ", help="of images without stamps"
    )
    parser.add_argument(
        "--camera",
        type=Path,
        metavar="FILE",
        help="calibration for the epipolar check (camera_info YAML, or JSON with fx, fy, cx, cy, "
        "width, height); empty: the recording's own",
    )
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument(
        "--poses",
        type=Path,
        metavar="FILE",
        help="true poses: CSV, TUM, KITTI or EuRoC trajectory, or bag",
    )
    truth.add_argument(
        "--pairs", type=Path, metavar="FILE", help="true loops: CSV with columns query,match"
    )
    parser.add_argument("--poses-topic", metavar="TOPIC", help="where the poses' bag has several")
    parser.add_argument(
        "--radius", type=_positive, default=5.0, metavar="M",
        help="with --poses: a closure is true if its images were taken within this many metres",
    )  # fmt: skip


def _add_pose_graph_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "closures", type=Path, help="folder that replay has written, or its closures.jsonl"
    )
    parser.add_argument(
        "--odometry", type=Path, required=True, metavar="FILE",
        help="poses of the drive: bag, TUM trajectory, or CSV with x, y, z, qx, qy, qz, qw and "
        "stamp_s",
    )  # fmt: skip
    parser.add_argument("--odom-topic", metavar="TOPIC", help="where a bag has several")
    parser.add_argument(
        "--output", type=Path, help="folder for results; empty: build/pose_graph/<name of closures>"
    )
    parser.add_argument(
        "--poses", type=Path, metavar="FILE",
        help="true poses, to measure by: CSV, TUM trajectory or bag",
    )  # fmt: skip
    parser.add_argument("--poses-topic", metavar="TOPIC", help="where the poses' bag has several")
    parser.add_argument(
        "--of-camera",
        action="store_true",
        help="the poses are of a camera (x right, y down, z forward), as KITTI's",
    )


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bag", type=Path, help="a bag to play; empty: a drive that is drawn")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder for results"
    )
    parser.add_argument(
        "--speed", type=_positive, metavar="X",
        help="times the recorded pace (default: 1 for a bag, 3 for the drive that is drawn)",
    )  # fmt: skip
    parser.add_argument("--image-topic", metavar="TOPIC", help="where the bag has several")
    parser.add_argument(
        "--radius", type=_positive, default=10.0, metavar="M",
        help="a closure is true if its images were taken within this many metres",
    )  # fmt: skip
    _add_all_parameters(parser)


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", type=Path, nargs="?", metavar="DATASET",
        help="folder of images with loops.csv or poses.csv, folder with day_right and day_left "
        "or night_right, Pittsburgh 30k, Tokyo 24/7 or MSLS as published, or a folder of these",
    )  # fmt: skip
    parser.add_argument(
        "--queries", type=Path, metavar="A", help="in place of DATASET: folder of images to find"
    )
    parser.add_argument(
        "--database", type=Path, metavar="B",
        help="... and of those they are looked up in; frames of equal number are one place",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("build/eval"), help="folder for <name>.json"
    )
    parser.add_argument(
        "--rerank", type=_count, default=0, metavar="K",
        help="also match the first K candidates and put the surest first; 0: do not. The patches "
        "of every image in the database are kept on disk for it, 0.4 MB each",
    )  # fmt: skip
    _add_label_options(parser)
    names = "bundle", "backend", "threads", "min_time_gap_s", "min_agreeing_keyframes"
    _add_some_parameters(parser, names)


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", type=Path, nargs="*", metavar="DATASET",
        help="labelled sequences, as of vpr-lite evaluate",
    )  # fmt: skip
    parser.add_argument(
        "--town", type=int, action="append", default=[], metavar="SEED",
        help="also a drive through a town that is drawn; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--picture", type=Path, default=Path("build/calibration.png"), metavar="FILE",
        help="where to draw scores and reliability",
    )  # fmt: skip
    _add_label_options(parser)
    names = "bundle", "backend", "threads", "top_k", "min_time_gap_s", "min_agreeing_keyframes"
    _add_some_parameters(parser, names)


def _add_simulate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("--raw", action="store_true", help="raw images in place of JPEG")
    parser.add_argument("--depth", action="store_true", help="depth images, too (0.6 MB each)")
    parser.add_argument(
        "--storage", choices=("sqlite3", "mcap"), default="sqlite3", help="storage of the bag"
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help=".safetensors file with both networks")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument(
        "--max-patches", type=_whole, metavar="N", help="tokens kept of an image; empty: all"
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench.json"), metavar="FILE", help="of figures"
    )
    parser.add_argument("--repeats", type=_whole, default=50, help="of each measurement")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="also time the bare backbone, and Patch-NetVLAD's architecture (needs torch)",
    )
    _add_some_parameters(parser, ("bundle", "top_k"))


def _add_build_engine_options(parser: argparse.ArgumentParser) -> None:
    _add_some_parameters(parser, ("bundle", "top_k"))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=("place", "matcher"), help="which network")
    parser.add_argument("config", type=Path, help="recipe (YAML), as in config/training")
    parser.add_argument(
        "--backbone", type=Path, metavar="FILE",
        help="begin with a pretrained RepVGG-A0, in its authors' or timm's names, or with a bundle",
    )  # fmt: skip


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit code: 0 all is well, 1 there are problems, 3 there are warnings only, "
        "2 wrong options."
    )
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="SOURCE",
        help="also look at a rosbag2, ROS 1 bag, folder of images or video",
    )  # fmt: skip
    parser.add_argument("--topic", metavar="TOPIC", help="... or listen to a topic of images")
    parser.add_argument(
        "--seconds", type=_positive, default=5.0, metavar="S", help="how long to listen"
    )
    parser.add_argument("--image-topic", metavar="TOPIC", help="where a bag has several")
    parser.add_argument(
        "--camera-info-topic", metavar="TOPIC", help="with --topic; empty: the one beside it"
    )
    parser.add_argument(
        "--odom-topic", metavar="TOPIC", help="odometry; empty: the only one, '': none"
    )
    parser.add_argument(
        "--rate", type=_positive, default=1.0, metavar="HZ", help="of images without stamps"
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help="ROS parameter file (YAML)")
    names = "bundle", "backend", "threads", "database_path", "mode", "image_transport", "qos.image"
    _add_some_parameters(parser, names)


def _add_view_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="REPLAY",
        help="folder that `vpr-lite replay` writes to; empty: a running node",
    )  # fmt: skip
    parser.add_argument("--namespace", default="/", metavar="NS", help="of the node")
    parser.add_argument("--node", default="loop_closure", metavar="NAME", help="its name")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for a picture of each pair of a node"
    )


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    """What images and labels on disk mean."""
    parser.add_argument(
        "--radius", type=_positive, default=5.0, metavar="M",
        help="with poses.csv: metres within which two images show the same place",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=_count, default=2, metavar="FRAMES",
        help="of two sequences: frame numbers this far apart are the same place",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=_positive, default=1.0, metavar="HZ", help="of images without stamps"
    )


def _add_all_parameters(parser: argparse.ArgumentParser) -> None:
    """One option for each parameter of the detector, made from ``config.parameters()``."""
    group = parser.add_argument_group(
        "parameters", "As of the node. An option goes before the file, the file before defaults."
    )
    group.add_argument("--params", type=Path, metavar="FILE", help="ROS parameter file (YAML)")
    _add_each_parameter(group, config.parameters())


def _add_some_parameters(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    # Of a parameter file all but these would have no effect: there is no option for one.
    _add_each_parameter(parser.add_argument_group("parameters", "As of the node."), names)


def _add_each_parameter(group: Any, names: Iterable[str]) -> None:
    for name in names:
        parameter = config.parameters()[name]
        group.add_argument(
            f"--{name}",
            dest=f"parameter {name}",
            default=argparse.SUPPRESS,
            metavar=parameter.type.__name__.upper(),
            help=f"{config.describe(parameter)} (default: {parameter.default})".replace("%", "%%"),
        )


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Parameters that the user set, by file or by option; a problem is a ``ConfigError``."""
    values = config.read_yaml(args.params) if args.params else {}
    for name, parameter in config.parameters().items():
        text = getattr(args, f"parameter {name}", None)
        if text is not None:
            values[name] = parameter.parse(text)
    return values


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: above 0, at most 1")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def _version() -> str:
    try:
        return metadata.version("vpr_lite_ros")
    except metadata.PackageNotFoundError:
        pass  # Built by colcon: the version is in package.xml, beside the launch files.
    try:
        from xml.etree import ElementTree

        from ament_index_python.packages import get_package_share_directory

        manifest = Path(get_package_share_directory("vpr_lite_ros")) / "package.xml"
        return ElementTree.parse(manifest).findtext("version") or "unknown"
    except (ImportError, LookupError, OSError):
        return "unknown"


_OPTIONS_OF: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "replay": _add_replay_options,
    "pose_graph": _add_pose_graph_options,
    "report": _add_report_options,
    "tune": _add_tune_options,
    "demo": _add_demo_options,
    "evaluate": _add_evaluate_options,
    "calibrate": _add_calibrate_options,
    "simulate": _add_simulate_options,
    "export": _add_export_options,
    "bench": _add_bench_options,
    "build_engine": _add_build_engine_options,
    "train": _add_train_options,
    "doctor": _add_doctor_options,
    "view": _add_view_options,
}
