"""Running a model bundle: arrays in by name, arrays out by name, torch not needed.

A bundle is a folder with ``place.onnx``, ``match.onnx`` and ``model.yaml``. ``open_model``
checks it and opens both graphs on a backend; ``PlaceModel`` gives the two questions names:
*what does this image look like* and *how well do these two fit*.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import threading
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
BUNDLE_FORMAT = 2
TENSORRT, ONNXRUNTIME_CUDA = "tensorrt", "onnxruntime-cuda"
ALIKE_COSINE, ALIKE_SCORE = 0.999, 0.02
"""How alike two backends must describe an image, and score its match with itself."""
DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "place-v11"
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
    parts: int
    """Descriptors of an image: 3 (of the whole, its left and its right part), or that of the whole
    alone in bundles that earlier releases made."""
    max_patches: int
    """Tokens an image."""
    card: dict[str, Any]
    """All of ``model.yaml``."""
    calibration: Calibration | None = None
    """What the scores mean; None if nobody has calibrated the bundle."""


@dataclass(frozen=True)
class Description:
    """What is kept of one image: what the place network says of it, and what is known beside."""

    descriptor: NDArray[np.float32]
    """(V, D) unit vectors: of the whole image, of its left and of its right part."""
    tokens: NDArray[np.float16]
    """(N, D) patches, ready for the match network."""
    centres: NDArray[np.float32]
    """(N, 2) x, y of each patch as fractions of the image's width and height."""
    depth: NDArray[np.float16] | None = None
    """(N,) metres along the optical axis at each centre, 0 where not known; None without depth."""
    picture: bytes = b""
    """A small JPEG, see ``image.thumbnail``; empty if there is none."""


