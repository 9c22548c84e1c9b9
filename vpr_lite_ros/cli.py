"""The command ``vpr-lite``: one function a subcommand, which imports what it needs itself.

Errors that a user can mend come as one line on stderr. Exit codes: 0 well, 1 failed, 2 wrong
options or parameters, 130 interrupted (what was finished by then is kept).
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from vpr_lite_ros import config

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name); return the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        args = _make_parser().parse_args(argv)
        return int(args.run(args))
    except config.ConfigError as error:
        print(f"vpr-lite: error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("vpr-lite: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # argparse, after --help and after wrong options
        return int(stop.code or OK)
    except Exception as error:
        # Our own exceptions are messages to the user. Any other is a defect and keeps its
        # traceback, unless the file system raised it.
        if not (isinstance(error, OSError) or type(error).__module__.startswith("vpr_lite_ros.")):
            raise
        print(f"vpr-lite: error: {error}", file=sys.stderr)
        return FAILED


# -- subcommands -------------------------------------------------------------------------------


def replay(args: argparse.Namespace) -> int:
    """Run the detector over a recording, without ROS."""
    from vpr_lite_ros.replay import replay_recording
    from vpr_lite_ros.summary import describe

    settings = _settings(args)
    settings.setdefault("session_id", "replay")
    summary = replay_recording(
        args.source,
        args.output or Path("build/replay") / _name(args.source),
        config.make_config(settings),
        image_topic=args.image_topic,
        odom_topic=args.odom_topic,
        rate_hz=args.rate,
        camera_file=args.camera,
        poses=args.poses,
        poses_topic=args.poses_topic,
        pairs=args.pairs,
        radius_m=args.radius,
    )
    print(describe(summary))
    return _exit_code(summary)


def demo(args: argparse.Namespace) -> int:
    """Play a drive into the real node over DDS and draw the closures it finds."""
    try:
        from vpr_lite_ros.demo import describe_demo, run_demo
    except ImportError as error:
        print(
            f"vpr-lite: error: the demo runs the ROS 2 node, which cannot be imported "
            f"({error}). Source a ROS 2 installation, or use `make demo`; "
            "`vpr-lite replay` needs no ROS",
            file=sys.stderr,
        )
        return FAILED
    report = run_demo(
        args.output,
        _settings(args),
        bag=args.bag,
        speed=args.speed,
        image_topic=args.image_topic,
        radius_m=args.radius,
    )
    print(describe_demo(report))
    return _exit_code(report)


def evaluate(args: argparse.Namespace) -> int:
    """Measure recall and precision of a model on labelled images."""
    from vpr_lite_ros.benchmarks import aligned, find_benchmarks
    from vpr_lite_ros.inference import DEFAULT_BUNDLE, open_model
    from vpr_lite_ros.measurement import describe, evaluate_all

    pair = args.queries, args.database
    if (args.dataset is None) != all(pair) or any(pair) != all(pair):
        raise config.ConfigError("pass either DATASET or both --queries and --database")
    settings = config.make_config(_settings(args))
    if args.dataset is None:
        name = f"{_name(args.queries)}_from_{_name(args.database)}"
        benchmarks = [aligned(name, *pair, args.tolerance)]
    else:
        benchmarks = find_benchmarks(
            args.dataset, radius_m=args.radius, tolerance=args.tolerance, rate_hz=args.rate
        )
    bundle = Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE
    model = open_model(bundle, settings.backend, settings.threads)
    for report, path in evaluate_all(
        benchmarks,
        model,
        args.output,
        min_time_gap_s=settings.min_time_gap_s,
        rerank=args.rerank,
        min_agreeing=settings.min_agreeing_keyframes,
    ):
        print(f"{describe(report)}\n  file: {path}", flush=True)
    return OK


def calibrate(args: argparse.Namespace) -> int:
    """Fit a bundle's confidence to labelled sequences, and say what it is worth."""
    from vpr_lite_ros.benchmarks import find_benchmarks
    from vpr_lite_ros.inference import CARD, DEFAULT_BUNDLE, open_model

    try:
        from vpr_lite_ros.training.calibrate import calibrate_bundle
        from vpr_lite_ros.training.town import draw_town
    except ImportError as error:
        print(
            f"vpr-lite: error: calibrating needs scikit-learn and more ({error}): "
            "pip install -r requirements/train.txt",
            file=sys.stderr,
        )
        return FAILED
    settings = config.make_config(_settings(args))
    bundle = Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE
    model = open_model(bundle, settings.backend, settings.threads)
    with tempfile.TemporaryDirectory() as drawn:
        benchmarks = [
            benchmark
            for dataset in args.dataset
            for benchmark in find_benchmarks(
                dataset, radius_m=args.radius, tolerance=args.tolerance, rate_hz=args.rate
            )
        ]
        for seed in sorted(set(args.town)):
            town = draw_town(seed, Path(drawn) / f"town {seed}")
            benchmarks += find_benchmarks(town, radius_m=args.radius)
        told = calibrate_bundle(
            model,
            benchmarks,
            top_k=settings.top_k,
            min_time_gap_s=settings.min_time_gap_s,
            min_agreeing=settings.min_agreeing_keyframes,
            picture=args.picture,
        )
    print(told)
    print(f"  model card: {bundle / CARD}\n  picture: {args.picture}")
    return OK


