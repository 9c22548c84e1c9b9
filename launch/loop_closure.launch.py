"""Start the loop closure node.

    ros2 launch vpr_lite_ros loop_closure.launch.py image_topic:=/camera/image_raw

With `pose_graph:=true` the pose graph runs beside it, in the same namespace and on the same
odometry, and corrects the map by what the node finds; it needs requirements/backend.txt.

Parameters come from `params_file`; an argument given on the command line overrides it, an
argument left out does not. Run it once per camera, each under a namespace of its own.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHIPPED_PARAMETERS = Path(get_package_share_directory("vpr_lite_ros")) / "config" / "vpr_lite.yaml"
NODE_NAME, POSE_GRAPH_NAME = "loop_closure", "pose_graph"
COMPRESSED = "/compressed"

# Name, default, description. An empty argument leaves the topic or parameter as it is.
ARGUMENTS = (
    ("namespace", "", "Namespace of the node and of its relative topics, e.g. robot1."),
    ("params_file", str(SHIPPED_PARAMETERS), "YAML file with the node's parameters."),
    ("image_topic", "", "Camera images. Empty: `image` in the namespace."),
    (
        "image_transport",
        "",
        "raw, or compressed to read <image_topic>/compressed. Empty: as in params_file.",
    ),
    ("camera_info_topic", "", "Camera calibration. Empty: `camera_info` in the namespace."),
    (
        "depth_topic",
        "",
        "Depth images in register with the camera's (16UC1 or 32FC1), so that closures are in "
        "metres, e.g. /camera/aligned_depth_to_color/image_raw. Empty: `depth` in the namespace.",
    ),
    ("odom_topic", "", "Odometry. Empty: `odom` in the namespace."),
    (
        "other_keyframes_topic",
        "",
        "Keyframes of other robots, so that their places are recognised, too, e.g. "
        "/robot2/keyframes. Empty: `other_keyframes` in the namespace.",
    ),
    ("robot_id", "", "Number of this robot, another one for each. Empty: as in params_file."),
    ("database_path", "", "File that keeps the keyframes. Empty: as in params_file."),
    ("bundle", "", "Folder of the model bundle. Empty: as in params_file."),
    ("backend", "", "What runs the networks, e.g. openvino. Empty: as in params_file."),
    (
        "use_sim_time",
        "",
        "true to take the time from /clock (simulators, bags played with --clock). "
        "Empty: as in params_file.",
    ),
    (
        "autostart",
        "",
        "false: a lifecycle manager configures and activates the node. Empty: as in params_file.",
    ),
    (
        "pose_graph",
        "false",
        "true: also start the pose graph: it publishes the corrected `path` and map to odom. Its "
        "parameters go into params_file, too, under /**/pose_graph.",
    ),
    ("log_level", "info", "Of the node: debug, info, warn, error or fatal."),
)


def _path(text: str) -> str:
    # No shell expands the ~ of `database_path:=~/map.db`.
    return str(Path(text).expanduser()) if text else ""


def _remappings(arguments: dict[str, str]) -> list[tuple[str, str]]:
    """From the topics' names in the node to those that were asked for."""
    names = ("image", "camera_info", "depth", "odom", "other_keyframes")
    topics = {name: arguments[f"{name}_topic"] for name in names}
    remappings = [(name, topic) for name, topic in topics.items() if topic]
    if topics["image"]:
        # A rule for `image` does not carry over to `image/compressed`.
        remappings.append((f"image{COMPRESSED}", topics["image"] + COMPRESSED))
    return remappings


def _switch(arguments: dict[str, str], name: str) -> str | bool:
    text = arguments[name].lower()
    if text not in ("", "true", "false", "1", "0"):
        raise ValueError(f"{name}:={text}: expected true or false")
    return text and text in ("true", "1")


def _overrides(arguments: dict[str, str]) -> dict[str, str | bool | int]:
    """The parameters that were given as arguments."""
    given: dict[str, str | bool | int] = {
        "image_transport": arguments["image_transport"],
        "backend": arguments["backend"],
        "database_path": _path(arguments["database_path"]),
        "bundle": _path(arguments["bundle"]),
    }
    for name in ("use_sim_time", "autostart"):
        given[name] = _switch(arguments, name)
    if arguments["robot_id"]:
        given["robot_id"] = int(arguments["robot_id"])
    return {name: value for name, value in given.items() if value != ""}


def start_nodes(context: LaunchContext) -> list[Node]:
    """The nodes, once the arguments have their values."""
    arguments = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    params_file = _path(arguments["params_file"])
    if not Path(params_file).is_file():
        raise FileNotFoundError(f"params_file:={params_file}: there is no such file")
    # A full name of a compressed topic says the transport, too.
    if arguments["image_topic"].endswith(COMPRESSED):
        arguments["image_topic"] = arguments["image_topic"].removesuffix(COMPRESSED)
        arguments["image_transport"] = arguments["image_transport"] or "compressed"

    namespace = arguments["namespace"].strip("/")
    overrides = _overrides(arguments)
    of_both = {name: value for name, value in overrides.items() if name == "use_sim_time"}
    nodes: dict[str, dict[str, str | bool | int]] = {NODE_NAME: overrides}
    if _switch(arguments, "pose_graph"):
        nodes[POSE_GRAPH_NAME] = of_both
    return [
        Node(
            package="vpr_lite_ros",
            executable=f"{name}_node",
            name=name,
            namespace=namespace,
            parameters=[params_file, values],
            remappings=_remappings(arguments),
            # For the node's own logger: at debug, everything else in the process drowns it.
            ros_arguments=["--log-level", f"{_logger(namespace, name)}:={arguments['log_level']}"],
            output="screen",
            emulate_tty=True,
        )
        for name, values in nodes.items()
    ]


def _logger(namespace: str, name: str) -> str:
    return ".".join(filter(None, [*namespace.split("/"), name]))


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, then start the nodes with those that were given."""
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start_nodes)])
