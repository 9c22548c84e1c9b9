"""Both graphs on an NVIDIA GPU: engines made by TensorRT, memory and streams by pycuda.

The only module that imports either; it works with TensorRT 10 and 11. An engine belongs to one
graph, one release of TensorRT and one kind of GPU: its file name says which, so that another
builds its own. Precision is the graph's affair: the network is strongly typed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import queue
import re
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycuda.driver as cuda
import tensorrt as trt
from numpy.typing import NDArray

from vpr_lite_ros.inference import Arrays, BackendError

log = logging.getLogger(__name__)

_WORKSPACE_BYTES = 1 << 30
"""What a layer may use while it runs; robots' GPUs share their memory with the CPU."""
_MAGIC = b"vpr-lite engine 1\n"

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with (phase, step, steps) while an engine is built."""


def engine_folder() -> Path:
    """Where engines and timing caches are kept; made when something is written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vpr_lite_ros" / "engines"


class _Log(trt.ILogger):
    """TensorRT's messages among ours; what it calls information is for its developers."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.last_error = ""

    def log(self, severity: Any, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.last_error = msg
            log.error("TensorRT: %s", msg)
        elif severity == trt.ILogger.Severity.WARNING:
            log.warning("TensorRT: %s", msg)
        else:
            log.debug("TensorRT: %s", msg)


class _Monitor(trt.IProgressMonitor):
    """Passes on the outermost phase of a build."""

    def __init__(self, progress: Progress, stopping: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress, self._stopping, self._steps = progress, stopping, 0
        self._outermost: str | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            self._outermost, self._steps = phase_name, num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Whether to go on."""
        if phase_name == self._outermost:
            self._progress(phase_name, step + 1, self._steps)
        return not self._stopping.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """Its last step has been told."""


class Gpu:
    """One CUDA device, and the only thread that talks to it.

    Raises
    ------
    BackendError
        If there is no such device, or TensorRT cannot use it.
    """

    def __init__(self, number: int = 0) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gpu", daemon=True)
        self._thread.start()
        self._engines: list[_Engine] = []
        self.logger, self.stopping = _Log(), threading.Event()
        try:
            self.name = self.run(lambda: self._begin(number))
        except (cuda.Error, BackendError) as error:
            self._jobs.put(None)
            raise BackendError(f"no NVIDIA GPU can be used: {error}") from error
        # Before the interpreter takes modules apart: CUDA objects must go in this thread.
        atexit.register(self.close)

    def run(self, job: Callable[[], Result]) -> Result:
        """Do something on the device's thread, and wait for it."""
        done: Future[Result] = Future()
        self._jobs.put((job, done))
        try:
            return done.result()
        finally:
            # Else an error's traceback and this would keep each other, and engines, alive.
            del done

    def adopt(self, engine: Any, most: int) -> _Engine:
        """Make an engine ready to run (on the device's thread)."""
        ready = _Engine(engine, most, self)
        self._engines.append(ready)
        return ready

    def release(self, engine: _Engine) -> None:
        """Free an engine when the thread has time; does not wait, as any thread may drop one."""
        self._jobs.put((partial(self._release, engine), Future()))

    def close(self) -> None:
        """Stop a build, and free everything, engines first; more than once is fine."""
        if not self._thread.is_alive():
            return
        self.stopping.set()
        self.run(self._end)
        self._jobs.put(None)
        self._thread.join()

    # -- on the device's thread ----------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, done = job
            try:
                done.set_result(function())
            except BaseException as error:
                # What its frames hold goes in this thread, and now.
                traceback.clear_frames(error.__traceback__)
                done.set_exception(error)
            # While it waits for the next job, it keeps nothing of this one alive.
            del job, function, done

    def _begin(self, number: int) -> str:
        cuda.init()
        device = cuda.Device(number)
        # The primary context: the one that everything else in this process uses, too.
        self._context = device.retain_primary_context()
        self._context.push()
        try:
            self.stream = cuda.Stream()
            self.runtime = _made(trt.Runtime, self.logger)
        except BaseException:
            self._leave()
            raise
        return str(device.name())

    def _release(self, engine: _Engine) -> None:
        self._engines.remove(engine)
        engine.free()

    def _end(self) -> None:
        while self._engines:
            self._engines.pop().free()
        del self.runtime
        self._leave()

    def _leave(self) -> None:
        self.__dict__.pop("stream", None)
        self._context.pop()
        self._context.detach()