def simulate(args: argparse.Namespace) -> int:
    """Draw the demo drive and write it as a rosbag2."""
    from vpr_lite_ros.bags import write_drive
    from vpr_lite_ros.simulation import simulate_drive

    drive = simulate_drive(args.seed)
    print(f"drawing {len(drive)} images of a drive (seed {args.seed})", file=sys.stderr)
    write_drive(drive, args.output, compressed=not args.raw, storage=args.storage)
    print(args.output)
    return OK


def export(args: argparse.Namespace) -> int:
    """Turn a checkpoint into a model bundle."""
    try:
        from vpr_lite_ros.export import export_bundle, load_networks
    except ImportError as error:
        print(
            f"vpr-lite: error: exporting needs torch and onnx ({error}): "
            "pip install -r requirements/train.txt",
            file=sys.stderr,
        )
        return FAILED
    place, match, about = load_networks(args.checkpoint, args.max_patches)
    print(export_bundle(place, match, about, args.output, name=args.name, fold=args.fold))
    return OK


def train(args: argparse.Namespace) -> int:
    """Train a network and make a bundle of it, as a recipe says."""
    try:
        from vpr_lite_ros.training.errors import TrainingError
        from vpr_lite_ros.training.recipe import train_matcher, train_place
    except ImportError as error:
        print(
            f"vpr-lite: error: training needs torch and more ({error}): "
            "pip install -r requirements/train.txt",
            file=sys.stderr,
        )
        return FAILED
    logging.getLogger("vpr_lite_ros").setLevel(logging.INFO)
    if args.network == "matcher":
        if args.backbone:
            raise TrainingError("--backbone is of the place network: leave it out")
        print(train_matcher(args.config))
    else:
        print(train_place(args.config, args.backbone))
    return OK


def parameters(args: argparse.Namespace) -> int:
    """Print every parameter with its default, as a ROS parameter file."""
    print(config.shipped_yaml(), end="")
    return OK


