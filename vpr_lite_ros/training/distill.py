"""Stage zero: teach the backbone what networks trained on ImageNet see.

The student, RepVGG-lite, gets a distorted picture, the teachers the clean one; 1×1 heads carry
the student's 192 features to each teacher's, cell by cell. What comes out is a backbone whose
features survive night, weather and bad cameras without one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise
from vpr_lite_ros.training.augment import distort, random_crop
from vpr_lite_ros.training.errors import TrainingError
from vpr_lite_ros.training.files import read_rgb, weighted_folders
from vpr_lite_ros.training.loop import Batch, Schedule, Stage
from vpr_lite_ros.training.teachers import MobileNetV1, ResNet18

TEACHER_WIDTHS = {"conv_pw_9": 512, "conv_pw_12": 1024, "layer3": 256}
_SHIFT = STRIDE - 1
"""MobileNet's padding centres its cell i on pixel 16 i + 15, the student's centres it on 16 i."""
_SCALE_BATCHES = 8
"""Batches that the teachers' means and deviations are measured on."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Schedule):
    """What to learn from, and from whom."""

    images: Sequence[str]
    """Folders of training images; searched for JPEG and PNG files."""
    teachers: str
    """Folder with ``mobilenet_v1.npz`` and ``resnet18_to_layer3.npz``."""
    batch: int = 64
    size: int = 128
    """Side of the crops in pixels, a multiple of 32."""
    learning_rate: float = 2e-3
    warmup_steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.size % (2 * STRIDE):
            raise TrainingError(f"size is {self.size}, should be 32, 64, 96, …")


class Crops(Dataset[Batch]):
    """Item i: clean and distorted crops (N, 3, S, S) uint8, the same for the same seed and i."""

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.size = config, config.size + _SHIFT
        self.folders, self.weights = weighted_folders(config.images, "distil.images")

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, index))
        clean, distorted = [], []
        for _ in range(self.config.batch):
            files = self.folders[rng.choice(len(self.folders), p=self.weights)]
            crop = random_crop(read_rgb(files[rng.integers(len(files))]), rng, self.size)
            clean.append(crop)
            distorted.append(distort(crop, rng))
        first, second = (
            torch.from_numpy(np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2)))
            for crops in (clean, distorted)
        )
        return first, second


class Student(nn.Module):
    """Backbone and one 1×1 head a teacher's layer; heads are thrown away afterwards."""

    def __init__(self, backbone: RepVGGLite) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(RepVGGLite.width, width, 1) for name, width in TEACHER_WIDTHS.items()}
        )
        # Of the teachers' features, so that a checkpoint holds all that a step depends on.
        for name, width in TEACHER_WIDTHS.items():
            self.register_buffer(f"{name}_mean", torch.zeros(1, width, 1, 1))
            self.register_buffer(f"{name}_std", torch.ones(1, width, 1, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.backbone(standardise(image))
        pooled = F.avg_pool2d(features, 2)
        return {
            name: head(pooled if name == "conv_pw_12" else features)
            for name, head in self.heads.items()
        }

    def standardised(self, taught: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teachers' features, each channel at zero mean and unit deviation."""
        return {
            name: (x - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_std")
            for name, x in taught.items()
        }

    def measure(self, taught: list[dict[str, Tensor]]) -> None:
        """Take each channel's mean and deviation from batches of the teachers' features."""
        for name in TEACHER_WIDTHS:
            values = torch.cat([features[name].float() for features in taught])
            std, mean = torch.std_mean(values, dim=(0, 2, 3), keepdim=True)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_std").copy_(std.clamp_min(1e-3))


class Distill(Stage):
    """A student beside its teachers."""

    def __init__(self, config: DistillConfig, backbone: RepVGGLite) -> None:
        super().__init__()
        self.config = config
        self.student = self.trained = Student(backbone)
        folder = Path(config.teachers)
        self.mobilenet = MobileNetV1(folder / "mobilenet_v1.npz", ("conv_pw_9", "conv_pw_12"))
        self.resnet = ResNet18(folder / "resnet18_to_layer3.npz")

    def batches(self) -> Crops:
        return Crops(self.config)

    def train(self, mode: bool = True) -> Distill:
        """The student trains, its teachers do not."""
        super().train(mode)
        self.mobilenet.eval()
        self.resnet.eval()
        return self

    def begin_round(self, step: int) -> dict[str, float]:
        """Measure the teachers' features."""
        self.eval()
        crops = self.batches()
        device = next(self.student.parameters()).device
        # Batches that no step sees, so that it does not matter when this is done.
        self.student.measure(
            [self._taught(crops[2**40 + i][0].to(device)) for i in range(_SCALE_BATCHES)]
        )
        return {}

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        clean, distorted = batch
        wanted = self.student.standardised(self._taught(clean))
        found = self.student(distorted[:, :, _SHIFT:, _SHIFT:].float())
        loss, cosine = distillation_loss(found, wanted)
        return {"loss": loss, "cosine": cosine.detach()}

    @torch.no_grad()
    def _taught(self, crop: Tensor) -> dict[str, Tensor]:
        """``crop`` is larger than the student's picture by ``_SHIFT`` at the left and top."""
        crop, side = crop.float(), crop.shape[-1] - _SHIFT
        found: dict[str, Tensor] = self.mobilenet(crop[:, :, :side, :side])
        return found | self.resnet(crop[:, :, _SHIFT:, _SHIFT:])


def distillation_loss(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over the teachers of 1 − cosine + 0.3 smooth L1, and the mean cosine."""
    losses, cosines = [], []
    for name, target in wanted.items():
        x, y = found[name].float(), target.float()
        cosines.append(F.cosine_similarity(x, y, dim=1).mean())
        losses.append(1 - cosines[-1] + 0.3 * F.smooth_l1_loss(x, y))
    return torch.stack(losses).mean(), torch.stack(cosines).mean()
