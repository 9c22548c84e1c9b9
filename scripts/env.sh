# Source this in bash to use what `make build` made: `source scripts/env.sh`.
# It activates .venv and the built package, and forgets any other ROS distribution that
# the shell had sourced, because two distributions in one process do not mix.
# With OVERLAY=0 the built package is left out.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ ! -x "$_root/.venv/bin/python" ]; then
    echo "error: $_root/.venv is missing: run 'make build' first" >&2
    return 1
fi

# A distribution's library path would be searched before the wheels' own libraries.
if [ -n "${AMENT_PREFIX_PATH:-}" ]; then
    unset LD_LIBRARY_PATH
fi
unset AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH PYTHONPATH PYTHONHOME
unset ROS_DISTRO ROS_VERSION ROS_PYTHON_VERSION RMW_IMPLEMENTATION
# Set by the wheels once they have set the library path, which may have been another's.
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE

export VIRTUAL_ENV="$_root/.venv"
case ":$PATH:" in
    *":$VIRTUAL_ENV/bin:"*) ;;
    *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;;
esac
hash -r
export AMENT_PREFIX_PATH="$VIRTUAL_ENV" CMAKE_PREFIX_PATH="$VIRTUAL_ENV"
export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3

if [ "${OVERLAY:-1}" != 0 ]; then
    if [ ! -f "$_root/install/setup.bash" ]; then
        echo "error: $_root/install is missing: run 'make build' first" >&2
        unset _root
        return 1
    fi
    source "$_root/install/setup.bash"
    # `python -m` and `python -c` in this folder would otherwise import the source tree,
    # which lacks the messages, in place of the built package (Python 3.11 and newer).
    export PYTHONSAFEPATH=1
fi
unset _root