@functools.cache
def first_gpu() -> Gpu:
    """The same for all models of this process."""
    return Gpu()


class _Engine:
    """An engine with room for its inputs and outputs, at their largest.

    Belongs to the device's thread: nobody else calls it, or frees it.
    """

    def __init__(self, engine: Any, most: int, gpu: Gpu) -> None:
        self._gpu, self._engine = gpu, engine
        self._inputs: list[str] = []
        self.dynamic: set[str] = set()
        """Inputs whose first axis may be of any length up to ``most``."""
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        self._execution = engine.create_execution_context()
        try:
            if self._execution is None:
                raise BackendError(
                    f"no GPU memory is left for the engine ({gpu.logger.last_error}): free some, "
                    "or use the CPU"
                )
            for index in range(engine.num_io_tensors):
                self._make_room(engine.get_tensor_name(index), most)
        except BaseException:
            self.free()
            raise

    def _make_room(self, name: str, most: int) -> None:
        shape = tuple(self._engine.get_tensor_shape(name))
        if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            self._inputs.append(name)
            if -1 in shape:
                self.dynamic.add(name)
        largest = tuple(most if side < 0 else side for side in shape)
        dtype = trt.nptype(self._engine.get_tensor_dtype(name))
        self._host[name] = cuda.pagelocked_empty(largest, dtype)
        self._device[name] = cuda.mem_alloc(self._host[name].nbytes)
        if not self._execution.set_tensor_address(name, int(self._device[name])):
            raise BackendError(f"the engine has no {name}: {self._gpu.logger.last_error}")

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        # The query's tokens, which the other engine has just made, could stay on the device. That
        # would spare 0.4 MB of copying in, reckoned at 20 µs over PCIe 4 and 10 µs into the pinned
        # buffer; ten candidates are 4 MB in and 6 MB out, so 4 % of what a match copies, and
        # nothing of what it computes. Too little for two engines that know of each other.
        stream, execution = self._gpu.stream, self._execution
        for name in self._inputs:
            array = inputs[name]
            host = self._host[name][: len(array)]
            host[...] = array
            cuda.memcpy_htod_async(self._device[name], host, stream)
            if name in self.dynamic and not execution.set_input_shape(name, host.shape):
                raise ValueError(f"the engine does not take {name} of shape {host.shape}")
        if not execution.execute_async_v3(stream.handle):
            raise RuntimeError(f"the engine did not run: {self._gpu.logger.last_error}")
        out = {}
        for name in self._host:
            if name not in self._inputs:
                length = execution.get_tensor_shape(name)[0]
                out[name] = self._host[name][:length]
                cuda.memcpy_dtoh_async(out[name], self._device[name], stream)
        stream.synchronize()
        # The pinned memory is used again; what is returned belongs to the caller.
        return {name: array.copy() for name, array in out.items()}

    def free(self) -> None:
        self._execution = None
        self._engine = None
        for memory in self._device.values():
            memory.free()
        self._device.clear()
        self._host.clear()


class TensorRtRunner:
    """A graph as a TensorRT engine, which is freed with this object.

    Parameters
    ----------
    graph
        ONNX file.
    most
        Largest size of the dynamic axis, if the graph has one: more is run in parts.
    progress
        Told of a build, which takes minutes and happens if there is no engine to read.

    Raises
    ------
    BackendError
        If the engine cannot be built, or the GPU has no room for it.
    """

    backend = "tensorrt"

    def __init__(self, gpu: Gpu, graph: Path, most: int, progress: Progress) -> None:
        self._gpu, self._most = gpu, most
        file = engine_file(graph, gpu.name, most)
        try:
            self._engine = gpu.run(
                lambda: _load(file, gpu, most) or _build(graph, file, gpu, most, progress)
            )
        except cuda.Error as error:
            raise BackendError(f"{gpu.name} has no room for {graph.name}: {error}") from error
        weakref.finalize(self, gpu.release, self._engine).atexit = False  # Gpu.close sees to that

    def infer(self, inputs: Arrays) -> Arrays:
        """Run the graph; in parts, if the dynamic axis is longer than the engine takes."""
        dynamic = [name for name in inputs if name in self._engine.dynamic]
        length = len(inputs[dynamic[0]]) if dynamic else 1
        parts = []
        for start in range(0, length, self._most):
            cut = {name: inputs[name][start : start + self._most] for name in dynamic}
            part = {**inputs, **cut}
            parts.append(self._gpu.run(partial(self._engine.infer, part)))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _load(file: Path, gpu: Gpu, most: int) -> _Engine | None:
    """The engine's file, if it is there, whole, and of this release and device."""
    payload = _read(file)
    if payload is None:
        return None
    engine = gpu.runtime.deserialize_cuda_engine(payload)
    if engine is None:
        log.warning("%s cannot be used here (%s): building anew", file, gpu.logger.last_error)
        return None
    return gpu.adopt(engine, most)


