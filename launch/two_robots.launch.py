"""Start the node for two robots that recognise each other's places.

    ros2 launch vpr_lite_ros two_robots.launch.py first:=robot1 second:=robot2

Each node listens to `image`, `camera_info`, `depth` and `odom` in its robot's namespace, and to
the other's keyframes. The two may run on two computers that see each other's topics: then start
loop_closure.launch.py on each, with the arguments that this file passes.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

ONE_ROBOT = Path(get_package_share_directory("vpr_lite_ros")) / "launch/loop_closure.launch.py"

# Name, default, description.
ARGUMENTS = (
    ("first", "robot1", "Namespace of the robot with robot_id 1."),
    ("second", "robot2", "Namespace of the robot with robot_id 2."),
    (
        "database_folder",
        "",
        "Where <namespace>.db keeps each one's keyframes. Empty: gone when the nodes end.",
    ),
    ("image_transport", "", "raw or compressed, of both. Empty: as in the parameter file."),
    ("use_sim_time", "", "true to take the time from /clock."),
)


def start_nodes(context: LaunchContext) -> list[IncludeLaunchDescription]:
    """Both nodes, once the arguments have their values."""
    values = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    robots = [values[name].strip("/") for name in ("first", "second")]
    if robots[0] == robots[1] or not all(robots):
        raise ValueError(f"first:={robots[0]} second:={robots[1]}: two different names are needed")
    folder = values["database_folder"]
    return [
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(ONE_ROBOT)),
            launch_arguments={
                "namespace": robot,
                "robot_id": str(number),
                "other_keyframes_topic": f"/{other}/keyframes",
                "database_path": str(Path(folder).expanduser() / f"{robot}.db") if folder else "",
                "image_transport": values["image_transport"],
                "use_sim_time": values["use_sim_time"],
            }.items(),
        )
        for number, robot, other in ((1, *robots), (2, *reversed(robots)))
    ]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, then start a node for each robot."""
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start_nodes)])
