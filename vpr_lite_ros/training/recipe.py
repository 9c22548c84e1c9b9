"""A training configuration, and all stages from nothing to a bundle.

A recipe is a YAML file: ``name``, ``about``, ``licence``, ``output``, and one entry for each
stage to run.

Of the place network, always in this order: ``distil`` (what ImageNet networks see), ``views``
(places, from pairs of views), ``triplet`` (the paper's recipe for labelled places), ``fit``
(clusters, projection, thresholds, bundle). Each stage goes on with the backbone that the one
before left.

Of the matcher: ``match``, on the frozen network of the checkpoint ``networks`` that ``fit``
wrote, then ``thresholds``.
"""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from vpr_lite_ros.export import amend_card, export_bundle, load_networks, save_networks
from vpr_lite_ros.inference import load_bundle, open_model
from vpr_lite_ros.models.matcher import PairMatcher
from vpr_lite_ros.models.netvlad import NetVLAD, netvlad_of
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import RepVGGLite
from vpr_lite_ros.training.distill import Distill, DistillConfig
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import weighted_folders
from vpr_lite_ros.training.fit import fit_place_network
from vpr_lite_ros.training.loop import (
    Devices,
    Schedule,
    Stage,
    devices,
    read_checkpoint,
    train,
)
from vpr_lite_ros.training.match import Match, MatchConfig
from vpr_lite_ros.training.pretrained import (
    load_pretrained,
    read_clusters,
    restore_statistics,
    unfolded,
)
from vpr_lite_ros.training.thresholds import recommend, score_labelled_sets
from vpr_lite_ros.training.triplet import Triplet, TripletConfig
from vpr_lite_ros.training.views import Views, ViewsConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ThresholdsConfig:
    """Where a bundle's thresholds come from."""

    labelled: list[dict[str, Any]]
    """Data sets that thresholds are measured on; see ``score_labelled_sets``."""
    most_queries: int = 500
    """Of each labelled set."""
    false_rate: float = 0.002
    """Share of each set's false pairs that may reach a recommended threshold."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FitConfig(ThresholdsConfig):
    """From a trained backbone to a bundle."""

    images: list[str]
    """Folders to fit clusters and projection on."""
    image_size: Sequence[int] = (640, 480)
    """Width and height that the network sees, multiples of 16."""
    image_count: int = 800
    clusters: int | None = None
    """How many to find by k-means; empty: those that the stage before has trained, or those of the
    bundle that training began with."""
    dimension: int = 512
    max_patches: int = 400
    temperature: float = 40.0
    """Of the optimal transport: what inner products are multiplied with."""
    dustbin: float = 0.6
    """Inner product below which two patches are rather no match."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training configuration says."""

    name: str
    """Of the bundle."""
    about: str
    """What the model card says of it."""
    licence: str
    """What its training images allow; the model card says so."""
    output: str
    """Folder for checkpoints, logs and the bundle."""


@dataclass(frozen=True, kw_only=True)
class PlaceRecipe(Recipe):
    """How to train the place network; stages that are None are not run."""

    distil: DistillConfig | None = None
    views: ViewsConfig | None = None
    triplet: TripletConfig | None = None
    fit: FitConfig | None = None


@dataclass(frozen=True, kw_only=True)
class MatcherRecipe(Recipe):
    """How to train the matcher."""

    networks: str
    """Checkpoint with the place network, ``networks.safetensors`` beside its bundle."""
    max_patches: int | None = None
    """Tokens of an image; empty: as many as the place network was fitted with."""
    match: MatchConfig
    thresholds: ThresholdsConfig


_STAGES: dict[type[Recipe], dict[str, Any]] = {
    PlaceRecipe: {
        "distil": DistillConfig,
        "views": ViewsConfig,
        "triplet": TripletConfig,
        "fit": FitConfig,
    },
    MatcherRecipe: {"match": MatchConfig, "thresholds": ThresholdsConfig},
}
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


_SCALARS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}


