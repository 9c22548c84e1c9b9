#!/usr/bin/env bash
# TensorRT's own Python bindings, of several releases, to import where TensorRT is not installed:
# test/test_tensorrt.py asks them which names and signatures there are. Each is a wheel of 1 MB;
# the libraries behind it are replaced by empty ones. Without network, compiler or wheels for this
# machine nothing is made, and the test says so.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh || exit 1

make_release() {  # PACKAGE RELEASE
    local folder="build/tensorrt/$2"
    [ -e "$folder/made" ] && return
    rm -rf "$folder" && mkdir -p "$folder/lib"
    pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --dest "$folder" "$1==$2" || return 1
    python -m zipfile -e "$folder"/*.whl "$folder" || return 1
    for library in nvinfer nvonnxparser nvinfer_plugin; do
        local name="lib$library.so.${2%%.*}"
        cc -shared -fPIC -Wl,-soname,"$name" -o "$folder/lib/$name" scripts/tensorrt_symbols.c ||
            return 1
    done
    touch "$folder/made"
}

make_release tensorrt-cu12-bindings 10.0.1 &&
    make_release tensorrt-cu12-bindings 10.16.1.11 &&
    make_release tensorrt-cu13-bindings 11.4.0.106 ||
    echo 'warning: no TensorRT bindings: test/test_tensorrt.py will skip what needs them' >&2
exit 0
