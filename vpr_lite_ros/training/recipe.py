"""A training configuration file, and the stage that makes the first bundle from a backbone."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from vpr_lite_ros.export import export_bundle, save_networks
from vpr_lite_ros.inference import open_model
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.training.distill import Student, load_checkpoint
from vpr_lite_ros.training.files import image_files
from vpr_lite_ros.training.fit import fit_place_network
from vpr_lite_ros.training.thresholds import least_threshold, score_labelled_sets

log = logging.getLogger(__name__)

T = TypeVar("T")


class RecipeError(ValueError):
    """A training configuration that does not fit; the message names the file and the entry."""


@dataclass(frozen=True)
class FitConfig:
    """From a distilled backbone to a bundle."""

    backbone: str
    """Checkpoint that ``distil`` wrote."""
    images: list[str]
    """Folders to fit clusters and PCA on."""
    labelled: str
    """Folder of the labelled sets that thresholds are measured on."""
    networks: str
    """Where both networks go, as safetensors."""
    bundle: str
    """Where the model bundle goes."""
    name: str
    about: str
    image_count: int = 1200
    clusters: int = 32
    dimension: int = 512
    max_patches: int = 400
    temperature: float = 40.0
    """Of the optimal transport: what inner products are multiplied with."""
    dustbin: float = 0.7
    """Inner product below which two patches are rather no match."""
    false_rate: float = 0.002
    """Share of the false pairs that may reach a recommended threshold."""
    seed: int = 0


def read_recipe(path: Path, stage: str, kind: type[T]) -> T:
    """The entry ``stage`` of a YAML file as a dataclass ``kind``; ``RecipeError`` names faults."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    values = content.get(stage) if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} has no entry {stage!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise RecipeError(f"{path}: {stage}.{name} is unknown; known: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise RecipeError(f"{path}: {stage}.{name} is missing")
    return kind(**values)


def fit_bundle(config: FitConfig) -> Path:
    """Fit clusters and PCA, export, measure thresholds, export with them; return the bundle."""
    student = Student()
    steps, seconds = load_checkpoint(Path(config.backbone), student)
    images = _sample(config)
    place = fit_place_network(
        student.backbone,
        images,
        clusters=config.clusters,
        dimension=config.dimension,
        max_patches=config.max_patches,
        seed=config.seed,
    )
    match = PairMatcher(config.dimension, temperature=config.temperature, dustbin=config.dustbin)
    about: dict[str, Any] = {
        "about": config.about,
        "training": {
            "backbone": f"distilled for {steps} steps of 64 crops, {seconds / 60:.0f} minutes",
            "clusters_and_pca": f"{len(images)} images, each also distorted",
            "data": [str(Path(folder).name) for folder in config.images],
            "licence": "research use: some training images forbid commercial use",
        },
    }
    Path(config.networks).parent.mkdir(parents=True, exist_ok=True)
    save_networks(Path(config.networks), place, match, about)
    return _export_with_thresholds(config, place, match, about)


def _export_with_thresholds(
    config: FitConfig, place: PlaceNetwork, match: PairMatcher, about: dict[str, Any]
) -> Path:
    bundle = export_bundle(place, match, about, Path(config.bundle), name=config.name)
    model = open_model(bundle)
    scores = score_labelled_sets(model, Path(config.labelled), config.seed)
    for name, found in scores.items():
        log.info("%s: %d of %d recognised", name, found.recognised, found.queries)
    true = np.concatenate([found.true for found in scores.values()])
    match_scores = np.concatenate([found.match for found in scores.values()])
    inliers = np.concatenate([found.inliers for found in scores.values()])
    similarities = np.concatenate([found.similarity for found in scores.values()])
    about["thresholds"] = {
        # Similarity only thins out what need not be matched; score and geometry decide.
        "similarity": round(float(np.quantile(similarities[true], 0.02)), 3),
        "match": round(least_threshold(match_scores, true, config.false_rate), 4),
        "inliers": math.ceil(least_threshold(inliers, true, config.false_rate)),
        "measured_on": {
            name: f"{found.recognised} of {found.queries} recognised, {len(found.true)} pairs"
            for name, found in scores.items()
        },
    }
    accepted = match_scores >= about["thresholds"]["match"]
    accepted &= inliers >= about["thresholds"]["inliers"]
    log.info(
        "thresholds %s accept %.1f%% of the true and %.2f%% of the false pairs",
        about["thresholds"],
        100 * float(accepted[true].mean()),
        100 * float(accepted[~true].mean()),
    )
    return export_bundle(place, match, about, Path(config.bundle), name=config.name)


def _sample(config: FitConfig) -> list[Path]:
    """About ``image_count`` images, of each folder as many as the root of its size asks for."""
    rng = np.random.default_rng(config.seed)
    folders = [list(image_files(Path(folder))) for folder in config.images]
    for folder, files in zip(config.images, folders, strict=True):
        if not files:
            raise RecipeError(f"fit.images: no JPEG or PNG files under {folder}")
    weights = np.sqrt([len(files) for files in folders])
    wanted = config.image_count * weights / weights.sum()
    return [
        files[index]
        for files, count in zip(folders, wanted, strict=True)
        for index in rng.permutation(len(files))[: round(count)]
    ]