class PlaceModel:
    """Both graphs of one bundle on one backend, which may change once."""

    def __init__(self, bundle: Bundle, place: Runner, match: Runner) -> None:
        self.bundle, self._place, self._match = bundle, place, match
        self._offered: tuple[Runner, Runner] | None = None
        self.fault = ""
        """Why the backend that was asked for is not used; empty if it is, or may yet be."""

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._place.backend

    def describe(self, image: NDArray[np.uint8]) -> Description:
        """Describe an RGB image (H, W, 3) of the bundle's ``image_size``."""
        if (offered := self._offered) is not None:
            self._offered = None
            self._change_to(*offered, image[None])
        out = self._place.infer({"image": image[None]})
        return Description(
            descriptor=out["descriptor"].reshape(self.bundle.parts, self.bundle.dimension),
            tokens=out["tokens"][0].astype(np.float16, copy=False),
            centres=out["centres"][0],
        )

    def match(
        self, query: NDArray[np.float16], candidates: NDArray[np.float16]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Match tokens (N, D) with those of B candidates (B, N, D), in one call.

        Returns the transported mass (B,), 0…1, and the assignments (B, N, N).
        """
        out = self._match.infer({"query": query[None], "candidates": candidates})
        return out["scores"], out["assignment"]

    def change_over(self, make: Callable[[], tuple[Runner, Runner]]) -> threading.Thread:
        """Make runners of ``place`` and ``match`` in a thread, and use them from then on.

        The next image that is described after that is described by both: if the answers differ,
        or nothing can be made, all stays as it is and ``fault`` says why.
        """

        def work() -> None:
            try:
                self._offered = make()
            except Exception as error:
                self._refuse(str(error))

        thread = threading.Thread(target=work, name="change over", daemon=True)
        thread.start()
        return thread

    def _change_to(self, place: Runner, match: Runner, image: NDArray[np.uint8]) -> None:
        try:
            mine, yours = (runner.infer({"image": image}) for runner in (self._place, place))
            ours, theirs = (out["descriptor"].ravel() for out in (mine, yours))
            cosine = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
            tokens = mine["tokens"].astype(np.float16, copy=False)
            pair = {"query": tokens, "candidates": tokens}
            scores = [float(runner.infer(pair)["scores"][0]) for runner in (self._match, match)]
        except Exception as error:
            return self._refuse(f"{place.backend} failed on its first image: {error}")
        # Written so that NaN is refused.
        if not (cosine >= ALIKE_COSINE and abs(scores[0] - scores[1]) <= ALIKE_SCORE):
            return self._refuse(
                f"{place.backend} describes an image otherwise than {self.backend} does: cosine "
                f"{cosine:.4f}, should be {ALIKE_COSINE}; match score with itself {scores[1]:.3f}, "
                f"should be {scores[0]:.3f}"
            )
        log.info("%s answers as %s did (cosine %.5f)", place.backend, self.backend, cosine)
        self._place, self._match = place, match

    def _refuse(self, fault: str) -> None:
        self.fault = f"{fault}; the networks go on running on {self.backend}"
        log.error("%s", self.fault)


def open_model(
    path: Path = DEFAULT_BUNDLE,
    backend: str = "auto",
    threads: int = 0,
    *,
    most_candidates: int = 10,
    behind: bool = False,
) -> PlaceModel:
    """Check the bundle at ``path`` and open it.

    Parameters
    ----------
    backend
        ``auto``: the fastest that can be used. Otherwise ``tensorrt`` or a name in ``BACKENDS``.
    threads
        CPU threads of the network; 0 leaves the choice to the backend.
    most_candidates
        How many candidates TensorRT matches at once; more are matched in parts.
    behind
        Whether TensorRT's engines, if they are not there yet, are built while a CPU backend
        answers (``PlaceModel.change_over``). Otherwise this takes minutes, once.

    Raises
    ------
    BundleError
        If a file is missing, was changed or is of another format.
    BackendError
        If the backend is unknown, not installed or finds no device.
    """
    bundle = load_bundle(path)
    engines, reason = None, ""
    if backend in ("auto", TENSORRT):
        try:
            engines = _engines(bundle, most_candidates)
        except BackendError as error:
            if backend == TENSORRT:
                raise
            reason = str(error)
    if engines is not None and not behind:
        try:
            return PlaceModel(bundle, *engines())
        except BackendError as error:
            if backend == TENSORRT:
                raise
            engines, reason = None, str(error)
    if engines is None:
        model = PlaceModel(bundle, *_open_runners(path, backend, threads))
        if reason:
            place = "GPU" if model.backend == ONNXRUNTIME_CUDA else "CPU"
            log.info("%s: on the %s, with %s", reason, place, model.backend)
        return model
    # Not on the GPU meanwhile: TensorRT chooses what it builds by timing it there.
    model = PlaceModel(bundle, *_open_runners(path, "auto", threads, skipped=ONNXRUNTIME_CUDA))
    model.change_over(engines)
    return model


def _engines(bundle: Bundle, most_candidates: int) -> Callable[[], tuple[Runner, Runner]]:
    """What makes both engines, if there is a GPU and what drives it."""
    for module in (TENSORRT, "pycuda"):
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"no TensorRT: {module} is not installed")
    try:
        runner = importlib.import_module("vpr_lite_ros.tensorrt_runner")
    except (ImportError, OSError, RuntimeError) as error:  # a library or a driver is missing
        raise BackendError(f"TensorRT cannot be used: {error}") from error
    gpu = runner.first_gpu()
    said: set[tuple[str, int]] = set()

    def say(phase: str, step: int, steps: int) -> None:
        tenth = 10 * step // max(steps, 1)
        if (phase, tenth) not in said:
            said.add((phase, tenth))
            log.info("%s: %d%%", phase, 10 * tenth)

    def make() -> tuple[Runner, Runner]:
        place = runner.TensorRtRunner(gpu, bundle.path / PLACE_GRAPH, 1, say)
        match = runner.TensorRtRunner(gpu, bundle.path / MATCH_GRAPH, most_candidates, say)
        return place, match

    return make


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
        parts = int(card.get("parts", 1))
        if parts not in (1, 3):
            raise ValueError(f"parts is {parts}, not 1 or 3")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{card_file} lacks or garbles an entry ({error}): export the model again"
        ) from error
    try:
        calibration = Calibration.from_card(card)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{card_file}: the entry calibration is garbled, or another release wrote it "
            f"({error}). Copy the bundle again, or remove the entry and run `vpr-lite calibrate`"
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
    return Bundle(path, name, model_id, size, dimension, parts, max_patches, card, calibration)


class OpenVinoRunner:
    """A graph on OpenVINO's CPU device, in bfloat16 where the CPU multiplies it natively."""

    backend = "openvino"

    def __init__(self, graph: Path, threads: int) -> None:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._model = _openvino_core().compile_model(graph, "CPU", settings)
        self._request = self._model.create_infer_request()

    def infer(self, inputs: Arrays) -> Arrays:
        results = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        # A tensor that two nodes pass on has two names.
        return {name: array for output, array in results.items() for name in output.names}


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO, for as long as the process lives.

    With its last model it would unload its plugins, and the process would crash at its end.
    """
    return _import("openvino").Core()


class OnnxRuntimeRunner:
    """A graph on ONNX Runtime's CPU provider, computed in float32."""

    backend = "onnxruntime"

    def __init__(self, graph: Path, threads: int) -> None:
        onnxruntime = _import("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = self._start(onnxruntime, graph, options)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def _start(self, onnxruntime: Any, graph: Path, options: Any) -> Any:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxRuntimeCudaRunner(OnnxRuntimeRunner):
    """A graph on ONNX Runtime's CUDA provider, in the precisions that the graph says."""

    backend = ONNXRUNTIME_CUDA

    def _start(self, onnxruntime: Any, graph: Path, options: Any) -> Any:
        provider = "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise BackendError(
                f"backend {self.backend} cannot be used: this onnxruntime is for the CPU alone. "
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu[cuda,cudnn]"
            )
        # CUDA's libraries, where they came as wheels (from release 1.21 on).
        getattr(onnxruntime, "preload_dlls", lambda: None)()
        fault = "it found no device, or a library of CUDA or cuDNN is missing"
        try:
            session = onnxruntime.InferenceSession(
                graph, options, providers=[provider], enable_fallback=0
            )
        except Exception as error:  # its own classes, which differ by release
            session, fault = None, str(error)
        # Without a GPU, it says so to nobody and takes the CPU.
        if session is None or provider not in session.get_providers():
            raise BackendError(
                f"backend {self.backend} cannot be used: ONNX Runtime does not reach an NVIDIA "
                f"GPU ({fault}). See what nvidia-smi says, or choose another backend"
            )
        session.disable_fallback()
        return session


BACKENDS: dict[str, Callable[[Path, int], Runner]] = {
    ONNXRUNTIME_CUDA: OnnxRuntimeCudaRunner,
    "openvino": OpenVinoRunner,
    "onnxruntime": OnnxRuntimeRunner,
}
"""In order of preference for ``auto``, after TensorRT."""


def _open_runners(
    bundle: Path, backend: str, threads: int, skipped: str = ""
) -> tuple[Runner, Runner]:
    """Both graphs on a backend; for ``auto``, on the first that can be used."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise BackendError(
                f"backend {backend!r} is unknown: choose auto, {TENSORRT}, {', '.join(BACKENDS)}"
            )
        make = BACKENDS[backend]
        return make(bundle / PLACE_GRAPH, threads), make(bundle / MATCH_GRAPH, threads)
    for name in BACKENDS:
        if name != skipped and _is_installed(name):
            try:
                return _open_runners(bundle, name, threads)
            except BackendError as error:
                log.warning("%s: another is tried", error)
    raise BackendError(
        "no inference backend can be used: pip install openvino, or pip install onnxruntime"
    )


def _is_installed(backend: str) -> bool:
    """Without importing it, which takes a second."""
    if backend != ONNXRUNTIME_CUDA:
        return importlib.util.find_spec(backend) is not None
    try:
        importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {module} cannot be used: {error}. Install it with pip install {module}, "
            "or choose another backend"
        ) from error
