"""TensorRT without TensorRT: its real Python bindings say which calls there are, and nothing runs.

``python test/dry_tensorrt.py BUNDLE CASE [OLD NEW]`` runs the code that uses TensorRT against
stand-ins: each stands for an object of a class of the bindings, refuses what that class does not
have, and checks the arguments of each call against the signature that the bindings document.
With OLD and NEW, that text of the code is replaced first. pycuda is ``dry_pycuda.py``.

The bindings come from ``PYTHONPATH``, see scripts/tensorrt_bindings.sh.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import logging
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dry_pycuda
import numpy as np
import onnx
import tensorrt_bindings as real
from dry_pycuda import DeviceAllocation

USED: set[str] = set()
FAILS: set[str] = set()
"""Names of methods that answer None or False, and of classes of which none can be made."""
FREED: list[str] = []
"""Classes of the objects that are gone, in that order."""
KEPT: list[Any] = []
OF_THE_DEVICE = (real.IExecutionContext, real.ICudaEngine, real.Runtime)

SIGNATURE = re.compile(r"^(?:\d+\. )?\w+\((.*)\) -> (.+)$", re.MULTILINE)
DTYPES = {
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
}


def split(arguments: str) -> list[str]:
    """``a: dict[x, y], b: int`` at its outer commas."""
    depth, parts = 0, [""]
    for letter in arguments:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def class_of(name: str) -> type:
    found: Any = real
    for part in name.removeprefix("tensorrt_bindings.tensorrt.").split("."):
        found = getattr(found, part)
    return found


def fits(value: Any, kind: str) -> bool:
    plain: dict[str, Callable[[Any], bool]] = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "str": lambda v: isinstance(v, str),
        "bool": lambda v: isinstance(v, bool),
        "tuple": lambda v: isinstance(v, tuple),
        "list": lambda v: isinstance(v, list),
        "buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
    }
    plain |= {"typing.SupportsInt": plain["int"], "typing.SupportsIndex": plain["int"]}
    plain |= {"typing_extensions.Buffer": plain["buffer"]}
    if kind in plain:
        return plain[kind](value)
    wanted = class_of(kind)
    if wanted is real.Dims:  # made from a sequence of whole numbers
        return isinstance(value, (tuple, list)) and all(isinstance(side, int) for side in value)
    if isinstance(value, Dry):
        return issubclass(object.__getattribute__(value, "_real"), wanted)
    return isinstance(value, wanted)


def check(name: str, doc: str, given: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What the call returns, as its documentation says; TypeError if no signature fits."""
    signatures = SIGNATURE.findall(doc or "")
    if not signatures:
        raise TypeError(f"{name}: the bindings document no signature")
    for arguments, returned in signatures:
        expected = [part for part in split(arguments) if part not in ("*", "/")][1:]
        names = [part.split(":")[0].strip() for part in expected]
        kinds = [part.split(":", 1)[1].split("=")[0].strip() for part in expected]
        needed = {key for key, part in zip(names, expected, strict=True) if "=" not in part}
        values = dict(zip(names, given, strict=False)) | named
        complete = len(given) <= len(names) and needed <= set(values) <= set(names)
        kind_of = dict(zip(names, kinds, strict=True))
        if complete and all(fits(value, kind_of[key]) for key, value in values.items()):
            return str(returned.strip())
    raise TypeError(f"{name} does not take {given} {named}: {doc}")


class Dry:
    """Stands for an object of a class of the bindings."""

    def __init__(self, cls: type, **state: Any) -> None:
        object.__setattr__(self, "_real", cls)
        object.__setattr__(self, "state", state)

    def __getattr__(self, name: str) -> Any:
        cls = self._real
        if cls in OF_THE_DEVICE:
            dry_pycuda.called(f"{cls.__name__}.{name}")
        full = f"{cls.__name__}.{name}"
        found = getattr(cls, name)
        USED.add(full)
        answer = ANSWERS.get(full)
        if isinstance(found, property):
            return answer(self) if answer else self.state.get(name)

        def call(*given: Any, **named: Any) -> Any:
            returned = check(full, found.__doc__, given, named)
            if name in FAILS:
                return False if returned == "bool" else None
            if answer:
                return answer(self, *given, **named)
            if returned in ("bool", "None"):
                return True if returned == "bool" else None
            if returned in ("int", "str"):
                return 0 if returned == "int" else "text"
            made = real.ParserError if "IParserError" in returned else class_of(returned)
            return Dry(made)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        USED.add(f"{self._real.__name__}.{name}")
        found = getattr(self._real, name)
        if not isinstance(found, property) or found.fset is None:
            raise AttributeError(f"{self._real.__name__}.{name} cannot be set")
        self.state[name] = value

    def __del__(self) -> None:
        cls = object.__getattribute__(self, "_real")
        if cls in OF_THE_DEVICE:
            FREED.append(cls.__name__)
            dry_pycuda.called(f"freeing {cls.__name__}")

    def __bytes__(self) -> bytes:
        if self._real is not real.IHostMemory:
            raise TypeError(f"{self._real.__name__} has no bytes")
        return bytes(self.state.get("content", b"timings"))


