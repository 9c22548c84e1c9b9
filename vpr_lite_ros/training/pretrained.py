"""A backbone that begins with the weights of others, or with those of a model bundle.

Two namings are known: the original one (``stage1.0.rbr_dense.conv.weight``; RepVGG-A0-train.pth
of its authors) and timm's (``stages.0.0.conv_kxk.conv.weight``), which this package uses too.
Both name the same tensors. RepVGG-lite ends before RepVGG-A0's last stage and has no classifier.

These networks saw images standardised by ImageNet's mean and deviation, this package's see each
image standardised by its own (``models.repvgg.standardise``): both of the order of one, so the
weights are a start, not a finished backbone.

A bundle holds the backbone and the clusters, too: so a model that ships can be trained further on
one's own places, or its projections be fitted to one's own images.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vpr_lite_ros.export import CheckpointError
from vpr_lite_ros.inference import PLACE_GRAPH
from vpr_lite_ros.models.repvgg import RepVGGLite, standardise

log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model")
_BRANCHES = {"rbr_dense": "conv_kxk", "rbr_1x1": "conv_1x1", "rbr_identity": "identity"}
_UNUSED = re.compile(r"(stage4|stages\.3|linear|head)\.")
"""The last stage and the classifier, in either naming."""
_FOLDED = re.compile(r"(^|\.)(rbr_reparam|reparam)\.")
_COUNTER = ".num_batches_tracked"
"""Counts batches; says nothing where batch norm averages with a fixed momentum, as here."""


@dataclass(frozen=True)
class Accounting:
    """What became of each entry of a checkpoint, by the checkpoint's own names."""

    used: tuple[str, ...]
    unused: tuple[str, ...]
    """Left out on purpose: last stage, classifier, batch counters, and what a wrapped
    checkpoint holds beside its weights (epoch, optimiser, …)."""


def load_pretrained(backbone: RepVGGLite, path: Path) -> Accounting:
    """Fill ``backbone`` with the weights of a RepVGG-A0 checkpoint.

    Parameters
    ----------
    backbone
        With its branches (not ``folded``). Untouched if the checkpoint is refused.
    path
        ``.safetensors``, else a file of ``torch.save`` that holds tensors only: a state dict, or
        one under ``state_dict`` or ``model``; names may begin with ``module.``. Or the folder of
        a model bundle, whose convolutions are taken apart into branches again.

    Raises
    ------
    CheckpointError
        If the file cannot be read, holds folded blocks, or if an entry is unknown, missing, of
        another shape or not finite; the message names the entries.
    """
    path = Path(path)
    content = _read_bundle(path) if path.is_dir() else _read(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no named tensors but a {type(content).__name__}: pass a state dict"
        )
    entries, beside = _unwrapped(content)
    folded = [name for name in entries if _FOLDED.search(name)]
    if folded:
        raise CheckpointError(
            f"{path} holds blocks folded for deployment ({_some(folded)}), which cannot be "
            "trained further: pass the training-time checkpoint, such as RepVGG-A0-train.pth"
        )
    own_state = backbone.state_dict()
    wanted = {name: tensor for name, tensor in own_state.items() if not name.endswith(_COUNTER)}
    weights: dict[str, Tensor] = {}
    used, unused, unexpected, misfits = [], list(beside), [], []
    for name, value in entries.items():
        own = _own_name(name)
        if _UNUSED.match(own) or (own.endswith(_COUNTER) and own in own_state):
            unused.append(name)
        elif own not in wanted or own in weights or not isinstance(value, Tensor):
            unexpected.append(name)
        elif value.shape != wanted[own].shape:
            shapes = f"{tuple(value.shape)} instead of {tuple(wanted[own].shape)}"
            misfits.append(f"{name} {shapes}")
        elif not value.isfinite().all():
            misfits.append(f"{name} not finite")
        else:
            weights[own] = value
            used.append(name)
    # A tensor of a wrong shape is there, if of no use: it is reported once.
    offered = {_own_name(name) for name in entries}
    missing = [name for name in wanted if name not in offered]
    found = {"unexpected": unexpected, "missing (in timm's names)": missing, "misfit": misfits}
    faults = [f"{fault}: {_some(names)}" for fault, names in found.items() if names]
    if faults:
        raise CheckpointError(
            f"{path} is no RepVGG-A0 checkpoint in the original or timm's names; "
            + "; ".join(faults)
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])
    named = [name for name in unused if not name.endswith(_COUNTER)]
    counters = len(unused) - len(named)
    log.info(
        "%s: %d tensors used; left out: %d batch counters and %s",
        *(path, len(used), counters, _some(named, limit=40)),
    )
    return Accounting(tuple(used), tuple(unused))


