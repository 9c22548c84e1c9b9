"""Two ImageNet networks to distil from, built from plain ``.npz`` weight files.

Each maps an RGB image, values 0…255, to named maps of local features:

* ``mobilenet_v1.npz``: MobileNet v1 1.0 in Keras' names, up to ``conv_pw_12``;
* ``resnet18_to_layer3.npz``: ResNet-18 in torchvision's names, batch norm folded, to ``layer3``.

Only needed for training: neither the networks nor their weights ship with the package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOBILENET_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class MobileNetV1(nn.Module):
    """RGB image (B, 3, H, W), 0…255, to ``{"conv_pw_i": map}`` for the asked-for blocks."""

    def __init__(self, weights: Path, outputs: tuple[str, ...]) -> None:
        super().__init__()
        arrays = _load(weights)
        self.outputs = outputs
        last = max(int(name.rsplit("_", 1)[1]) for name in outputs)
        names = ["conv1"]
        for index in range(1, last + 1):
            names += [f"conv_dw_{index}", f"conv_pw_{index}"]
        self.names = names
        for name in names:
            weight, bias = _keras_conv(arrays, name)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_bias", bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = image / 127.5 - 1
        found: dict[str, Tensor] = {}
        for name in self.names:
            stride = 2 if name == "conv1" else 1
            if name.startswith("conv_dw"):
                stride = _MOBILENET_STRIDES[int(name.rsplit("_", 1)[1]) - 1]
            weight = self.get_buffer(f"{name}_weight")
            if weight.shape[-1] == 3:
                x = _pad_same(x, stride)
            groups = x.shape[1] if name.startswith("conv_dw") else 1
            bias = self.get_buffer(f"{name}_bias")
            x = F.relu6(F.conv2d(x, weight, bias, stride, groups=groups))
            if name in self.outputs:
                found[name] = x
        return found


class ResNet18(nn.Module):
    """RGB image (B, 3, H, W), 0…255, to ``{"layer3": (B, 256, H / 16, W / 16)}``."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        for name, array in _load(weights).items():
            tensor = torch.from_numpy(array.astype(np.float32))
            self.register_buffer(name.replace(".", "_"), tensor)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1) * 255)

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        name = name.replace(".", "_")
        weight = self.get_buffer(f"{name}_weight")
        bias = self.get_buffer(f"{name}_bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = (image - self.get_buffer("mean")) / self.get_buffer("std")
        x = F.max_pool2d(F.relu(self._conv(x, "conv1", 2)), 3, 2, 1)
        for layer in (1, 2, 3):
            for block in (0, 1):
                stride = 2 if layer > 1 and block == 0 else 1
                prefix = f"layer{layer}.{block}"
                out = F.relu(self._conv(x, f"{prefix}.conv1", stride))
                out = self._conv(out, f"{prefix}.conv2")
                shortcut = self._conv(x, f"{prefix}.downsample.0", 2) if stride == 2 else x
                x = F.relu(out + shortcut)
        return {"layer3": x}


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _keras_conv(arrays: dict[str, np.ndarray], name: str) -> tuple[Tensor, Tensor]:
    """Kernel (out, in, H, W) and bias with the batch norm that follows folded in."""
    if name.startswith("conv_dw"):
        kernel = arrays[f"{name}.depthwise_kernel"].transpose(2, 3, 0, 1)
    else:
        kernel = arrays[f"{name}.kernel"].transpose(3, 2, 0, 1)
    gamma, beta, mean, variance = (
        arrays[f"{name}_bn.{part}"].astype(np.float64)
        for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    scale = gamma / np.sqrt(variance + 1e-3)
    weight = kernel.astype(np.float64) * scale[:, None, None, None]
    return (
        torch.from_numpy(weight.astype(np.float32)),
        torch.from_numpy((beta - mean * scale).astype(np.float32)),
    )


def _pad_same(x: Tensor, stride: int) -> Tensor:
    """TensorFlow's padding for a 3×3 kernel: an odd pixel goes right and below."""
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