class DryModule(types.ModuleType):
    """Stands for ``tensorrt``."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)
        USED.add(name)
        if found in (real.Builder, real.Runtime, real.OnnxParser):

            def make(*given: Any, **named: Any) -> Dry:
                check(name, found.__init__.__doc__, given, named)
                if name in FAILS:
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                return Dry(found, network=given[0])

            return make
        return found


# What must be known of a graph, so that the code finds what it would find.


def parse(parser: Dry, content: bytes) -> bool:
    parser.state["network"].state["graph"] = onnx.load_from_string(content).graph
    return True


def build(_: Dry, network: Dry, config: Dry) -> Dry:
    monitor = config.state["progress_monitor"]
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Tactics", "Building", 2)
    assert monitor.step_complete("Tactics", 0)
    assert monitor.step_complete("Building", 1)
    monitor.phase_finish("Tactics")
    monitor.phase_finish("Building")
    profiled = {name for name, *_ in config.state.get("shapes", [])}
    dynamic = {name for name, shape, *_ in tensors(network.state["graph"]) if -1 in shape}
    assert not (dynamic & {i.name for i in network.state["graph"].input}) - profiled
    text = network.state["graph"].SerializeToString()
    return Dry(real.IHostMemory, content=text)


def tensors(graph: Any) -> list[tuple[str, tuple[int, ...], str, bool]]:
    """(name, shape with -1 where it varies, data type, whether it goes in) of a graph."""
    found = []
    for values, goes_in in ((graph.input, True), (graph.output, False)):
        for value in values:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            found.append((value.name, shape, DTYPES[kind.elem_type], goes_in))
    return found


def tensor_of(graph: Any, name: str) -> tuple[str, tuple[int, ...], str, bool]:
    (found,) = [tensor for tensor in tensors(graph) if tensor[0] == name]
    return found


def deserialise(_: Dry, content: bytes) -> Dry:
    graph = onnx.GraphProto.FromString(bytes(content))
    return Dry(real.ICudaEngine, graph=graph)


def shape_now(execution: Dry, name: str) -> tuple[int, ...]:
    shape = tensor_of(execution.state["engine"], name)[1]
    assert -1 not in shape or "length" in execution.state, "the shape is not set yet"
    return tuple(execution.state["length"] if side < 0 else side for side in shape)


def set_input_shape(execution: Dry, name: str, shape: tuple[int, ...]) -> bool:
    execution.state["length"] = shape[0]
    return bool(shape_now(execution, name) == shape)


def bound(execution: Dry, tensor: tuple[str, tuple[int, ...], str, bool]) -> Any:
    """A tensor's numbers, where its address says that they are."""
    name, _, kind, _ = tensor
    dtype = np.dtype(real.nptype(getattr(real.DataType, kind)))
    shape = shape_now(execution, name)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = dry_pycuda.memory_at(execution.state["addresses"][name], size)
    return memory.view(dtype).reshape(shape)


def execute(execution: Dry, stream: int) -> bool:
    """Each output is the first input's first number, times 100, and the last one's, item by item.

    So it shows whether everything came from where it should, in time and whole.
    """
    found = tensors(execution.state["engine"])

    def work() -> None:
        ends = [bound(execution, one) for one in found if one[3]]
        numbers = sum(
            factor * end.reshape(len(end), -1)[:, 0].astype(np.float32)
            for factor, end in ((100, ends[0]), (1, ends[-1]))
        )
        for one in found:
            if not one[3]:
                out = bound(execution, one)
                out[...] = numbers.reshape(-1, *[1] * (out.ndim - 1))

    dry_pycuda.STREAMS[stream].waiting.append(work)
    return True


def set_address(execution: Dry, name: str, memory: int) -> bool:
    execution.state.setdefault("addresses", {})[name] = memory
    return True


def set_shape(profile: Dry, name: str, *shapes: tuple[int, ...]) -> None:
    profile.state.setdefault("shapes", []).append((name, *shapes))


def add_profile(config: Dry, profile: Dry) -> int:
    config.state["shapes"] = profile.state["shapes"]
    return 0


