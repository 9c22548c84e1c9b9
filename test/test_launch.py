"""The launch file, run as a user runs it: `ros2 launch`, the real node, DDS."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("launch_ros", reason="launch_ros comes with a ROS installation, not from pip")
rclpy = pytest.importorskip("rclpy")
if shutil.which("ros2") is None:
    pytest.skip("no `ros2` command", allow_module_level=True)

from sensor_msgs.msg import CompressedImage, Image

LAUNCH = ("ros2", "launch", "vpr_lite_ros")
# A domain of this file's own: other nodes on the machine are not seen, nor see these.
DOMAIN = 71
# Of the node to come up: the networks are loaded before the topics are made.
PATIENCE_S = 60.0


@contextmanager
def launched(
    log: Path, *arguments: str, file: str = "loop_closure.launch.py"
) -> Iterator["subprocess.Popen[bytes]"]:
    """`ros2 launch` with these arguments, ended as with Ctrl-C."""
    environment = os.environ | {"ROS_DOMAIN_ID": str(DOMAIN)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*LAUNCH, file, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            # To launch and the node alike, as a terminal does.
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture
def observer() -> Iterator[Any]:
    """A node that looks at the others in the domain."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=DOMAIN)
    node = rclpy.create_node("observer", context=context)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"the launch ended by itself:\n{log.read_text()}"
        assert time.monotonic() < end, f"waited in vain:\n{log.read_text()}"
        time.sleep(0.1)


def subscriptions(observer: Any, namespace: str, node: str = "loop_closure") -> set[str]:
    try:
        found = observer.get_subscriber_names_and_types_by_node(node, namespace)
    except rclpy.node.NodeNameNonExistentError:
        return set()
    return {topic for topic, _ in found}


def parameters(observer: Any, node: str, names: list[str]) -> list[object]:
    from rcl_interfaces.srv import GetParameters

    client = observer.create_client(GetParameters, f"{node}/get_parameters")
    assert client.wait_for_service(timeout_sec=PATIENCE_S)
    answer = client.call_async(GetParameters.Request(names=names))
    executor = rclpy.executors.SingleThreadedExecutor(context=observer.context)
    executor.add_node(observer)
    executor.spin_until_future_complete(answer, timeout_sec=PATIENCE_S)
    executor.shutdown()
    return [rclpy.parameter.parameter_value_to_python(value) for value in answer.result().values]


