#!/usr/bin/env bash
# Build the package with colcon against the ROS 2 of .venv, into build/colcon and install.
# Python files are installed as links, so only messages, CMake files and added or removed
# files call for a new build; otherwise this is instant.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
OVERLAY=0 source scripts/env.sh

mkdir -p build
exec 9>build/.build-lock && flock 9

# Where and with what: after a change of these, CMake's cache is of no use.
place=$(printf '%s\n' "$root" "$(cat .venv/.stamp-python .venv/.stamp-runtime)" | sha256sum)
# What: definitions by content, installed files by name.
inputs=$(
    cat CMakeLists.txt package.xml msg/*.msg srv/*.srv
    find vpr_lite_ros launch config scripts -type f -not -path '*/__pycache__/*' 2>/dev/null |
        LC_ALL=C sort
)
key=$(printf '%s\n' "$place" "$inputs" | sha256sum | cut -d' ' -f1)
[[ $(cat install/.stamp-build 2>/dev/null) == "$key" ]] && exit 0

if [[ $(cat build/colcon/.stamp-place 2>/dev/null) != "$place" ]]; then
    rm -rf build/colcon install
fi
mkdir -p build/colcon
echo "$place" >build/colcon/.stamp-place

echo "==> building vpr_lite_ros with colcon (first time: about a minute)"
# CMake refuses to export include folders below the source folder, and .venv/…/numpy is
# one. Seen through this link, the source folder is another.
mkdir -p build/src
ln -sfn ../.. build/src/vpr_lite_ros

if ! colcon --log-base log --log-level error build --symlink-install \
    --base-paths build/src --build-base build/colcon --install-base install \
    --event-handlers status- desktop_notification- --cmake-force-configure \
    --cmake-args -GNinja --no-warn-unused-cli \
    "-DPython3_EXECUTABLE=$VIRTUAL_ENV/bin/python" -DPython3_FIND_VIRTUALENV=ONLY \
    -DBUILD_TESTING=OFF; then
    # Compilers' words go to standard output, which colcon keeps to itself.
    tail -n 40 log/latest_build/vpr_lite_ros/stdout_stderr.log >&2 || true
    echo "error: the build failed; all of its output is in log/latest_build" >&2
    exit 1
fi
# What was installed as a link to a file that is gone by now.
find install -xtype l -delete
echo "$key" >install/.stamp-build
