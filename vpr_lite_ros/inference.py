"""Running a model bundle: arrays in by name, arrays out by name, torch not needed.

A bundle is a folder with ``place.onnx``, ``match.onnx`` and ``model.yaml``. ``open_model``
checks it and opens both graphs on a backend; ``PlaceModel`` gives the two questions names:
*what does this image look like* and *how well do these two fit*.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from vpr_lite_ros.calibration import Calibration

log = logging.getLogger(__name__)

PLACE_GRAPH = "place.onnx"
MATCH_GRAPH = "match.onnx"
CARD = "model.yaml"
BUNDLE_FORMAT = 1
DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "place-v3"
"""The model bundle that ships with the package."""

Arrays = dict[str, NDArray[Any]]


class BundleError(ValueError):
    """A model bundle that cannot be used; the message says which file and why."""


class BackendError(RuntimeError):
    """An inference backend that cannot be used here; the message says what to install."""


class Runner(Protocol):
    """A graph, ready to run. The arrays returned belong to the caller."""

    backend: str

    def infer(self, inputs: Arrays) -> Arrays:
        """Run the graph once."""


@dataclass(frozen=True)
class Bundle:
    """What ``model.yaml`` says, checked against the files beside it."""

    path: Path
    name: str
    model_id: str
    """Name and a hash of both graphs: two bundles with the same id describe alike."""
    image_size: tuple[int, int]
    """Width and height of the network's input in pixels."""
    dimension: int
    """Length of descriptors and tokens."""
    max_patches: int
    """Tokens an image."""
    card: dict[str, Any]
    """All of ``model.yaml``."""
    calibration: Calibration | None = None
    """What the scores mean; None if nobody has calibrated the bundle."""


@dataclass(frozen=True)
class Description:
    """What the place network says of one image."""

    descriptor: NDArray[np.float32]
    """(D,) unit vector of the whole image."""
    tokens: NDArray[np.float16]
    """(N, D) patches, ready for the match network."""
    centres: NDArray[np.float32]
    """(N, 2) x, y of each patch as fractions of the image's width and height."""


class PlaceModel:
    """Both graphs of one bundle on one backend."""

    def __init__(self, bundle: Bundle, place: Runner, match: Runner) -> None:
        self.bundle, self._place, self._match = bundle, place, match

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._place.backend

    def describe(self, image: NDArray[np.uint8]) -> Description:
        """Describe an RGB image (H, W, 3) of the bundle's ``image_size``."""
        out = self._place.infer({"image": image[None]})
        return Description(
            descriptor=out["descriptor"][0],
            tokens=out["tokens"][0].astype(np.float16),
            centres=out["centres"][0],
        )

    def match(
        self, query: NDArray[np.float16], candidates: NDArray[np.float16]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Match tokens (N, D) with those of B candidates (B, N, D), in one call.

        Returns the transported mass (B,), 0…1, and the assignments (B, N, N).
        """
        out = self._match.infer(
            {
                "query": query[None].astype(np.float32),
                "candidates": candidates.astype(np.float32),
            }
        )
        return out["scores"], out["assignment"]


def open_model(path: Path = DEFAULT_BUNDLE, backend: str = "auto", threads: int = 0) -> PlaceModel:
    """Check the bundle at ``path`` and open it.

    Parameters
    ----------
    backend
        ``auto``: the fastest that is installed. Otherwise a name in ``BACKENDS``.
    threads
        CPU threads of the network; 0 leaves the choice to the backend.

    Raises
    ------
    BundleError
        If a file is missing, was changed or is of another format.
    BackendError
        If the backend is unknown or not installed.
    """
    bundle = load_bundle(path)
    open_runner = _choose_backend(backend)
    return PlaceModel(
        bundle,
        open_runner(path / PLACE_GRAPH, threads),
        open_runner(path / MATCH_GRAPH, threads),
    )


def load_bundle(path: Path) -> Bundle:
    """Read ``model.yaml`` and check both graphs' SHA-256 against it."""
    card_file = path / CARD
    try:
        card = yaml.safe_load(card_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"no model bundle at {path}: {error.strerror}. Pass a folder with model.yaml, "
            f"{PLACE_GRAPH} and {MATCH_GRAPH}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{card_file} cannot be read as YAML: {error}") from error
    if not isinstance(card, dict) or card.get("format") != BUNDLE_FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise BundleError(
            f"{card_file} has format {found!r}, this release reads format {BUNDLE_FORMAT}: "
            "export the model again with `vpr-lite export`"
        )
    try:
        hashes = {graph: str(card["sha256"][graph]) for graph in (PLACE_GRAPH, MATCH_GRAPH)}
        width, height = (int(side) for side in card["image_size"])
        name = str(card["name"])
        dimension, max_patches = int(card["dimension"]), int(card["max_patches"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{card_file} lacks or garbles an entry ({error}): export the model again"
        ) from error
    try:
        calibration = Calibration.from_card(card)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{card_file}: the entry calibration is garbled ({error}). Copy the bundle again, or "
            "remove the entry and run `vpr-lite calibrate`"
        ) from error
    for graph, wanted in hashes.items():
        try:
            found_hash = hashlib.sha256((path / graph).read_bytes()).hexdigest()
        except OSError as error:
            raise BundleError(f"{path / graph} cannot be read: {error.strerror}") from error
        if found_hash != wanted:
            raise BundleError(
                f"{path / graph} is not the file that model.yaml names (SHA-256 "
                f"{found_hash[:12]}…, expected {wanted[:12]}…): copy or export the bundle again"
            )
    digest = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    model_id = f"{name}-{digest[:12]}"
    size = (width, height)
    return Bundle(path, name, model_id, size, dimension, max_patches, card, calibration)


class OpenVinoRunner:
    """A graph on OpenVINO's CPU device, in bfloat16 where the CPU multiplies it natively."""

    backend = "openvino"

    def __init__(self, graph: Path, threads: int) -> None:
        openvino = _import("openvino")
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._model = openvino.Core().compile_model(graph, "CPU", settings)
        self._request = self._model.create_infer_request()

    def infer(self, inputs: Arrays) -> Arrays:
        results = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        return {output.get_any_name(): array for output, array in results.items()}


class OnnxRuntimeRunner:
    """A graph on ONNX Runtime's CPU provider, float32."""

    backend = "onnxruntime"

    def __init__(self, graph: Path, threads: int) -> None:
        onnxruntime = _import("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


BACKENDS: dict[str, Callable[[Path, int], Runner]] = {
    "openvino": OpenVinoRunner,
    "onnxruntime": OnnxRuntimeRunner,
}
"""In order of preference for ``auto``."""


def _choose_backend(name: str) -> Callable[[Path, int], Runner]:
    if name == "auto":
        for candidate in BACKENDS:
            if importlib.util.find_spec(candidate) is not None:
                return BACKENDS[candidate]
        raise BackendError(
            f"no inference backend is installed: pip install {' or '.join(BACKENDS)}"
        )
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {module} cannot be used: {error}. Install it with pip install {module}, "
            "or choose another backend"
        ) from error