ANSWERS: dict[str, Callable[..., Any]] = {
    "OnnxParser.parse": parse,
    "OnnxParser.num_errors": lambda _: 2,
    "ParserError.desc": lambda _: "no such operator",
    "INetworkDefinition.num_inputs": lambda network: len(network.state["graph"].input),
    "INetworkDefinition.get_input": lambda network, index: Dry(
        real.ITensor,
        name=network.state["graph"].input[index].name,
        shape=tensors(network.state["graph"])[index][1],
    ),
    "IOptimizationProfile.set_shape": set_shape,
    "IBuilderConfig.add_optimization_profile": add_profile,
    "Builder.build_serialized_network": build,
    "Runtime.deserialize_cuda_engine": deserialise,
    "ICudaEngine.num_io_tensors": lambda engine: len(tensors(engine.state["graph"])),
    "ICudaEngine.get_tensor_name": lambda engine, index: tensors(engine.state["graph"])[index][0],
    "ICudaEngine.get_tensor_shape": lambda engine, name: tensor_of(engine.state["graph"], name)[1],
    "ICudaEngine.get_tensor_dtype": lambda engine, name: getattr(
        real.DataType, tensor_of(engine.state["graph"], name)[2]
    ),
    "ICudaEngine.get_tensor_mode": lambda engine, name: (
        real.TensorIOMode.INPUT
        if tensor_of(engine.state["graph"], name)[3]
        else real.TensorIOMode.OUTPUT
    ),
    # It does not keep its engine alive, as it does in C++.
    "ICudaEngine.create_execution_context": lambda engine: Dry(
        real.IExecutionContext, engine=engine.state["graph"]
    ),
    "IExecutionContext.set_input_shape": set_input_shape,
    "IExecutionContext.get_tensor_shape": shape_now,
    "IExecutionContext.set_tensor_address": set_address,
    "IExecutionContext.execute_async_v3": execute,
}


def install(source: Path, replacement: tuple[str, str] | None) -> None:
    """Put the stand-ins where imports find them."""
    dry_pycuda.install()
    module = DryModule("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    sys.modules["tensorrt"] = module
    if replacement:
        text = source.read_text()
        assert replacement[0] in text
        name = "vpr_lite_ros.tensorrt_runner"
        changed = types.ModuleType(name)
        sys.modules[name] = changed
        exec(compile(text.replace(*replacement), str(source), "exec"), changed.__dict__)


def tell_what_was_freed() -> None:
    print("freed", " ".join(FREED), "problems", dry_pycuda.PROBLEMS)


def say_where_is_written() -> None:
    write = Path.write_bytes

    def write_and_say(path: Path, content: Any) -> int:
        print("writes", path.suffix)
        return write(path, content)

    Path.write_bytes = write_and_say  # type: ignore[method-assign, assignment]


def main(bundle: Path, case: str, *replacement: str) -> None:
    """Print what was seen; the test reads it."""
    import vpr_lite_ros
    from vpr_lite_ros.inference import BackendError, open_model

    # Exit runs last what was registered first.
    atexit.register(tell_what_was_freed)
    say_where_is_written()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
    source = Path(vpr_lite_ros.__file__).parent / "tensorrt_runner.py"
    install(source, (replacement[0], replacement[1]) if replacement else None)
    FAILS.add(case)
    if case == "full":  # The first engine has room, the second has not.
        DeviceAllocation.most = 70_000
    print("release", real.__version__)
    try:
        model = open_model(bundle, "tensorrt", most_candidates=4, behind=case == "behind")
    except BackendError as error:
        print("refused", error)
        model = None
    if model is None:
        tell_what_is_kept()
        return
    if case == "behind":
        wait_for("change over")
        describe(model, 3)
        print("then", model.backend, model.fault)
        tell_what_is_kept()
        return
    use(model)
    again = open_model(bundle, "tensorrt", most_candidates=4)
    print("threads", [thread.name for thread in threading.enumerate()].count("gpu"))
    # The first is dropped, the second is there until the interpreter ends.
    KEPT.append(again)
    both = len(dry_pycuda.MEMORY)
    del model
    tell_what_is_kept()
    print("of", both, "on", again.backend)
    print("used", " ".join(sorted(USED)))


def wait_for(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join()


def tell_what_is_kept() -> None:
    """On the device and on the host, once the device's thread has nothing left to do."""
    gpu = sys.modules["vpr_lite_ros.tensorrt_runner"].__dict__["first_gpu"]
    if gpu.cache_info().currsize:
        gpu().run(lambda: None)
    print("kept", len(dry_pycuda.MEMORY), len(dry_pycuda.PINNED))


def describe(model: Any, colour: int) -> Any:
    width, height = model.bundle.image_size
    return model.describe(np.full((height, width, 3), colour, np.uint8))


def use(model: Any) -> None:
    """What comes out tells what went in, see ``execute``."""
    for colour in (3, 5):
        found = describe(model, colour)
        print("described", colour, float(found.descriptor[0, 0]), float(found.tokens[0, 0]))
    print("tokens", found.tokens.dtype, found.tokens.shape)
    candidates = np.zeros((10, *found.tokens.shape), np.float16)
    candidates += np.arange(10, dtype=np.float16)[:, None, None]
    query = np.full_like(found.tokens, 2)
    scores, assignment = model.match(query, candidates)
    alone, _ = model.match(query, candidates[:1])
    # Four at a time; what was returned before stays as it is.
    print("scores", scores.astype(int).tolist(), assignment.shape, assignment.dtype)
    print("one", alone.shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
