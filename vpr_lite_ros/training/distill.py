"""Stage zero: teach the backbone what networks trained on ImageNet see.

The student, RepVGG-lite, gets a distorted picture, the teachers the clean one; 1×1 heads carry
the student's 192 features to each teacher's, cell by cell. What comes out is a backbone whose
features survive night, weather and bad cameras without one label.

Killed at any moment, it goes on from the last checkpoint: which pictures, crops and distortions
a step sees follows from the seed and the step's number alone.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpr_lite_ros.models.repvgg import STRIDE, RepVGGLite, standardise
from vpr_lite_ros.training.augment import distort, random_crop
from vpr_lite_ros.training.files import image_files, read_rgb
from vpr_lite_ros.training.teachers import MobileNetV1, ResNet18

log = logging.getLogger(__name__)

TEACHER_WIDTHS = {"conv_pw_9": 512, "conv_pw_12": 1024, "layer3": 256}
_SHIFT = STRIDE - 1
"""MobileNet's padding centres its cell i on pixel 16 i + 15, the student's centres it on 16 i."""


@dataclass(frozen=True)
class DistillConfig:
    """What to learn from, for how long; every field ends up in the checkpoint."""

    images: Sequence[str]
    """Folders of training images; searched for JPEG and PNG files."""
    teachers: str
    """Folder with ``mobilenet_v1.npz`` and ``resnet18_to_layer3.npz``."""
    output: str
    """Checkpoint file (safetensors), written every ``save_every`` steps."""
    steps: int = 6000
    minutes: float = math.inf
    """Training ends, learning rate at zero, when steps or minutes are used up."""
    batch: int = 64
    size: int = 128
    """Side of the crops in pixels, a multiple of 32."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    save_every: int = 100
    workers: int = 1
    seed: int = 0


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Item i: (clean crop, distorted crop), uint8 (3, S, S), the same for the same seed and i."""

    def __init__(self, folders: Sequence[str], size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.folders = [
            [read_rgb(path) for path in tqdm(list(image_files(Path(folder))), desc=folder)]
            for folder in folders
        ]
        for folder, images in zip(folders, self.folders, strict=True):
            if not images:
                raise ValueError(f"no JPEG or PNG files under {folder}: check `images`")
        # Square roots: a large folder counts for more, but does not drown the small ones.
        weights = np.sqrt([len(images) for images in self.folders])
        self.weights = weights / weights.sum()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        images = self.folders[rng.choice(len(self.folders), p=self.weights)]
        clean = random_crop(images[rng.integers(len(images))], rng, self.size)
        return _to_tensor(clean), _to_tensor(distort(clean, rng))


class Student(nn.Module):
    """Backbone and one 1×1 head a teacher's layer; heads are thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RepVGGLite()
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(RepVGGLite.width, width, 1) for name, width in TEACHER_WIDTHS.items()}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.backbone(standardise(image))
        pooled = F.avg_pool2d(features, 2)
        return {
            name: head(pooled if name == "conv_pw_12" else features)
            for name, head in self.heads.items()
        }


