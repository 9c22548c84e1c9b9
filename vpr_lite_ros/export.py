"""Networks to a model bundle: ``place.onnx``, ``match.onnx`` and ``model.yaml``.

The graphs say at each place in which precision it is computed, so that a GPU decides nothing:
convolutions and projections in float16, and in float32 what sums squares or takes exponentials.
A CPU computes float16 in float32, or in bfloat16 where it multiplies that.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import onnx
import torch
import yaml
from onnx import TensorProto
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vpr_lite_ros.inference import BUNDLE_FORMAT, CARD, MATCH_GRAPH, PLACE_GRAPH
from vpr_lite_ros.models.matcher import PairMatcher, without_idle_parts
from vpr_lite_ros.models.place import PlaceNetwork

OPSET = 18


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


def save_networks(
    path: Path, place: PlaceNetwork, match: PairMatcher, about: dict[str, Any]
) -> None:
    """Write both networks as one safetensors file; ``about`` says how they were trained."""
    tensors = {f"place.{k}": v.contiguous() for k, v in place.state_dict().items()}
    tensors |= {f"match.{k}": v.contiguous() for k, v in match.state_dict().items()}
    shape = {
        "image_size": list(place.image_size),
        "clusters": place.vlad.clusters,
        "dimension": place.vlad.dimension,
        "max_patches": place.max_patches,
    }
    meta = {"networks": json.dumps(shape), "about": json.dumps(about)}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=meta)
    temporary.replace(path)


def load_networks(
    path: Path, max_patches: int | None = None
) -> tuple[PlaceNetwork, PairMatcher, dict[str, Any]]:
    """Read what ``save_networks`` wrote; ``max_patches`` overrides the number of tokens kept.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or not such a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        shape, about = json.loads(meta["networks"]), json.loads(meta["about"])
        if max_patches is not None:
            shape["max_patches"] = max_patches
        place = PlaceNetwork(
            tuple(shape["image_size"]), shape["clusters"], shape["dimension"], shape["max_patches"]
        )
        match = PairMatcher(shape["dimension"])
        for network, prefix in ((place, "place."), (match, "match.")):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            network.load_state_dict(part, strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of the place and match networks: {error}. "
            "Pass the .safetensors file that `vpr-lite train` wrote"
        ) from error
    return place.eval(), match.eval(), about


def export_bundle(
    place: PlaceNetwork,
    match: PairMatcher,
    about: dict[str, Any],
    output: Path,
    *,
    name: str,
) -> Path:
    """Write a model bundle to the folder ``output``, replacing one that is there.

    The backbone's branches are folded into single convolutions: the same up to rounding, and
    faster. Attention that was not trained adds nothing, and is left out.

    Parameters
    ----------
    about
        What the model card says: training data, time, recommended thresholds.

    Raises
    ------
    ValueError
        If a weight overflows float16.
    FileExistsError
        If the folder holds something else.
    """
    place, match = without_idle_parts(place), without_idle_parts(match)
    place.backbone = place.backbone.folded()
    _halve(place)
    _halve(match)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        draft = Path(folder) / "bundle"
        draft.mkdir()
        _export_place(place.eval(), draft / PLACE_GRAPH)
        _export_match(match.eval(), place, draft / MATCH_GRAPH)
        card = {
            "format": BUNDLE_FORMAT,
            "name": name,
            "created": date.today().isoformat(),
            "image_size": list(place.image_size),
            "clusters": place.vlad.clusters,
            "dimension": place.vlad.dimension,
            "parts": len(place.parts),
            "max_patches": place.max_patches,
            "costs": {
                name: _costs(onnx.load(draft / graph), draft / graph)
                for name, graph in (("place", PLACE_GRAPH), ("match", MATCH_GRAPH))
            },
            **about,
            "sha256": {
                graph: hashlib.sha256((draft / graph).read_bytes()).hexdigest()
                for graph in (PLACE_GRAPH, MATCH_GRAPH)
            },
        }
        _write_card(draft, card)
        if output.exists():
            if not (output / CARD).exists():
                raise FileExistsError(
                    f"{output} exists and is no model bundle: choose another folder"
                )
            shutil.rmtree(output)
        shutil.move(draft, output)
    return output


def _costs(model: onnx.ModelProto, file: Path) -> dict[str, int]:
    """Parameters, multiplications with additions (of one candidate, in ``match``), file size."""
    for value in (*model.graph.input, *model.graph.output):
        for side in value.type.tensor_type.shape.dim:
            if not side.HasField("dim_value"):
                side.dim_value = 1
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    multiply_adds = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        first, second = (shapes[name] for name in node.input[:2])
        # Of each output number: a window of the kernel, or a row of the first factor.
        terms = math.prod(second[1:]) if node.op_type == "Conv" else first[-1]
        multiply_adds += math.prod(shapes[node.output[0]]) * terms
    floats = TensorProto.FLOAT, TensorProto.FLOAT16
    return {
        # A few constants are counted, too.
        "parameters": sum(math.prod(t.dims) for t in graph.initializer if t.data_type in floats),
        "multiply_adds": multiply_adds,
        "bytes": file.stat().st_size,
    }


def amend_card(bundle: Path, entries: dict[str, Any]) -> None:
    """Add entries to a bundle's model card, or replace them; its graphs stay as they are."""
    card = yaml.safe_load((bundle / CARD).read_text(encoding="utf-8"))
    hashes = card.pop("sha256")
    _write_card(bundle, card | entries | {"sha256": hashes})


def _write_card(bundle: Path, card: dict[str, Any]) -> None:
    text = yaml.safe_dump(card, sort_keys=False, width=96, allow_unicode=True)
    draft = bundle / f"{CARD}.tmp"
    draft.write_text(text, encoding="utf-8")
    draft.replace(bundle / CARD)


def _halve(network: torch.nn.Module) -> None:
    """Let convolutions and projections compute in float16."""
    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            if name.endswith("vlad.assign"):  # small, and its softmax is steep
                continue
            part.half()
            for weight in part.state_dict().values():
                if not weight.isfinite().all():
                    raise ValueError(f"a weight of {name} overflows float16")


def _export_place(place: PlaceNetwork, path: Path) -> None:
    width, height = place.image_size
    image = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    outputs = ["descriptor", "tokens", "centres"]
    _export(place, (image,), ["image"], outputs, None, path)


def _export_match(match: PairMatcher, place: PlaceNetwork, path: Path) -> None:
    shape = 1, place.max_patches, place.vlad.dimension
    tokens = torch.zeros(shape, dtype=torch.float16)
    candidates = tokens.repeat(3, 1, 1)
    shapes = {"query": None, "candidates": {0: torch.export.Dim("candidates", min=1, max=4096)}}
    _export(
        match,
        (tokens, candidates),
        ["query", "candidates"],
        ["scores", "assignment"],
        shapes,
        path,
    )


def _export(
    network: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: dict[str, Any] | None,
    path: Path,
) -> None:
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            example,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # Names of source files and lines are of no use to those who run the graph.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(model)
    onnx.save(model, path)
