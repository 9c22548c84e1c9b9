"""Point the CMake targets of the ROS 2 wheels at this environment's headers.

The wheels' exported targets name the include folders of Python and NumPy on the machine
that built them. This rewrites both to those of the interpreter that runs it. Running it
again changes nothing, unless Python or NumPy has changed: then it follows.
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
    print(f"    {found} ROS 2 message packages checked, {changed} adapted to this Python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
