"""RepVGG-lite, the backbone: RepVGG-A0 without its last stage (paper, 2.1 and table 1).

Modules are named as in timm's ``repvgg_a0`` (``stem``, ``stages.S.B``, ``conv_kxk``,
``conv_1x1``, ``identity``), so that a checkpoint in those names loads as it is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

STEM_WIDTH = 48
STAGE_WIDTHS = (48, 96, 192)
STAGE_DEPTHS = (2, 4, 14)
STRIDE = 16
"""Pixels of the input per cell of the feature map."""


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm."""

    def __init__(self, in_width: int, out_width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class RepVGGBlock(nn.Module):
    """Sum of a 3×3, a 1×1 and, where shapes agree, an identity branch, then ReLU."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNorm(in_width, out_width, 3, stride)
        self.conv_1x1 = ConvNorm(in_width, out_width, 1, stride)
        same_shape = in_width == out_width and stride == 1
        self.identity = nn.BatchNorm2d(out_width) if same_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H / stride, W / stride), not negative."""
        out = self.conv_kxk(x) + self.conv_1x1(x)
        if self.identity is not None:
            out = out + self.identity(x)
        return torch.relu(out)


class FoldedBlock(nn.Module):
    """A RepVGG block in evaluation mode as one 3×3 convolution with bias, then ReLU."""

    def __init__(self, block: RepVGGBlock) -> None:
        super().__init__()
        conv = block.conv_kxk.conv
        weight, bias = _fold(conv.weight, block.conv_kxk.bn)
        # A 1×1 kernel is a 3×3 kernel with zeros around; identity is a 1×1 kernel of ones
        # on the diagonal.
        weight_1x1, bias_1x1 = _fold(block.conv_1x1.conv.weight, block.conv_1x1.bn)
        weight = weight + nn.functional.pad(weight_1x1, (1, 1, 1, 1))
        bias = bias + bias_1x1
        if block.identity is not None:
            diagonal = torch.eye(conv.out_channels).to(weight)[:, :, None, None]
            weight_id, bias_id = _fold(diagonal, block.identity)
            weight = weight + nn.functional.pad(weight_id, (1, 1, 1, 1))
            bias = bias + bias_id
        stride = conv.stride[0]
        self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride, 1)
        self.conv.weight.data.copy_(weight)
        assert self.conv.bias is not None
        self.conv.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class RepVGGLite(nn.Module):
    """Image to a map of 192-d local features at stride 16."""

    width = STAGE_WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.stem: nn.Module = RepVGGBlock(3, STEM_WIDTH, 2)
        stages: list[nn.Sequential] = []
        width = STEM_WIDTH
        for out_width, depth in zip(STAGE_WIDTHS, STAGE_DEPTHS, strict=True):
            blocks = [RepVGGBlock(width, out_width, 2)]
            blocks += [RepVGGBlock(out_width, out_width, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            width = out_width
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) standardised image to (B, 192, H / 16, W / 16)."""
        out: Tensor = self.stages(self.stem(image))
        return out

    def folded(self) -> RepVGGLite:
        """A copy with each block's branches folded into one convolution.

        Same output up to rounding, for evaluation only. The paper deploys the branches.
        """
        if self.training:
            raise ValueError("fold in evaluation mode only: batch statistics must be fixed")
        model = copy.deepcopy(self)
        assert isinstance(model.stem, RepVGGBlock)
        model.stem = FoldedBlock(model.stem)
        for stage in model.stages:
            assert isinstance(stage, nn.Sequential)
            for index, block in enumerate(stage):
                assert isinstance(block, RepVGGBlock)
                stage[index] = FoldedBlock(block)
        return model.eval()


def _fold(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias that equal ``bn`` after a convolution with ``weight``."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale


def standardise(image: Tensor) -> Tensor:
    """Image (B, 3, H, W), values 0…255, to zero mean per channel and unit deviation.

    By the image's own statistics instead of a data set's: exposure and colour cast, which a
    night or another camera changes most, are gone before the first convolution. One deviation
    for the three channels, so that a grey wall's channel noise is not blown up to full contrast.

    The mean is taken off twice: where bfloat16 rounds the first one, to half a grey level, the
    second, of what is left, takes off the rest. By night half a level is a tenth of the contrast.
    """
    centred = image - image.mean(dim=(2, 3), keepdim=True)
    centred = centred - centred.mean(dim=(2, 3), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return centred / (deviation + 1.0)
