"""The command ``vpr-lite``: one function a subcommand, which imports what it needs itself.

Errors that a user can mend come as one line on stderr. Exit codes: 0 well, 1 failed, 2 wrong
options or parameters, 130 interrupted (what was finished by then is kept).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpr_lite_ros import config
from vpr_lite_ros.options import WRONG_USE, make_parser, settings_of

if TYPE_CHECKING:
    from vpr_lite_ros.health import Finding

OK, FAILED, INTERRUPTED = 0, 1, 130
_SOURCE_ROS = "Source a ROS 2 installation and this package (install/setup.bash)"


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name); return the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    args = argparse.Namespace(run=None)
    try:
        args = make_parser(COMMANDS).parse_args(argv)
        return int(args.run(args))
    except config.ConfigError as error:
        print(f"vpr-lite: error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        kept = "; the scores so far are kept, and the same command goes on from there"
        said = kept if args.run in (report, tune) else ""
        print(f"vpr-lite: interrupted{said}", file=sys.stderr)
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

    settings = settings_of(args)
    settings.setdefault("session_id", "replay")
    summary = replay_recording(
        args.source,
        args.output or Path("build/replay") / _name(args.source),
        config.make_config(settings),
        depth_topic=args.depth_topic,
        **_of_recording(args),
    )
    print(describe(summary))
    return _exit_code(summary)


def report(args: argparse.Namespace) -> int:
    """Say whether it works on a recording, with figures and pictures, as one HTML page."""
    from vpr_lite_ros.reporting.report import describe_report, make_report

    output = args.output or Path("build/report") / _name(args.source)
    settings = config.make_config(settings_of(args))
    figures = make_report(_asked(args), output, settings, args.target_precision)
    print(describe_report(figures, output))
    return _exit_code(figures)


def tune(args: argparse.Namespace) -> int:
    """Find parameters for a target precision on a recording, as a ROS parameter file."""
    from vpr_lite_ros.reporting.report import describe_tuning, tune_parameters, write_parameters
    from vpr_lite_ros.reporting.tuning import Tuning

    work = args.work or Path("build/report") / _name(args.source)
    settings = config.make_config(settings_of(args))
    found = tune_parameters(_asked(args), work, settings, args.target_precision)
    if not isinstance(found, Tuning):
        print(
            f"vpr-lite: {found.frames} of {found.total} frames done ({found.stopped}); run it "
            "again to go on",
            file=sys.stderr,
        )
        return _exit_code({"stopped": found.stopped})
    if not found.reached:
        print(
            f"vpr-lite: error: a precision of {found.target:g} is out of reach here: the best is "
            f"{found.precision.value:.3f} with recall {found.recall.value:.3f}. Ask for less with "
            "--target-precision, or look at the false closures with vpr-lite report; "
            f"{args.output} is not written",
            file=sys.stderr,
        )
        return FAILED
    write_parameters(args.output, settings, found, args.source)
    print(describe_tuning(found, args.output))
    return OK


def _asked(args: argparse.Namespace) -> Any:
    from vpr_lite_ros.reporting.report import Asked

    return Asked(source=args.source, **_of_recording(args))


def _of_recording(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a recording and its ground truth."""
    return {
        "image_topic": args.image_topic,
        "odom_topic": args.odom_topic,
        "rate_hz": args.rate,
        "camera_file": args.camera,
        "poses": args.poses,
        "poses_topic": args.poses_topic,
        "pairs": args.pairs,
        "radius_m": args.radius,
    }


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
        settings_of(args),
        bag=args.bag,
        speed=args.speed,
        image_topic=args.image_topic,
        radius_m=args.radius,
    )
    print(describe_demo(report))
    return _exit_code(report)


def pose_graph(args: argparse.Namespace) -> int:
    """Correct the odometry of a drive by the closures that a replay found."""
    try:
        from vpr_lite_ros.backend.offline import correct_recording, describe
    except ImportError as error:
        print(
            f"vpr-lite: error: the pose graph needs GTSAM and evo ({error}): "
            "pip install vpr_lite_ros[backend], or -r requirements/backend.txt",
            file=sys.stderr,
        )
        return FAILED
    report = correct_recording(
        args.closures,
        args.odometry,
        args.output or Path("build/pose_graph") / _name(args.closures),
        odom_topic=args.odom_topic,
        truth=args.poses,
        truth_topic=args.poses_topic,
        of_camera=args.of_camera,
    )
    print(describe(report))
    return OK