class Teachers(nn.Module):
    """The teachers' features, each channel at zero mean and unit deviation over the images."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.mobilenet = MobileNetV1(folder / "mobilenet_v1.npz", ("conv_pw_9", "conv_pw_12"))
        self.resnet = ResNet18(folder / "resnet18_to_layer3.npz")
        for name, width in TEACHER_WIDTHS.items():
            self.register_buffer(f"{name}_mean", torch.zeros(1, width, 1, 1))
            self.register_buffer(f"{name}_std", torch.ones(1, width, 1, 1))

    @torch.no_grad()
    def forward(self, crop: Tensor) -> dict[str, Tensor]:
        """``crop`` is larger than the student's picture by ``_SHIFT`` at the left and top."""
        side = crop.shape[-1] - _SHIFT
        found = self.mobilenet(crop[:, :, :side, :side])
        found |= self.resnet(crop[:, :, _SHIFT:, _SHIFT:])
        return {
            name: (x - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_std")
            for name, x in found.items()
        }

    def standardise_on(self, batches: list[Tensor]) -> None:
        """Measure each channel's mean and deviation on ``batches`` of crops."""
        outputs = [self(batch) for batch in batches]
        for name in TEACHER_WIDTHS:
            values = torch.cat([output[name].float() for output in outputs])
            std, mean = torch.std_mean(values, dim=(0, 2, 3), keepdim=True)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_std").copy_(std.clamp_min(1e-3))


def distil(config: DistillConfig) -> Path:
    """Train, or go on training, and return the checkpoint's path."""
    torch.manual_seed(config.seed)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    crops = Crops(config.images, config.size + _SHIFT, config.seed)
    student, teachers = Student(), Teachers(Path(config.teachers)).eval()
    teachers.standardise_on([_stack(crops, range(64 * i, 64 * i + 64)) for i in range(8)])
    optimiser = torch.optim.AdamW(
        student.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    step, spent = 0, 0.0
    if output.exists():
        step, spent = load_checkpoint(output, student, optimiser)
        log.info("going on from step %d of %s", step, output)
    indices = range(step * config.batch, config.steps * config.batch)
    loader = DataLoader(crops, config.batch, sampler=indices, num_workers=config.workers)
    progress = tqdm(total=config.steps, initial=step, desc="distil")
    began, losses = time.monotonic() - spent, []
    amp = torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16())
    student.train()
    for clean, distorted in loader:
        spent = time.monotonic() - began
        done = max(step / config.steps, spent / 60 / config.minutes)
        if done >= 1:
            break
        rate = config.learning_rate * min(1, (step + 1) / config.warmup_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        with amp:
            wanted = teachers(clean.float())
            found = student(distorted[:, :, _SHIFT:, _SHIFT:].float())
        loss, cosine = distillation_loss(found, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        losses.append(loss.item())
        progress.update()
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", cosine=f"{cosine:.3f}")
        if step % config.save_every == 0:
            save_checkpoint(output, student, optimiser, step, spent, config)
            log.info("step %d loss %.4f cosine %.3f", step, np.mean(losses[-100:]), cosine)
    save_checkpoint(output, student, optimiser, step, spent, config)
    return output


def distillation_loss(
    found: dict[str, Tensor], wanted: dict[str, Tensor]
) -> tuple[Tensor, float]:
    """Mean over the teachers of 1 − cosine + 0.3 smooth L1, and the mean cosine."""
    total, cosines = torch.zeros(()), []
    for name, target in wanted.items():
        x, y = found[name].float(), target.float()
        cosine = F.cosine_similarity(x, y, dim=1).mean()
        total = total + 1 - cosine + 0.3 * F.smooth_l1_loss(x, y)
        cosines.append(cosine.item())
    return total / len(wanted), float(np.mean(cosines))


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 is fast here; without these instructions it is ten times slower."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def save_checkpoint(
    path: Path,
    student: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    spent: float,
    config: DistillConfig,
) -> None:
    """Weights and the optimiser's state; written beside the old file, then put in its place."""
    tensors = {f"model.{k}": v.contiguous() for k, v in student.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    settings = json.dumps(asdict(config), allow_nan=True)
    meta = {"step": str(step), "seconds": f"{spent:.1f}", "config": settings}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=meta)
    temporary.replace(path)


def load_checkpoint(
    path: Path, student: nn.Module, optimiser: torch.optim.Optimizer | None = None
) -> tuple[int, float]:
    """Fill ``student`` (and ``optimiser``) from ``path``; return step and seconds spent."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = file.metadata()
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    student.load_state_dict(weights, strict=True)
    if optimiser is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(meta["step"]), float(meta["seconds"])


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _stack(crops: Crops, indices: range) -> Tensor:
    return torch.stack([crops[i][0] for i in indices]).float()
