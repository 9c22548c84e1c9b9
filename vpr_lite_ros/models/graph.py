"""A bundle's graph in torch: the same operators, weights and precisions, on a CPU or an NVIDIA GPU.

On a GPU it is captured as a CUDA graph: a hundred small kernels are started as one. The node does
without (running a model never imports torch); the benchmark compares with it where TensorRT is
missing, and the tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor

from vpr_lite_ros.inference import Arrays, BackendError

Attributes = dict[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Any]

_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


class TorchRunner:
    """A graph in torch; see ``inference.Runner``.

    Parameters
    ----------
    graph
        ONNX file.
    device
        ``cpu`` or ``cuda``, as torch names it.

    Raises
    ------
    BackendError
        If the graph has an operator that this module does not know.
    """

    def __init__(self, graph: Path, device: str) -> None:
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self.backend = "torch, CUDA graphs" if on_gpu else "torch"
        model = onnx.load(graph).graph
        unknown = sorted({node.op_type for node in model.node} - set(_OPERATORS))
        if unknown:
            raise BackendError(f"{graph} has operators unknown here: {', '.join(unknown)}")
        self._nodes = [
            (
                _OPERATORS[node.op_type],
                list(node.input),
                list(node.output),
                {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute},
            )
            for node in model.node
        ]
        self._outputs = [output.name for output in model.output]
        on_host = _read_by_host(model)
        tensors = {one.name: numpy_helper.to_array(one).copy() for one in model.initializer}
        self._constants = {
            name: torch.from_numpy(tensor).to("cpu" if name in on_host else self._device)
            for name, tensor in tensors.items()
        }
        self._captured: dict[tuple[tuple[int, ...], ...], _Captured] = {}

    def infer(self, inputs: Arrays) -> Arrays:
        """Run the graph once; on a GPU, the first time with inputs of a shape captures it."""
        given = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
        if self._device.type != "cuda":
            return {name: tensor.numpy().copy() for name, tensor in self._run(given).items()}
        key = tuple(tuple(tensor.shape) for tensor in given.values())
        if key not in self._captured:
            self._captured[key] = _Captured(self._run, given, self._device)
        return self._captured[key].replay(given)

    @torch.inference_mode()
    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {**self._constants, **inputs}
        for operator, names, outputs, attributes in self._nodes:
            taken = [known[name] if name else None for name in names]
            made = operator(taken, attributes)
            made = made if isinstance(made, tuple) else (made,)
            known.update(zip(outputs, made, strict=False))
        return {name: known[name] for name in self._outputs}


def _read_by_host(graph: onnx.GraphProto) -> set[str]:
    """Tensors whose numbers say how to compute: shapes, axes, counts, and what they are made of."""
    found: set[str] = set()
    for node in reversed(graph.node):
        found.update(node.input[_FIRST_SETTING.get(node.op_type, len(node.input)) :])
        if node.op_type != "Shape" and not found.isdisjoint(node.output):
            found.update(node.input)
    return found


class _Captured:
    """A CUDA graph for inputs of one shape, with memory of its own."""

    def __init__(
        self,
        run: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        example: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        self._inputs = {name: tensor.to(device) for name, tensor in example.items()}
        self._pinned_inputs = {name: tensor.pin_memory() for name, tensor in example.items()}
        self._stream = torch.cuda.Stream(device)
        # What torch and its libraries do once only, they do here, outside of the graph.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                run(self._inputs)
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._outputs = run(self._inputs)
        self._pinned_outputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            for name, tensor in self._outputs.items()
        }

    def replay(self, inputs: dict[str, Tensor]) -> Arrays:
        with torch.cuda.stream(self._stream):
            for name, tensor in inputs.items():
                self._pinned_inputs[name].copy_(tensor)
                self._inputs[name].copy_(self._pinned_inputs[name], non_blocking=True)
            self._graph.replay()
            for name, tensor in self._outputs.items():
                self._pinned_outputs[name].copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        # The pinned memory is used again; what is returned belongs to the caller.
        return {name: tensor.numpy().copy() for name, tensor in self._pinned_outputs.items()}


# Operators as ONNX defines them (opset 18), as far as this package's graphs use them.

_FIRST_SETTING = {
    **dict.fromkeys(("Expand", "Reshape", "Slice", "TopK", "Unsqueeze"), 1),
    **dict.fromkeys(("ReduceL2", "ReduceMean", "ReduceSum"), 1),
}
"""From which input on the host must know the numbers."""


def _numbers(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.reshape(-1).tolist()
    return found


def _multiply(how: Callable[..., Tensor], *taken: Tensor, **settings: Any) -> Tensor:
    """Sums of products; on a CPU in float32, rounded at the end, as float16 is slow there."""
    if taken[0].dtype == torch.float16 and taken[0].device.type == "cpu":
        return how(*(one.float() for one in taken), **settings).half()
    return how(*taken, **settings)


def _reduce(how: Callable[..., Tensor]) -> Operator:
    def operator(taken: Sequence[Any], attributes: Attributes) -> Tensor:
        axes = _numbers(taken[1]) if len(taken) > 1 else list(range(taken[0].ndim))
        return how(taken[0], dim=axes, keepdim=bool(attributes.get("keepdims", 1)))

    return operator


def _conv(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    pads = attributes.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:] or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise BackendError(f"a convolution padded by {pads}")
    return _multiply(
        F.conv2d,
        *taken,
        stride=tuple(attributes.get("strides", [1, 1])),
        padding=tuple(pads[:2]),
        dilation=tuple(attributes.get("dilations", [1, 1])),
        groups=attributes.get("group", 1),
    )


def _average_pool(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    pads = attributes.get("pads", [0, 0, 0, 0])
    if any(pads) or attributes.get("ceil_mode", 0):
        raise BackendError(f"a pooling padded by {pads}, or past the edge")
    strides = attributes.get("strides", [1, 1])
    return F.avg_pool2d(taken[0], tuple(attributes["kernel_shape"]), tuple(strides))


def _gemm(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    if (attributes.get("alpha", 1), attributes.get("beta", 1)) != (1, 1):
        raise BackendError("a scaled matrix product")
    first = taken[0].T if attributes.get("transA", 0) else taken[0]
    second = taken[1] if attributes.get("transB", 0) else taken[1].T
    return _multiply(F.linear, first, second, *taken[2:])


def _layer_norm(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    shape = taken[0].shape[attributes.get("axis", -1) :]
    bias = taken[2] if len(taken) > 2 else None
    return F.layer_norm(taken[0], shape, taken[1], bias, attributes.get("epsilon", 1e-5))


def _slice(taken: Sequence[Any], _: Attributes) -> Tensor:
    data = taken[0]
    starts, ends, *rest = (_numbers(one) for one in taken[1:])
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = [slice(None)] * data.ndim
        cut[axis] = slice(start, end, step)
        data = data[tuple(cut)]
    return data


def _reshape(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    sides = _numbers(taken[1])
    if not attributes.get("allowzero", 0):
        sides = [side or taken[0].shape[axis] for axis, side in enumerate(sides)]
    return taken[0].reshape(sides)


def _unsqueeze(taken: Sequence[Any], _: Attributes) -> Tensor:
    data, axes = taken[0], _numbers(taken[1])
    for axis in sorted(axis % (data.ndim + len(axes)) for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _gather(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    data, index = taken
    axis = attributes.get("axis", 0) % data.ndim
    found = data.index_select(axis, index.reshape(-1))
    return found.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _gather_nd(taken: Sequence[Any], attributes: Attributes) -> Tensor:
    if attributes.get("batch_dims", 0):
        raise BackendError("GatherND by batches")
    return taken[0][tuple(taken[1].unbind(-1))]


def _top_k(taken: Sequence[Any], attributes: Attributes) -> tuple[Tensor, Tensor]:
    return torch.topk(
        taken[0],
        _numbers(taken[1])[0],
        dim=attributes.get("axis", -1),
        largest=bool(attributes.get("largest", 1)),
        sorted=bool(attributes.get("sorted", 1)),
    )


_OPERATORS: dict[str, Operator] = {
    "Add": lambda taken, _: taken[0] + taken[1],
    "AveragePool": _average_pool,
    "Cast": lambda taken, attributes: taken[0].to(_DTYPES[attributes["to"]]),
    "Clip": lambda taken, _: torch.clamp(taken[0], *taken[1:]),
    "Concat": lambda taken, attributes: torch.cat(list(taken), dim=attributes["axis"]),
    "Conv": _conv,
    "Div": lambda taken, _: taken[0] / taken[1],
    "Exp": lambda taken, _: taken[0].exp(),
    "Expand": lambda taken, _: taken[0].expand(
        torch.broadcast_shapes(taken[0].shape, _numbers(taken[1]))
    ),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda taken, _: _multiply(torch.matmul, *taken),
    "Mul": lambda taken, _: taken[0] * taken[1],
    "Pow": lambda taken, _: taken[0] ** taken[1],
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda taken, _: taken[0].relu(),
    "Reshape": _reshape,
    "Shape": lambda taken, attributes: torch.tensor(
        taken[0].shape[attributes.get("start", 0) : attributes.get("end")]
    ),
    "Slice": _slice,
    "Softmax": lambda taken, attributes: taken[0].softmax(dim=attributes.get("axis", -1)),
    "Sqrt": lambda taken, _: taken[0].sqrt(),
    "Sub": lambda taken, _: taken[0] - taken[1],
    "TopK": _top_k,
    "Transpose": lambda taken, attributes: taken[0].permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