@torch.no_grad()
def restore_statistics(backbone: RepVGGLite, images: Tensor) -> None:
    """Make training mode compute what evaluation mode does.

    A bundle does not say what batch norm had measured. Here it measures ``images`` (B, 3, H, W),
    0…255, and takes its scale and offset along: in evaluation mode nothing changes, and training
    begins where that left off.
    """
    measured: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        measured[norm] = mean, variance

    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    was_training = backbone.training
    backbone.eval()(standardise(images.float()))
    backbone.train(was_training)
    for hook in hooks:
        hook.remove()
    for norm, (mean, variance) in measured.items():
        assert norm.running_mean is not None and norm.running_var is not None
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(slope * (mean - norm.running_mean))
        norm.weight.copy_(slope * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def read_clusters(folder: Path) -> dict[str, Tensor]:
    """The state of NetVLAD in the bundle at ``folder``: clusters and the patches' projection."""
    tensors, graph = _read_tensors(folder)
    state = {
        name.removeprefix("vlad."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vlad.")
    }
    if not {"centroids", "assign.bias", "pca.weight", "pca.bias"} <= state.keys():
        raise CheckpointError(f"{folder} is no model bundle: it has no clusters")
    # The exporter folds this one's transposition, and with it the name, away.
    for node in graph.node:
        factor = tensors.get(node.input[1]) if node.op_type == "MatMul" else None
        if factor is not None and factor.shape == state["centroids"].T.shape:
            return state | {"assign.weight": factor.T.contiguous()}
    raise CheckpointError(f"{folder} is no model bundle: nothing assigns cells to its clusters")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and running what else it holds is "
            "not safe: where you trust it, save its state dict alone, as .safetensors or with "
            "torch.save"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], onnx.GraphProto]:
    """All tensors of a bundle's place network by name, and its graph."""
    path = folder / PLACE_GRAPH
    try:
        graph = onnx.load(path).graph
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{folder} is no model bundle: {path}: {error}") from error
    tensors = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))
        for tensor in graph.initializer
    }
    return tensors, graph


def _read_bundle(folder: Path) -> dict[str, Any]:
    """The backbone of a bundle under ``state_dict``, the names of its other tensors beside it."""
    tensors, _ = _read_tensors(folder)
    prefix = "backbone."
    folded = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    # Names without a dot are constants of the graph.
    rest = {name: None for name in tensors if "." in name and not name.startswith(prefix)}
    return {"state_dict": unfolded(folded), **rest}


def unfolded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of ``RepVGGLite.folded``, its convolutions taken apart into branches again."""
    kernel = "conv.weight"
    entries: dict[str, Tensor] = {}
    for name in [name for name in state if name.endswith(kernel)]:
        block = name.removesuffix(kernel)
        entries |= _unfolded(block, state[name], state[f"{block}conv.bias"])
    return entries


def _unfolded(block: str, kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Branches of a block that add up to one convolution: one of many ways.

    Batch norms only add the bias, which in evaluation mode is the same.
    """
    width = len(bias)
    kernel, middle = kernel.clone(), kernel[:, :, 1, 1]
    scales = {"conv_kxk.bn": bias, "conv_1x1.bn": torch.zeros(width)}
    # The first block of a stage halves the resolution and has no identity.
    if not re.fullmatch(r"stem\.|stages\.\d+\.0\.", block):
        scales["identity"] = torch.zeros(width)
        middle = middle - torch.eye(width)
    kernel[:, :, 1, 1] = middle / 2
    entries = {"conv_kxk.conv.weight": kernel, "conv_1x1.conv.weight": middle[:, :, None, None] / 2}
    for norm, offset in scales.items():
        entries[f"{norm}.weight"] = torch.ones(width)
        entries[f"{norm}.bias"] = offset
        entries[f"{norm}.running_mean"] = torch.zeros(width)
        entries[f"{norm}.running_var"] = torch.full((width,), 1 - nn.BatchNorm2d(1).eps)
        entries[f"{norm}{_COUNTER}"] = torch.tensor(0)
    return {block + name: tensor for name, tensor in entries.items()}


def _unwrapped(content: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict within ``content``, and the names of what lies beside it."""
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            entries, beside = _unwrapped(content[wrapper])
            return entries, [str(key) for key in content if key != wrapper] + beside
    return {str(name): value for name, value in content.items()}, []


def _own_name(name: str) -> str:
    """What this package calls a tensor of a checkpoint."""
    name = name.removeprefix("module.")
    name = re.sub(r"^stage0\.", "stem.", name)
    # The last stage keeps its name: it is left out.
    name = re.sub(r"^stage([123])\.", lambda m: f"stages.{int(m[1]) - 1}.", name)
    return ".".join(_BRANCHES.get(part, part) for part in name.split("."))


def _some(names: Iterable[str], limit: int = 12) -> str:
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "nothing") + rest