def evaluate(args: argparse.Namespace) -> int:
    """Measure recall and precision of a model on labelled images."""
    from vpr_lite_ros.benchmarks import aligned, find_benchmarks
    from vpr_lite_ros.inference import DEFAULT_BUNDLE, open_model
    from vpr_lite_ros.measurement import describe, evaluate_all

    pair = args.queries, args.database
    if (args.dataset is None) != all(pair) or any(pair) != all(pair):
        raise config.ConfigError("pass either DATASET or both --queries and --database")
    settings = config.make_config(settings_of(args))
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
    settings = config.make_config(settings_of(args))
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
    write_drive(drive, args.output, compressed=not args.raw, depth=args.depth, storage=args.storage)
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
    print(export_bundle(place, match, about, args.output, name=args.name))
    return OK


def build_engine(args: argparse.Namespace) -> int:
    """Build TensorRT's engines for this machine's NVIDIA GPU, as the node else does itself."""
    from vpr_lite_ros.inference import DEFAULT_BUNDLE, TENSORRT, open_model

    logging.getLogger("vpr_lite_ros").setLevel(logging.INFO)
    settings = config.make_config(settings_of(args))
    bundle = Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE
    open_model(bundle, TENSORRT, most_candidates=settings.top_k)
    return OK


def bench(args: argparse.Namespace) -> int:
    """Time each step of an image, on each backend that is here."""
    from vpr_lite_ros.bench import bench as run
    from vpr_lite_ros.bench import describe
    from vpr_lite_ros.inference import DEFAULT_BUNDLE

    settings = config.make_config(settings_of(args))
    report = run(
        Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE,
        args.output,
        top_k=settings.top_k,
        repeats=args.repeats,
        with_baseline=args.baseline,
    )
    print(f"{describe(report)}\n\nfile: {args.output}")
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


def doctor(args: argparse.Namespace) -> int:
    """Say what is installed, whether the model runs, and whether a recording or topic fits."""
    from vpr_lite_ros.doctor import Report, database
    from vpr_lite_ros.inference import DEFAULT_BUNDLE, BundleError, load_bundle
    from vpr_lite_ros.inspection import recording
    from vpr_lite_ros.installation import installation, model

    if args.source is not None and args.topic is not None:
        raise config.ConfigError("pass either SOURCE or --topic")
    settings = config.make_config(settings_of(args))
    path = Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE
    report = Report()
    report.section("installed", installation())
    report.section("model", model(path, settings.backend, settings.threads))
    try:
        bundle = load_bundle(path)
    except BundleError:
        bundle = None  # which has been said
    report.section("database", database(settings, bundle))
    if args.source is not None:
        found = recording(
            args.source,
            image_topic=args.image_topic,
            odom_topic=args.odom_topic,
            rate_hz=args.rate,
        )
        report.section(f"recording {args.source}", found)
    if args.topic is not None:
        report.section(f"topic {args.topic}", _listen(args, settings))
    return report.end()


def _listen(args: argparse.Namespace, settings: config.Config) -> Iterator[Finding]:
    try:
        from vpr_lite_ros.live import topic
    except ImportError as error:
        from vpr_lite_ros.doctor import problem

        return iter([problem("ROS", f"cannot be imported: {error}", _SOURCE_ROS)])
    return topic(
        args.topic,
        settings,
        camera_info_topic=args.camera_info_topic,
        odom_topic=args.odom_topic,
        seconds=args.seconds,
    )


def view(args: argparse.Namespace) -> int:
    """Show the pairs that a node or a replay finds, as they come."""
    from vpr_lite_ros.view import Tally, view_replay

    tally = Tally()
    try:
        if args.source is not None:
            view_replay(args.source, tally)
            tally.end()
            return OK
        try:
            from vpr_lite_ros.view_node import view_node
        except ImportError as error:
            print(
                f"vpr-lite: error: ROS cannot be imported ({error}). {_SOURCE_ROS}; "
                "a replay's folder can be viewed without",
                file=sys.stderr,
            )
            return FAILED
        view_node(args.namespace, args.node, args.output, tally)
    except KeyboardInterrupt:
        pass  # this is how one stops to watch
    tally.end()
    return OK


def parameters(args: argparse.Namespace) -> int:
    """Print every parameter with its default, as a ROS parameter file."""
    print(config.shipped_yaml(), end="")
    return OK


def _name(source: Path) -> str:
    """What to call the results of ``source``: a bag is often a folder with dots in its name."""
    path = source.resolve()
    return path.name if path.is_dir() else path.stem


def _exit_code(summary: dict[str, Any]) -> int:
    if summary["stopped"] is None:
        return OK
    return INTERRUPTED if summary["stopped"] == "interrupted" else FAILED


COMMANDS = (
    replay,
    pose_graph,
    report,
    tune,
    demo,
    evaluate,
    calibrate,
    simulate,
    export,
    bench,
    build_engine,
    train,
    doctor,
    view,
    parameters,
)


if __name__ == "__main__":
    sys.exit(main())
