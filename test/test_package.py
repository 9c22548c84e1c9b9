"""What the package promises: who imports what, the messages, and the files it installs."""

import ast
import configparser
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vpr_lite_ros"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Who may import what; everybody else runs without it. A name ending in / is a folder.
NODE = (
    "node.py",
    "node_inputs.py",
    "node_outputs.py",
    "node_parameters.py",
    "node_process.py",
)
# The demo plays a drive into the nodes over DDS; live.py and view_node.py listen.
RCLPY = (*NODE, "backend/node.py", "demo.py", "live.py", "view_node.py")
ROS = (*RCLPY, "messages.py")
ALLOWED: dict[str, tuple[str, ...]] = {
    "rclpy": RCLPY,
    "rcl_interfaces": (*NODE, "backend/node.py"),
    "tf2_ros": ("node_outputs.py",),
    "tf2_msgs": ("backend/node.py",),
    "gtsam": ("backend/",),
    "evo": ("backend/accuracy.py",),
    "sensor_msgs": (*ROS, "image.py"),
    "cv_bridge": ("image.py",),
    **dict.fromkeys(
        (
            "builtin_interfaces",
            "diagnostic_msgs",
            "geometry_msgs",
            "nav_msgs",
            "std_msgs",
            "std_srvs",
            "visualization_msgs",
            "vpr_lite_ros.messages",
            "vpr_lite_ros.msg",
            "vpr_lite_ros.srv",
        ),
        ROS,
    ),
    "scipy": ("datasets.py",),
    "tensorrt": ("tensorrt_runner.py",),
    "pycuda": ("tensorrt_runner.py",),
    "torch": ("models/", "training/", "export.py"),
    "torchvision": ("models/", "training/", "export.py"),
    "vpr_lite_ros.node": (),
    "vpr_lite_ros.demo": (),
    "vpr_lite_ros.live": ("view_node.py",),
    "vpr_lite_ros.view_node": (),
    "vpr_lite_ros.backend": ("backend/",),
    "vpr_lite_ros.backend.node": (),
    "vpr_lite_ros.models": ("models/", "training/", "export.py"),
    "vpr_lite_ros.training": ("training/",),
    "vpr_lite_ros.export": ("training/",),
}
# `vpr-lite` reaches these only once a subcommand asks for them.
ALLOWED_WITHIN_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "vpr_lite_ros.demo": ("cli.py",),
    "vpr_lite_ros.live": ("cli.py",),
    "vpr_lite_ros.view_node": ("cli.py",),
    "vpr_lite_ros.backend": ("cli.py", "demo.py"),
    "vpr_lite_ros.models": ("cli.py", "bench.py"),
    "torch": ("bench.py",),
    "vpr_lite_ros.training": ("cli.py",),
    "vpr_lite_ros.export": ("cli.py",),
}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Full names of everything that a module imports, and whether within a function."""
    package = ["vpr_lite_ros", *module.split("/")[:-1]]

    def visit(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                source = ".".join([*base, *filter(None, [child.module])])
                # `from package import name`: the name may be a module.
                yield from ((f"{source}.{alias.name}", in_function) for alias in child.names)
            else:
                nested = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, in_function or nested)

    yield from visit(ast.parse((PACKAGE / module).read_text(encoding="utf-8")), False)


def permits(allowed: tuple[str, ...], module: str) -> bool:
    return any(module == one or (one.endswith("/") and module.startswith(one)) for one in allowed)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    for name, in_function in imports(module):
        for restricted, allowed in ALLOWED.items():
            if name != restricted and not name.startswith(restricted + "."):
                continue
            late = ALLOWED_WITHIN_FUNCTIONS.get(restricted, ()) if in_function else ()
            assert permits(allowed + late, module), f"{module} must not import {name}"


def test_the_core_runs_without_ros_and_torch() -> None:
    """What the rules above promise, seen from outside: third parties count, too."""
    program = (
        "import sys\n"
        "import vpr_lite_ros.cli, vpr_lite_ros.detector, vpr_lite_ros.inference\n"
        "optional = {'rclpy', 'torch', 'tensorrt', 'pycuda', 'gtsam', 'evo'}\n"
        "print(*sorted(optional & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_the_import_rules_see_every_kind_of_import() -> None:
    assert "node.py" in MODULES, "the rules about node.py guard nothing"
    assert any(name.startswith("rclpy") for name, _ in imports("node.py"))


def test_versions_agree() -> None:
    manifest = ElementTree.parse(ROOT / "package.xml").findtext("version")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == manifest


def test_loop_closure_has_the_fields_that_back_ends_rely_on() -> None:
    from vpr_lite_ros.msg import LoopClosure

    assert LoopClosure.get_fields_and_field_types() == {
        "header": "std_msgs/Header",
        "match_stamp": "builtin_interfaces/Time",
        "query_id": "uint64",
        "match_id": "uint64",
        "query_session": "string",
        "match_session": "string",
        "robot_id": "int32",
        "match_robot_id": "int32",
        "similarity": "float",
        "match_score": "float",
        "confidence": "float",
        "num_matches": "uint32",
        "num_inliers": "uint32",
        "num_correlated": "uint32",
        "zoom": "float",
        "rank": "uint32",
        "pose_type": "uint8",
        "relative_pose": "geometry_msgs/PoseWithCovariance",
        "status": "uint8",
        "model_id": "string",
        "latency_ms": "float",
    }


def test_loop_closure_constants() -> None:
    from vpr_lite_ros.msg import LoopClosure

    pose_types = ("NONE", "ROTATION_AND_DIRECTION", "METRIC", "ROTATION")
    statuses = (
        "ACCEPTED",
        "LOW_SIMILARITY",
        "LOW_SCORE",
        "FEW_MATCHES",
        "GEOMETRY",
        "NOT_CONSISTENT",
        "ODOMETRY",
        "TOO_SOON",
        "LOW_CONFIDENCE",
        "NO_CANDIDATE",
    )
    assert [getattr(LoopClosure, f"POSE_{name}") for name in pose_types] == [0, 1, 2, 3]
    assert [getattr(LoopClosure, f"STATUS_{name}") for name in statuses] == list(range(10))


def test_services_carry_loop_closures() -> None:
    from vpr_lite_ros.srv import GetLoopClosures, QueryImage

    assert QueryImage.Request.get_fields_and_field_types() == {
        "image": "sensor_msgs/Image",
        "top_k": "uint32",
    }
    assert QueryImage.Response.get_fields_and_field_types() == {
        "success": "boolean",
        "message": "string",
        "candidates": "sequence<vpr_lite_ros/LoopClosure>",
    }
    assert GetLoopClosures.Request.get_fields_and_field_types() == {
        "since": "builtin_interfaces/Time"
    }
    assert GetLoopClosures.Response.get_fields_and_field_types() == {
        "success": "boolean",
        "message": "string",
        "closures": "sequence<vpr_lite_ros/LoopClosure>",
    }


def test_everything_is_installed() -> None:
    from ament_index_python.packages import get_package_prefix, get_package_share_directory

    import vpr_lite_ros

    share = Path(get_package_share_directory("vpr_lite_ros"))
    prefix = Path(get_package_prefix("vpr_lite_ros"))
    assert vpr_lite_ros.__file__ is not None
    python = Path(vpr_lite_ros.__file__).parent

    for folder in ("launch", "config"):
        sources = [path for path in (ROOT / folder).iterdir() if path.is_file()]
        assert sources, f"{folder}/ is empty"
        for source in sources:
            assert (share / folder / source.name).read_bytes() == source.read_bytes()
    for module in MODULES:
        assert (python / module).is_file(), f"{module} is not installed"
    for source in (PACKAGE / "bundles").rglob("*"):
        if source.is_file():
            assert (python / source.relative_to(PACKAGE)).stat().st_size == source.stat().st_size
    for executable in (
        "lib/vpr_lite_ros/loop_closure_node",
        "lib/vpr_lite_ros/pose_graph_node",
        "bin/vpr-lite",
    ):
        assert os.access(prefix / executable, os.X_OK), f"{executable} cannot be executed"
    # The C++ headers are what a SLAM back end compiles against.
    assert list((prefix / "include").rglob("loop_closure.hpp"))


def test_a_model_bundle_ships_with_the_package() -> None:
    bundles = [path.parent for path in (PACKAGE / "bundles").glob("*/model.yaml")]
    assert bundles, "vpr_lite_ros/bundles holds no model"
    for bundle in bundles:
        for graph in ("place.onnx", "match.onnx"):
            assert (bundle / graph).is_file(), f"{bundle.name} lacks {graph}"


def test_adapting_the_ros_wheels_a_second_time_changes_nothing(tmp_path: Path) -> None:
    fix_targets = runpy.run_path(str(ROOT / "scripts" / "fix_ros_wheels.py"))["fix_targets"]
    targets = tmp_path / "a_msgs" / "cmake" / "export_a_msgs__rosidl_generator_pyExport.cmake"
    targets.parent.mkdir(parents=True)
    line = 'INTERFACE_INCLUDE_DIRECTORIES "{}/python3.11;${{_IMPORT_PREFIX}}/include/a;{}"\n'
    targets.write_text(line.format("/opt/p/include", "/opt/p/lib/numpy/_core/include"))

    here = ("/my venv/include/python3.11", "/my venv/numpy/core/include")
    assert fix_targets(tmp_path, *here) == (1, 1)
    assert targets.read_text() == line.format("/my venv/include", here[1])
    assert fix_targets(tmp_path, *here) == (1, 0)


def test_the_wheel_of_cv_bridge_is_mended_once(tmp_path: Path) -> None:
    fix_cv_bridge = runpy.run_path(str(ROOT / "scripts" / "fix_ros_wheels.py"))["fix_cv_bridge"]
    file = tmp_path / "cv_bridge_boost.py"
    file.write_text(
        '_CV_TYPES = {\n    "8UC1": cv2.CV_8UC1,\n    "16UC1": cv2.CV_8UC1,\n'
        '    "16SC1": cv2.CV_16SC1,\n    }\n'
    )
    assert fix_cv_bridge(file)
    text = file.read_text()
    assert '"16UC1": cv2.CV_16UC1,' in text and '"8UC1": cv2.CV_8UC1,' in text
    assert '"16SC1": cv2.CV_16SC1,' in text and '"yuv422_yuy2": cv2.CV_8UC2,' in text
    assert not fix_cv_bridge(file) and file.read_text() == text
