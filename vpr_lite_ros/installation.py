"""What is installed on this machine, and does the model run on it? As `doctor` sees it.

Whatever may crash (a binary built for another NumPy or another CPU, a broken middleware) is
tried in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from vpr_lite_ros import config
from vpr_lite_ros.doctor import number, ok, problem, warning
from vpr_lite_ros.health import Finding, Severity
from vpr_lite_ros.inference import (
    ALIKE_COSINE,
    TENSORRT,
    Bundle,
    BundleError,
    load_bundle,
)

PROBE_TIMEOUT_S = 120.0
NUMPY_1 = "compiled using NumPy 1.x"
"""What NumPy 2 says of a binary that it cannot run."""
PACKAGES = {
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "faiss": ("faiss-cpu", "faiss-gpu"),
    "rosbags": ("rosbags",),
}
"""What the library cannot do without, by the names it may be installed under."""


# -- software --------- -------------------------------------------------------------------------


def installation() -> Iterator[Finding]:
    """Python, CPU, packages, ROS."""
    version = platform.python_version()
    if sys.version_info[:2] > (3, 12):
        yield warning(
            "Python",
            f"{version}; this release is tested with 3.10 to 3.12",
            "If something fails, use a Python of that range.",
        )
    else:
        yield ok("Python", version)
    yield _cpu()
    for name, names in PACKAGES.items():
        yield _package(name, names)
    yield from _ros()


def _cpu() -> Finding:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return judge_cpu(platform.machine(), text, os.cpu_count() or 1)


def judge_cpu(machine: str, cpuinfo: str, cores: int) -> Finding:
    """What ``/proc/cpuinfo`` says of the instructions that networks run on."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    wanted = ("avx2", "fma", "f16c") if machine == "x86_64" else ("asimd",)
    extra = ("avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "asimdhp", "bf16", "i8mm")
    has = [name for name in (*wanted, *extra) if name in flags]
    seen = f"{machine}, {number(cores, 'core')}, {' '.join(has) or 'instruction set unknown'}"
    missing = [name for name in wanted if name not in flags]
    if flags and missing:
        return warning(
            "CPU",
            f"{seen}; lacks {', '.join(missing)}",
            "The networks will be several times slower. In a virtual machine, pass the host's "
            "CPU through; else use a GPU, or a longer keyframe.min_interval_s.",
        )
    return ok("CPU", seen)


def _package(name: str, names: tuple[str, ...]) -> Finding:
    found = [
        version if one == name else f"{version} ({one})"
        for one in names
        if (version := _version(one))
    ]
    module = {"opencv": "cv2"}.get(name, name)
    seen = ", ".join(found)
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # binaries that do not fit raise what they like
        return problem(
            name,
            f"{seen or 'not installed'}: {error}",
            f"Install it: pip install -r requirements/runtime.txt, or pip install {names[0]}.",
        )
    if len(found) > 1:
        return warning(
            name,
            f"installed {len(found)} times: {seen}",
            f"They overwrite each other's files: pip uninstall -y {' '.join(names)}; "
            f"pip install {names[0]}.",
        )
    return ok(name, seen or f"{getattr(imported, '__version__', 'of unknown version')}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _ros() -> Iterator[Finding]:
    if importlib.util.find_spec("rclpy") is None:
        sourced = os.environ.get("ROS_DISTRO")
        seen = "rclpy is not there: the node does not run here; the library and `replay` do"
        if not sourced:
            yield ok("ROS", seen)
            return
        yield problem(
            "ROS",
            f"{sourced} is sourced, but rclpy cannot be found by {sys.executable}",
            "Use the Python that this distribution was built for, with PYTHONPATH untouched.",
        )
        return
    answer = probe(_TRY_ROS)
    distribution = os.environ.get("ROS_DISTRO", "of unknown distribution")
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    if "rmw" not in answer:
        asked = os.environ.get("RMW_IMPLEMENTATION")
        yield problem(
            "ROS",
            f"{distribution}: rclpy does not start: {answer['error']}",
            f"RMW_IMPLEMENTATION is {asked}: install that middleware, or unset it."
            if asked
            else "Source the distribution's setup.bash in a fresh shell.",
        )
    else:
        yield ok("ROS", f"{distribution}, {answer['rmw']}, domain {domain}{_reach()}")
        if "messages" in answer:
            yield ok("messages", "vpr_lite_ros/msg and srv are built")
        else:
            yield problem(
                "messages",
                f"vpr_lite_ros.msg cannot be imported: {answer['no_messages']}",
                "Build the package with colcon (or make build) and source install/setup.bash.",
            )
    yield _cv_bridge()


def _reach() -> str:
    for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS"):
        if value := os.environ.get(name):
            return f", {name} {value}"
    return ""


def _cv_bridge() -> Finding:
    """The bridge from messages to pixels, whose binaries fit one major version of NumPy."""
    numpy = _version("numpy")
    if importlib.util.find_spec("cv_bridge") is None:
        return problem(
            "cv_bridge",
            "not installed: the node cannot read images",
            f"sudo apt install ros-{os.environ.get('ROS_DISTRO', '<distro>')}-cv-bridge",
        )
    answer = probe(_TRY_CV_BRIDGE)
    if answer.get("works"):
        return ok("cv_bridge", f"converts images, with NumPy {numpy}")
    seen = f"with NumPy {numpy} it fails: {answer['error']}"
    if int(numpy.partition(".")[0] or 0) >= 2:
        remedy = (
            "It was built for NumPy 1, as on Humble, Jazzy and Kilted: pip install 'numpy<2' "
            "'opencv-python-headless<4.12'"
        )
    else:
        remedy = (
            "Install the one of your distribution (ros-<distro>-cv-bridge) for the Python that "
            "runs here, and pip install -r requirements/runtime.txt"
        )
    return problem("cv_bridge", seen, remedy)


# -- model -------------------------------------------------------------------------------------


def model(bundle_path: Path, wanted: str, threads: int) -> Iterator[Finding]:
    """Does the bundle load, and does each backend that is here give a good answer?"""
    try:
        bundle = load_bundle(bundle_path)
    except BundleError as error:
        yield problem("bundle", str(error), "Leave `bundle` empty for the one that ships.")
        return
    width, height = bundle.image_size
    yield ok(
        "bundle",
        f"{bundle.model_id}, input {width}x{height}, {bundle.max_patches} patches, confidence "
        f"{'calibrated' if bundle.calibration else 'not calibrated'}",
    )
    names = [name for name in config.parameters()["backend"].choices if name != "auto"]
    answers = {name: _try_backend(bundle, name, threads) for name in names}
    works = {name: answer for name, answer in answers.items() if "ms" in answer}
    for name, answer in answers.items():
        needed = name == wanted or (not works and wanted == "auto")
        yield _judge_backend(name, answer, works, needed)


def _try_backend(bundle: Bundle, name: str, threads: int) -> dict[str, Any]:
    if name == TENSORRT:
        # Opening it would build its engines, which takes minutes.
        return probe(_TRY_TENSORRT)
    return probe(_TRY_MODEL, str(bundle.path), name, str(threads))


def _judge_backend(
    name: str, answer: dict[str, Any], works: dict[str, Any], needed: bool
) -> Finding:
    if "gpu" in answer:
        return ok(
            name,
            f"{answer['version']} on {answer['gpu']}; `vpr-lite build-engine` tries the model",
        )
    if "ms" not in answer:
        error = answer["error"]
        if answer.get("refused") and not needed:
            return ok(name, f"not here: {error}")
        return Finding(
            name,
            Severity.ERROR if needed else Severity.WARNING,
            error,
            "pip install openvino onnxruntime, or choose another `backend`.",
        )
    seen = (
        f"{answer['version']}, describes an image in {answer['ms']:.0f} ms, "
        f"opens in {answer['open_s']:.1f} s"
    )
    if not answer["finite"]:
        return problem(name, f"{seen}, but its answer is not finite", "Choose another `backend`.")
    reference = next(iter(works.values()))["descriptor"]
    cosine = sum(a * b for a, b in zip(reference, answer["descriptor"], strict=True))
    if not cosine >= ALIKE_COSINE:
        return problem(
            name,
            f"{seen}, but describes it otherwise than {next(iter(works))}: cosine {cosine:.4f}, "
            f"expected {ALIKE_COSINE}",
            "Update it, or choose another `backend`; do not share a database between the two.",
        )
    return ok(name, seen)


# -- processes of their own --------------------------------------------------------------------


def probe(program: str, *arguments: str, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """Run a program in another Python that finds the same modules; what it writes as JSON.

    ``error`` holds the reason if there is no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        # Imported from "/": the folder that the user stands in must not hide a package.
        start = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); sys.argv.pop(0)\n"
        command = [sys.executable, "-c", start + textwrap.dedent(program)]
        command += [json.dumps([str(Path(entry).resolve()) for entry in sys.path])]
        try:
            done = subprocess.run(
                [*command, str(answer), *arguments],
                cwd="/", capture_output=True, text=True, errors="replace", timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {timeout_s:g} s"}
        if done.returncode == 0 and answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
    if done.returncode < 0:
        return {"error": f"it crashes ({signal.Signals(-done.returncode).name})"}
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # NumPy's explanation comes first, and at the end a SystemError that explains nothing.
    telling = [line for line in lines if NUMPY_1 in line] + lines[-1:]
    return {"error": telling[0] if telling else f"exit code {done.returncode}"}


_TRY_ROS = """
    import rclpy
    rclpy.init()
    node = rclpy.create_node("vpr_lite_doctor")
    answer = {"rmw": rclpy.get_rmw_implementation_identifier()}
    node.destroy_node()
    rclpy.shutdown()
    try:
        from vpr_lite_ros.msg import LoopClosure
        answer["messages"] = str(LoopClosure().status)
    except Exception as error:
        answer["no_messages"] = str(error)
    with open(sys.argv[0], "w") as file:
        json.dump(answer, file)
"""
_TRY_CV_BRIDGE = """
    import numpy
    from cv_bridge import CvBridge
    bridge = CvBridge()
    picture = numpy.arange(48, dtype=numpy.uint8).reshape(4, 4, 3)
    message = bridge.cv2_to_imgmsg(picture, "rgb8")
    back = bridge.imgmsg_to_cv2(message, "passthrough")
    assert (numpy.asarray(back) == picture).all(), "pixels come back changed"
    with open(sys.argv[0], "w") as file:
        json.dump({"works": True}, file)
"""
_TRY_TENSORRT = """
    from vpr_lite_ros import inference
    try:
        import importlib.util
        for module in ("tensorrt", "pycuda"):
            if importlib.util.find_spec(module) is None:
                raise inference.BackendError(f"{module} is not installed")
        import tensorrt
        from vpr_lite_ros.tensorrt_runner import Gpu
        answer = {"version": tensorrt.__version__, "gpu": Gpu().name}
    except inference.BackendError as error:
        answer = {"error": str(error), "refused": True}
    with open(sys.argv[0], "w") as file:
        json.dump(answer, file)
"""
_TRY_MODEL = """
    import time
    from importlib import metadata
    from pathlib import Path
    import numpy
    from vpr_lite_ros import inference
    file, bundle, name, threads = sys.argv
    try:
        began = time.perf_counter()
        model = inference.open_model(Path(bundle), name, int(threads))
        opened = time.perf_counter()
        width, height = model.bundle.image_size
        # Stripes of all widths: any picture will do that is not flat.
        ramp = numpy.cumsum(numpy.linspace(0, 4, width)) % 256
        picture = numpy.repeat(numpy.tile(ramp, (height, 1))[:, :, None], 3, 2).astype("uint8")
        times = []
        for _ in range(4):
            start = time.perf_counter()
            description = model.describe(picture)
            times.append(time.perf_counter() - start)
        score, assignment = model.match(description.tokens, description.tokens[None])
        parts = (description.descriptor, description.tokens, score, assignment)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = model.backend
        answer = {
            "version": version,
            "open_s": opened - began,
            "ms": 1e3 * float(numpy.median(times[1:])),
            "finite": all(bool(numpy.isfinite(part).all()) for part in parts),
            # Those of all parts as one, of length 1.
            "descriptor": [
                float(value) / len(description.descriptor) ** 0.5
                for value in description.descriptor.ravel()
            ],
        }
    except inference.BackendError as error:
        answer = {"error": str(error), "refused": True}
    with open(file, "w") as out:
        json.dump(answer, out)
"""