def test_every_argument_is_described() -> None:
    shown = subprocess.run(
        [*LAUNCH, "loop_closure.launch.py", "--show-args"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in (
        "namespace",
        "params_file",
        "image_topic",
        "image_transport",
        "camera_info_topic",
        "depth_topic",
        "odom_topic",
        "other_keyframes_topic",
        "robot_id",
        "autostart",
        "database_path",
        "bundle",
        "backend",
        "use_sim_time",
        "pose_graph",
        "log_level",
    ):
        assert f"'{name}':" in shown.stdout
    assert "no description given" not in shown.stdout


def test_it_starts_as_shipped(tmp_path: Path, observer: Any) -> None:
    log = tmp_path / "log"
    # Images are subscribed to, in the way their publishers offer them, once there is one.
    observer.create_publisher(Image, "/image", 10)
    with launched(log) as process:
        wait_for(lambda: "/image" in subscriptions(observer, "/"), process, log)
        assert {"/camera_info", "/odom"} <= subscriptions(observer, "/")
    assert process.returncode == 0, log.read_text()
    assert "process has finished cleanly" in log.read_text()


def test_arguments_override_the_parameter_file(tmp_path: Path, observer: Any) -> None:
    params_file = tmp_path / "params.yaml"
    # Under the node's full name, which is more specific than what an override is under.
    params_file.write_text(
        "/robot1/loop_closure:\n"
        "  ros__parameters:\n"
        "    top_k: 7\n"
        "    use_sim_time: true\n"
        "    backend: openvino\n"
        "    database_path: /from/the/file.db\n"
    )
    log = tmp_path / "log"
    database = tmp_path / "map.db"
    observer.create_publisher(CompressedImage, "/front/image_raw/compressed", 10)
    observer.create_publisher(Image, "/front/depth", 10)
    with launched(
        log,
        "namespace:=robot1",
        f"params_file:={params_file}",
        f"database_path:={database}",
        "backend:=onnxruntime",
        "image_topic:=/front/image_raw/compressed",
        "camera_info_topic:=/front/camera_info",
        "odom_topic:=odometry/filtered",
        "depth_topic:=/front/depth",
        "robot_id:=4",
        "log_level:=debug",
    ) as process:
        expected = {
            "/front/image_raw/compressed",
            "/front/camera_info",
            "/robot1/odometry/filtered",
            "/front/depth",
        }
        wait_for(lambda: expected <= subscriptions(observer, "/robot1"), process, log)
        names = ["top_k", "use_sim_time", "backend", "database_path", "image_transport", "robot_id"]
        values = parameters(observer, "/robot1/loop_closure", names)
        assert values == [7, True, "onnxruntime", str(database), "compressed", 4]
    assert process.returncode == 0, log.read_text()


def test_the_pose_graph_runs_beside_the_node(tmp_path: Path, observer: Any) -> None:
    pytest.importorskip("gtsam", reason="no GTSAM: pip install -r requirements/backend.txt")
    params_file = tmp_path / "params.yaml"
    params_file.write_text(
        "/**:\n  ros__parameters:\n    top_k: 7\n"
        "/**/pose_graph:\n  ros__parameters:\n    map_frame: world\n"
    )
    log = tmp_path / "log"
    with launched(
        log,
        "pose_graph:=true",
        "namespace:=robot1",
        "odom_topic:=wheels",
        f"params_file:={params_file}",
        "use_sim_time:=true",
    ) as process:
        expected = {"/robot1/wheels", "/robot1/loop_closures"}
        wait_for(lambda: expected <= subscriptions(observer, "/robot1", "pose_graph"), process, log)
        wait_for(lambda: "/robot1/wheels" in subscriptions(observer, "/robot1"), process, log)
        names = ["map_frame", "use_sim_time"]
        assert parameters(observer, "/robot1/pose_graph", names) == ["world", True]
        assert parameters(observer, "/robot1/loop_closure", ["top_k"]) == [7]
    assert process.returncode == 0, log.read_text()
    assert log.read_text().count("process has finished cleanly") == 2


def test_two_robots_hear_each_other(tmp_path: Path, observer: Any) -> None:
    log = tmp_path / "log"
    for robot in ("left", "right"):
        observer.create_publisher(Image, f"/{robot}/image", 10)
    arguments = ("first:=left", "second:=right", f"database_folder:={tmp_path}")
    with launched(log, *arguments, file="two_robots.launch.py") as process:
        for robot, other in (("left", "right"), ("right", "left")):
            expected = {f"/{robot}/image", f"/{other}/keyframes"}
            wait_for(
                lambda robot=robot, expected=expected: (  # type: ignore[misc]
                    expected <= subscriptions(observer, f"/{robot}")
                ),
                process,
                log,
            )
        found = [
            parameters(observer, f"/{robot}/loop_closure", ["robot_id", "database_path"])
            for robot in ("left", "right")
        ]
        assert found == [[1, str(tmp_path / "left.db")], [2, str(tmp_path / "right.db")]]
    assert process.returncode == 0, log.read_text()


def test_without_autostart_it_waits_for_a_manager(tmp_path: Path, observer: Any) -> None:
    from lifecycle_msgs.srv import GetState

    log = tmp_path / "log"
    with launched(log, "autostart:=false") as process:
        client = observer.create_client(GetState, "/loop_closure/get_state")
        wait_for(client.service_is_ready, process, log)
        answer = client.call_async(GetState.Request())
        executor = rclpy.executors.SingleThreadedExecutor(context=observer.context)
        executor.add_node(observer)
        executor.spin_until_future_complete(answer, timeout_sec=PATIENCE_S)
        executor.shutdown()
        assert answer.result().current_state.label == "unconfigured"
    assert process.returncode == 0, log.read_text()


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("params_file:=/nowhere/params.yaml", "/nowhere/params.yaml: there is no such file"),
        ("use_sim_time:=perhaps", "use_sim_time:=perhaps: expected true or false"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, argument: str, complaint: str) -> None:
    log = tmp_path / "log"
    with launched(log, argument) as process:
        process.wait(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert complaint in log.read_text()