def _build(graph: Path, file: Path, gpu: Gpu, most: int, progress: Progress) -> _Engine:
    log.info("building %s for %s: takes minutes, once", file.name, gpu.name)
    began = time.monotonic()
    payload = _serialised(graph, gpu, most, progress)
    _write(file, payload)
    log.info("built %s in %.0f s", file, time.monotonic() - began)
    engine = gpu.runtime.deserialize_cuda_engine(payload)
    if engine is None:
        raise BackendError(
            f"TensorRT cannot read its own engine of {graph}: {gpu.logger.last_error}"
        )
    return gpu.adopt(engine, most)


def _made(kind: Callable[..., Any], *arguments: Any) -> Any:
    """An object of TensorRT's; its bindings say TypeError where the library made none."""
    try:
        return kind(*arguments)
    except TypeError as error:
        raise BackendError(f"TensorRT {trt.__version__} does not start: {error}") from error


def engine_file(graph: Path, gpu_name: str, most: int) -> Path:
    """Where the engine of a graph is kept: its name tells graph, release, GPU and size."""
    content = hashlib.sha256(graph.read_bytes()).hexdigest()[:12]
    name = f"{graph.stem}-{content}-{most}-{_release_and_gpu(gpu_name)}.engine"
    return engine_folder() / name


def _release_and_gpu(gpu_name: str) -> str:
    return f"trt{trt.__version__}-{re.sub(r'[^A-Za-z0-9]+', '_', gpu_name)}"


def _serialised(graph: Path, gpu: Gpu, most: int, progress: Progress) -> bytes:
    builder = _made(trt.Builder, gpu.logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = _made(trt.OnnxParser, network, gpu.logger)
    if not parser.parse(graph.read_bytes()):
        faults = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BackendError(f"TensorRT {trt.__version__} does not understand {graph}: {faults}")
    config = builder.create_builder_config()
    # TF32, TensorRT's default for what is float32, is left on: on this package's bundle it moves
    # descriptors by less than 1e-6 and tokens by less than 3e-4 (cosine), as float16 does.
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    monitor = _Monitor(progress, gpu.stopping)
    config.progress_monitor = monitor
    timings = engine_folder() / f"{_release_and_gpu(gpu.name)}.timings"
    # Kept timings may be of another driver: an empty cache always fits.
    for kept in (_read(timings) or b"", b""):
        cache = config.create_timing_cache(kept)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            break
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            fewest, usual = (
                tuple(length if side < 0 else side for side in shape) for length in (1, most)
            )
            profile = builder.create_optimization_profile()
            profile.set_shape(tensor.name, fewest, usual, usual)
            config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(
            f"TensorRT {trt.__version__} built no engine of {graph}: {gpu.logger.last_error}"
        )
    if (cache := config.get_timing_cache()) is not None:
        _write(timings, bytes(cache.serialize()))
    return bytes(engine)


def _read(file: Path) -> bytes | None:
    """What ``_write`` wrote; None if there is none, or if it is damaged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): made anew", file, error.strerror)
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    payload = content[head:]
    if content[:head] != _MAGIC + hashlib.sha256(payload).digest():
        # TensorRT does not check what it reads: a flipped bit may end the process.
        log.warning("%s is damaged: made anew", file)
        return None
    return payload


def _write(file: Path, payload: bytes) -> None:
    """Under another name first; where there is no room, nothing is kept."""
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        log.warning("%s is not kept (%s): it will be made again", file, error.strerror)