def read_recipe(path: Path, kind: type[AnyRecipe]) -> AnyRecipe:
    """A YAML file as a recipe; ``TrainingError`` names the file and the entry at fault."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds no entries: see config/training for examples")
    stages = {
        stage: _make(config, content.pop(stage), path, f"{stage}.")
        for stage, config in _STAGES[kind].items()
        if stage in content
    }
    recipe: AnyRecipe = _make(kind, content | stages, path, "")
    if not stages:
        raise TrainingError(f"{path} has no stage: add {', '.join(_STAGES[kind])} or some of them")
    return recipe


def _make(kind: Any, values: Any, path: Path, prefix: str) -> Any:
    """The dataclass ``kind`` of an entry of ``path``."""
    if not isinstance(values, dict):
        raise TrainingError(f"{path}: {prefix.rstrip('.')} is {values!r}, should hold entries")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise TrainingError(f"{path}: {prefix}{name} is unknown; known: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise TrainingError(f"{path}: {prefix}{name} is missing")
    kinds = typing.get_type_hints(kind)
    for name, value in values.items():
        wanted = next((w for k, w in _SCALARS.items() if kinds[name] is k), None)
        if wanted and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise TrainingError(
                f"{path}: {prefix}{name} is {value!r}, should be a {kinds[name].__name__}"
                + ("; YAML wants a point in 1.0e-4" if kinds[name] is float else "")
            )
    try:
        return kind(**values)
    except TrainingError as error:
        raise TrainingError(f"{path}: {prefix}{error}") from error


def train_place(path: Path, backbone_file: Path | None = None) -> Path:
    """Run all stages of the recipe ``path``; return the bundle, or else the last checkpoint.

    What is finished is not done again: killed at any moment, the same command goes on.

    Parameters
    ----------
    backbone_file
        Checkpoint of RepVGG-A0 or a bundle to begin with (``training.pretrained``); None: random
        weights.
    """
    recipe = read_recipe(path, PlaceRecipe)
    output = Path(recipe.output)
    began_with: dict[str, Any] = {}
    clusters: dict[str, Any] | None = None
    if recipe.fit and backbone_file and backbone_file.is_dir():
        given = load_bundle(backbone_file)
        clusters = read_clusters(backbone_file)
        began_with = {"began_with": {"bundle": given.name, "training": given.card.get("training")}}
    torch.manual_seed(0)  # the same random weights in each run
    with devices() as on:
        backbone = RepVGGLite()
        if backbone_file:
            load_pretrained(backbone, backbone_file)
            moves = recipe.distil or recipe.views
            # Triplets leave batch norm as it is.
            if backbone_file.is_dir() and moves and not _is_folded(moves):
                restore_statistics(backbone, _stage(moves, backbone, on).batches()[2**40][0])
        last, vlad = output, clusters
        for name, config in (
            ("distil", recipe.distil),
            ("views", recipe.views),
            ("triplet", recipe.triplet),
        ):
            if config is None:
                continue
            last = output / f"{name}.safetensors"
            if last.exists() and (done := read_checkpoint(last)).finished:
                log.info("%s is finished: %d steps", last, done.step)
            else:
                stage = _stage(config, backbone, on, vlad)
                done = read_checkpoint(train(stage, config, last, on))
            weights = done.part("backbone")
            if _is_folded(config):
                weights = unfolded(weights)
            backbone.load_state_dict(weights, strict=True)
            # What distilling leaves has none: the clusters before it are of other features.
            vlad = done.part("vlad") or None
    # The other processes have nothing left to wait for.
    if not recipe.fit or on.rank > 0:
        return last
    return fit_bundle(recipe, backbone.cpu(), vlad, began_with)


def _is_folded(config: Schedule) -> bool:
    return isinstance(config, ViewsConfig) and config.folded


def _stage(
    config: Schedule,
    backbone: RepVGGLite,
    on: Devices,
    clusters: dict[str, Any] | None = None,
) -> Stage:
    match config:
        case DistillConfig():
            return Distill(config, backbone)
        case ViewsConfig():
            return Views(config, backbone, clusters)
        case TripletConfig():
            return Triplet(config, backbone, on)
    raise TypeError(f"no stage for {type(config).__name__}")


def train_matcher(path: Path) -> Path:
    """Train the matcher of the recipe ``path`` on its place network; return the bundle.

    Killed at any moment, the same command goes on.
    """
    recipe = read_recipe(path, MatcherRecipe)
    output = Path(recipe.output)
    place, match, about = load_networks(Path(recipe.networks), recipe.max_patches)
    checkpoint = output / "match.safetensors"
    torch.manual_seed(0)
    with devices() as on:
        if not (checkpoint.exists() and read_checkpoint(checkpoint).finished):
            train(Match(recipe.match, place, match), recipe.match, checkpoint, on)
    done = read_checkpoint(checkpoint)
    if on.rank > 0:
        return checkpoint
    place.cpu().self_attention.load_state_dict(done.part("self_attention"), strict=True)
    match.cpu().load_state_dict(done.part("match"), strict=True)
    before = about.get("training")
    about["about"] = recipe.about
    about["training"] = {
        **(before if isinstance(before, dict) else {"place": before}),
        **_history(output),
        "licence": recipe.licence,
    }
    save_networks(output / "networks.safetensors", place, match, about)
    return _export_with_thresholds(
        recipe.name, recipe.thresholds, place.eval(), match.eval(), about, output / "bundle"
    )


def fit_bundle(
    recipe: PlaceRecipe,
    backbone: RepVGGLite,
    trained_vlad: dict[str, Any] | None = None,
    began_with: dict[str, Any] | None = None,
) -> Path:
    """Fit clusters and PCA, export, measure thresholds; return the bundle.

    Parameters
    ----------
    trained_vlad
        Clusters that a stage has trained, for ``fit.clusters`` left empty.
    began_with
        For the model card: what the bundle had learned that training began with.
    """
    config, output = recipe.fit, Path(recipe.output)
    assert config is not None
    images = _sample(config)
    width, height = config.image_size
    place = fit_place_network(
        backbone,
        images,
        image_size=(width, height),
        clusters=_clusters(config, trained_vlad),
        dimension=config.dimension,
        max_patches=config.max_patches,
        seed=config.seed,
    )
    match = PairMatcher(config.dimension, temperature=config.temperature, dustbin=config.dustbin)
    about: dict[str, Any] = {
        "about": recipe.about,
        "training": {
            **(began_with or {}),
            **_history(output),
            "fit": f"PCA on {len(images)} images, each also distorted and moved",
            "licence": recipe.licence,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    save_networks(output / "networks.safetensors", place, match, about)
    return _export_with_thresholds(recipe.name, config, place, match, about, output / "bundle")


def _clusters(config: FitConfig, trained_vlad: dict[str, Any] | None) -> int | NetVLAD:
    if config.clusters is not None:
        return config.clusters
    if not trained_vlad:
        raise TrainingError(
            "fit.clusters is empty, but no stage before it trains clusters: say how many, or begin "
            "with a bundle (--backbone)"
        )
    return netvlad_of(trained_vlad)


def _history(output: Path) -> dict[str, Any]:
    """For the model card: what each stage has learned from, and for how long."""
    found: dict[str, Any] = {}
    for name in ("distil", "views", "triplet", "match"):
        path = output / f"{name}.safetensors"
        if path.exists():
            done = read_checkpoint(path)
            found[name] = {
                "steps": done.step,
                "minutes": round(done.seconds / 60),
                **{key: done.config[key] for key in ("batch", "size") if key in done.config},
                "data": _data_names(done.config),
            }
    return found


def _data_names(config: dict[str, Any]) -> list[str]:
    folders = [Path(folder).name for folder in config.get("images", ())]
    kinds = ("fixed_cameras", "places", "sequences")
    tables = [Path(table).parent.name for kind in kinds for table in config.get(kind, ())]
    return sorted({*folders, *tables, *(str(key) for key in config.get("data", ()))})


def _export_with_thresholds(
    name: str,
    config: ThresholdsConfig,
    place: PlaceNetwork,
    match: PairMatcher,
    about: dict[str, Any],
    output: Path,
) -> Path:
    bundle = export_bundle(place, match, about, output, name=name)
    model = open_model(bundle)
    scores = score_labelled_sets(model, config.labelled, config.most_queries, config.seed)
    for dataset, found in scores.items():
        log.info("%s: %d of %d recognised", dataset, found.recognised, found.queries)
    thresholds = recommend(scores, config.false_rate) | {
        "measured_on": {
            dataset: f"{found.recognised} of {found.queries} recognised, {len(found.true)} pairs"
            for dataset, found in scores.items()
        },
    }
    for dataset, found in scores.items():
        accepted = found.match >= thresholds["match"]
        accepted &= found.inliers >= thresholds["inliers"]
        log.info(
            "%s: the thresholds let %.1f%% of the true and %.2f%% of the false pairs pass",
            dataset,
            100 * float(accepted[found.true].mean()),
            100 * float(accepted[~found.true].mean()),
        )
    log.info("thresholds %s", thresholds)
    amend_card(bundle, {"thresholds": thresholds})
    return bundle


def _sample(config: FitConfig) -> list[Path]:
    """About ``image_count`` images, of each folder as many as the root of its size asks for."""
    rng = np.random.default_rng(config.seed)
    folders, weights = weighted_folders(config.images, "fit.images")
    return [
        files[index]
        for files, weight in zip(folders, weights, strict=True)
        for index in rng.permutation(len(files))[: round(config.image_count * weight)]
    ]
