"""A drawn town as a labelled sequence: streets that no network has learned."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
from tqdm import tqdm

from vpr_lite_ros.simulation import simulate_drive

TOWN_STEP = 3
"""Of a simulated drive every third frame is about as far from the next as keyframes are."""


def draw_town(seed: int, folder: Path) -> Path:
    """Draw the drive of ``seed`` into ``folder``: images, poses.csv and camera.json.

    Another seed is another town; 0 is the demo's.
    """
    folder.mkdir(parents=True)
    drive = simulate_drive(seed)
    drive = drive.part(0, len(drive), TOWN_STEP)
    rows = ["file,stamp_s,x,y"]
    for number, frame in enumerate(tqdm(drive.frames(), folder.name, len(drive))):
        name, (x, y, _) = f"{number:04}.png", frame.pose
        cv2.imwrite(str(folder / name), cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR))
        rows.append(f"{name},{frame.stamp_ns / 1e9:.3f},{x:.3f},{y:.3f}")
    (folder / "poses.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    width, height = drive.image_size
    camera = {"width": width, "height": height, "K": drive.camera_matrix.ravel().tolist()}
    (folder / "camera.json").write_text(json.dumps(camera), encoding="utf-8")
    return folder