# -- options -----------------------------------------------------------------------------------


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


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vpr-lite", description="Visual place recognition and loop closures.")
    parser.add_argument("--version", action="version", version=f"vpr-lite {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Any) -> argparse.ArgumentParser:
        about = run.__doc__.splitlines()[0]
        added: argparse.ArgumentParser = commands.add_parser(
            run.__name__, help=about, description=about
        )
        added.set_defaults(run=run)
        return added

    _add_replay_options(command(replay))
    _add_demo_options(command(demo))
    _add_evaluate_options(command(evaluate))
    _add_calibrate_options(command(calibrate))

    options = command(simulate)
    options.add_argument("output", type=Path, help="folder to make")
    options.add_argument("--seed", type=int, default=0, help="another seed is another town")
    options.add_argument("--raw", action="store_true", help="raw images in place of JPEG")
    options.add_argument(
        "--storage", choices=("sqlite3", "mcap"), default="sqlite3", help="storage of the bag"
    )

    options = command(export)
    options.add_argument("checkpoint", type=Path, help=".safetensors file with both networks")
    options.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    options.add_argument("--name", required=True, help="name of the model")
    options.add_argument(
        "--fold", action="store_true", help="fold the backbone's branches into one convolution"
    )
    options.add_argument(
        "--max-patches", type=_whole, metavar="N", help="tokens kept of an image; empty: all"
    )

    options = command(train)
    options.add_argument("network", choices=("place", "matcher"), help="which network")
    options.add_argument("config", type=Path, help="recipe (YAML), as in config/training")
    options.add_argument(
        "--backbone", type=Path, metavar="FILE",
        help="begin with a pretrained RepVGG-A0, in its authors' or timm's names, or with a bundle",
    )  # fmt: skip

    command(parameters)
    return parser


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="rosbag2, ROS 1 bag, folder of images or video")
    parser.add_argument(
        "--output", type=Path, help="folder for results; empty: build/replay/<name of source>"
    )
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
        "--poses", type=Path, metavar="FILE", help="true poses: CSV, TUM trajectory or bag"
    )
    truth.add_argument(
        "--pairs", type=Path, metavar="FILE", help="true loops: CSV with columns query,match"
    )
    parser.add_argument("--poses-topic", metavar="TOPIC", help="where the poses' bag has several")
    parser.add_argument(
        "--radius", type=_positive, default=5.0, metavar="M",
        help="with --poses: a closure is true if its images were taken within this many metres",
    )  # fmt: skip
    _add_parameters(parser)


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bag", type=Path, help="a bag to play; empty: a drive that is drawn")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder for results"
    )
    parser.add_argument(
        "--speed", type=_positive, default=1.0, metavar="X", help="times the recorded pace"
    )
    parser.add_argument("--image-topic", metavar="TOPIC", help="where the bag has several")
    parser.add_argument(
        "--radius", type=_positive, default=10.0, metavar="M",
        help="a closure is true if its images were taken within this many metres",
    )  # fmt: skip
    _add_parameters(parser)


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
    group = parser.add_argument_group("parameters", "As of the node.")
    names = "bundle", "backend", "threads", "min_time_gap_s", "min_agreeing_keyframes"
    _add_each_parameter(group, names)
    # Of a parameter file all but these would have no effect: there is no option for one.
    parser.set_defaults(params=None)


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
    group = parser.add_argument_group("parameters", "As of the node.")
    names = "bundle", "backend", "threads", "top_k", "min_time_gap_s", "min_agreeing_keyframes"
    _add_each_parameter(group, names)
    parser.set_defaults(params=None)


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


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    """One option for each parameter of the detector, made from ``config.parameters()``."""
    group = parser.add_argument_group(
        "parameters", "As of the node. An option goes before the file, the file before defaults."
    )
    group.add_argument("--params", type=Path, metavar="FILE", help="ROS parameter file (YAML)")
    _add_each_parameter(group, config.parameters())


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


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """Parameters that the user set, by file or by option; a problem is a ``ConfigError``."""
    values = config.read_yaml(args.params) if args.params else {}
    for name, parameter in config.parameters().items():
        text = getattr(args, f"parameter {name}", None)
        if text is not None:
            values[name] = parameter.parse(text)
    return values


def _name(source: Path) -> str:
    """What to call the results of ``source``: a bag is often a folder with dots in its name."""
    path = source.resolve()
    return path.name if path.is_dir() else path.stem


def _exit_code(summary: dict[str, Any]) -> int:
    if summary["stopped"] is None:
        return OK
    return INTERRUPTED if summary["stopped"] == "interrupted" else FAILED


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
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


if __name__ == "__main__":
    sys.exit(main())
