"""Training images on disk, and how often to draw from which folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.image import Image
from vpr_lite_ros.training.errors import TrainingError


def image_files(folder: Path) -> Iterator[Path]:
    """All JPEG and PNG files under ``folder``, in order of their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
            yield path


def read_rgb(path: Path) -> Image:
    """An image file as RGB; ``TrainingError`` if it cannot be read."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise TrainingError(f"{path} cannot be read as an image: remove it or mend it")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def weighted_folders(
    folders: Sequence[str], what: str
) -> tuple[list[list[Path]], NDArray[np.float64]]:
    """Each folder's image files, and with which probability to draw from it.

    ``what`` names the entry that lists the folders, for the message if one holds no image.
    """
    found = [list(image_files(Path(folder))) for folder in folders]
    for folder, files in zip(folders, found, strict=True):
        if not files:
            raise TrainingError(f"{what}: no JPEG or PNG files under {folder}")
    return found, by_root([len(files) for files in found])


def by_root(sizes: Sequence[int]) -> NDArray[np.float64]:
    """Shares of one: large sets count for more, but do not drown the small ones."""
    roots = np.sqrt(sizes)
    return np.asarray(roots / roots.sum(), np.float64)
