"""Mend what the ROS 2 wheels have wrong for this environment.

Their exported CMake targets name the include folders of Python and NumPy on the machine that
built them; this rewrites both to those of the interpreter that runs it. The wheel of cv_bridge,
unlike the real one, takes 16UC1 … 16UC4 for 8 bits and does not know yuv422. Running this again
changes nothing, unless Python or NumPy has changed: then it follows.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy as np

# Whole list entries of INTERFACE_INCLUDE_DIRECTORIES, whoever wrote them: the build
# machine or an earlier run of this script.
PYTHON_INCLUDE = re.compile(r'(?<=[;"])/[^;"]*/include/python3\.\d+(?=[;"])')
NUMPY_INCLUDE = re.compile(r'(?<=[;"])/[^;"]*/numpy/_?core/include(?=[;"])')


def fix_targets(share: Path, python_include: str, numpy_include: str) -> tuple[int, int]:
    """Rewrite the target files below `share`; return how many there are and how many changed."""
    files = sorted(share.glob("*/cmake/*__rosidl_generator_pyExport.cmake"))
    changed = 0
    for path in files:
        before = path.read_text()
        after = PYTHON_INCLUDE.sub(lambda _: python_include, before)
        after = NUMPY_INCLUDE.sub(lambda _: numpy_include, after)
        if after != before:
            path.write_text(after)
            changed += 1
    return len(files), changed


def fix_cv_bridge(file: Path) -> bool:
    """Mend the table of encodings in the wheel's `file`; return whether it had to be."""
    before = file.read_text()
    after = re.sub(r'("16UC(\d)": cv2\.)CV_8UC\d', r"\1CV_16UC\2", before)
    if '"yuv422":' not in after:
        names = "".join(f'    "{name}": cv2.CV_8UC2,\n' for name in ("yuv422", "yuv422_yuy2"))
        after = after.replace("_CV_TYPES = {\n", "_CV_TYPES = {\n" + names)
    if after != before:
        file.write_text(after)
    return after != before


def main() -> int:
    """Fix the environment of the running interpreter."""
    share = Path(sys.prefix) / "share"
    python_include = sysconfig.get_paths()["include"]
    if not (Path(python_include) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(
            f"error: no Python.h in {python_include}: the messages cannot be compiled. "
            f"Install Python's headers (Debian, Ubuntu: apt install python{version}-dev).",
            file=sys.stderr,
        )
        return 1
    found, changed = fix_targets(share, python_include, np.get_include())
    if found == 0:
        print(f"error: no ROS 2 wheels below {share}", file=sys.stderr)
        return 1
    cv_bridge = Path(sysconfig.get_paths()["purelib"]) / "cv_bridge/boost/cv_bridge_boost.py"
    if cv_bridge.is_file():  # the real one is compiled and has no such file
        fix_cv_bridge(cv_bridge)
    print(f"    {found} ROS 2 message packages checked, {changed} adapted to this Python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
