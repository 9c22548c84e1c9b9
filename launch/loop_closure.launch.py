"""Start the loop closure node.

    ros2 launch vpr_lite_ros loop_closure.launch.py image_topic:=/camera/image_raw

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
NODE_NAME = "loop_closure"
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
    ("log_level", "info", "Of the node: debug, info, warn, error or fatal."),
)


def _path(text: str) -> str:
    # No shell expands the ~ of `database_path:=~/map.db`.
    return str(Path(text).expanduser()) if text else ""


def _remappings(arguments: dict[str, str]) -> list[tuple[str, str]]:
    """From the topics' names in the node to those that were asked for."""
    names = ("image", "camera_info", "odom", "other_keyframes")
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


def start_node(context: LaunchContext) -> list[Node]:
    """The node, once the arguments have their values."""
    arguments = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    params_file = _path(arguments["params_file"])
    if not Path(params_file).is_file():
        raise FileNotFoundError(f"params_file:={params_file}: there is no such file")
    # A full name of a compressed topic says the transport, too.
    if arguments["image_topic"].endswith(COMPRESSED):
        arguments["image_topic"] = arguments["image_topic"].removesuffix(COMPRESSED)
        arguments["image_transport"] = arguments["image_transport"] or "compressed"

    namespace = arguments["namespace"].strip("/")
    # For the node's own logger: at debug, everything else in the process drowns it.
    logger = ".".join(filter(None, [*namespace.split("/"), NODE_NAME]))
    return [
        Node(
            package="vpr_lite_ros",
            executable="loop_closure_node",
            name=NODE_NAME,
            namespace=namespace,
            parameters=[params_file, _overrides(arguments)],
            remappings=_remappings(arguments),
            ros_arguments=["--log-level", f"{logger}:={arguments['log_level']}"],
            output="screen",
            emulate_tty=True,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, then start the node with those that were given."""
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start_node)])
