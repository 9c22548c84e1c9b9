"""Install the library and the `vpr-lite` command with pip, without ROS.

Within a ROS workspace colcon uses package.xml and CMakeLists.txt instead; they add the
messages and the node's executable.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirements of one file in requirements/, without the files that it includes."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


readme = ROOT / "README.md"

setup(
    long_description=readme.read_text() if readme.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["vpr_lite_ros", "vpr_lite_ros.*"]),
    package_data={"vpr_lite_ros": ["bundles/**/*.onnx", "bundles/**/*.yaml", "reporting/*.html"]},
    data_files=[
        ("share/vpr_lite_ros/config", sorted(map(str, Path("config").glob("*.yaml")))),
    ],
    install_requires=requirements("runtime"),
    extras_require={
        "backend": requirements("backend"),
        "openvino": requirements("openvino"),
        "train": requirements("train"),
    },
    entry_points={"console_scripts": ["vpr-lite = vpr_lite_ros.cli:main"]},
    zip_safe=False,
)
