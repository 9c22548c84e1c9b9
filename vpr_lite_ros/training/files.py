"""Training images on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from vpr_lite_ros.image import Image


def image_files(folder: Path) -> Iterator[Path]:
    """All JPEG and PNG files under ``folder``, in order of their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
            yield path


def read_rgb(path: Path) -> Image:
    """An image file as RGB; ``ValueError`` if it cannot be read."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{path} cannot be read as an image: remove it or mend it")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
