"""The trainable matcher: attention and optimal transport (paper, 2.3 and 2.4).

It is cut in two where an image ends: ``SelfAttention`` looks at one image and runs once a
keyframe; ``PairMatcher`` looks at two and runs once a candidate.

Untrained, the matcher passes descriptors through: every residual branch ends in zeros and the
final projection is the identity, so what is transported are the raw patch descriptors. What would
compute these zeros can be left out (``without_idle_parts``).
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

HEADS = 4
_MOST_EXPONENT = 60.0
"""Of the transport's kernel: sums of float32 numbers below exp(60), scaled twice, stay finite."""

Network = TypeVar("Network", bound=nn.Module)


class PositionalEncoding(nn.Module):
    """Patch centres (…, 2), fractions of the image, to what is added to descriptors (…, D)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        widths = (2, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for in_width, out_width in itertools.pairwise(widths):
            layers += [nn.Linear(in_width, out_width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _zeros(nn.Linear(widths[-1], dimension)))

    def forward(self, centres: Tensor) -> Tensor:
        out: Tensor = self.layers(2 * centres - 1)
        return out


class Residual(nn.Module):
    """``x`` plus an MLP of ``x`` and the message that attention brought it."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dimension, 2 * dimension)
        self.norm = nn.LayerNorm(2 * dimension)
        self.out = _zeros(nn.Linear(2 * dimension, dimension))

    def forward(self, x: Tensor, message: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([x, message], dim=-1))
        # In float32: float16 overflows where squares are summed.
        normal = self.norm(hidden.float()).to(hidden.dtype)
        out: Tensor = x + self.out(torch.relu(normal))
        return out

    def adds_nothing(self) -> bool:
        """Whether what is added to ``x`` is zero for any message."""
        return not (self.out.weight.any() or self.out.bias.any())


class SelfAttention(nn.Module):
    """Attention among the patches of one image (equation 3), after the positional encoding.

    The two spaces f and g in which patches are compared have half the width of the values, as
    the paper leaves their width free and comparing needs less than telling.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.position = PositionalEncoding(dimension)
        self.f = nn.Linear(dimension, dimension // 2)
        self.g = nn.Linear(dimension, dimension // 2)
        self.value = nn.Linear(dimension, dimension)
        self.merge = nn.Linear(dimension, dimension)
        self.residual = Residual(dimension)
        self.skipped = False

    def is_idle(self) -> bool:
        """Whether patches come out as they go in."""
        last = self.position.layers[-1]
        return self.residual.adds_nothing() and not any(one.any() for one in last.parameters())

    def forward(self, patches: Tensor, centres: Tensor) -> Tensor:
        """Descriptors (B, N, D) and centres (B, N, 2) to tokens (B, N, D)."""
        if self.skipped:
            return patches
        precision = self.value.weight.dtype
        x = patches.to(precision) + self.position(centres.to(precision))
        f, g, value = (_split_heads(layer(x)) for layer in (self.f, self.g, self.value))
        weights = torch.softmax(f @ g.transpose(-1, -2) / math.sqrt(f.shape[-1]), dim=-1)
        out: Tensor = self.residual(x, self.merge(_join_heads(weights @ value)))
        return out


class CrossAttention(nn.Module):
    """Each patch looks at the other image's; one set of weights serves both directions."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.key = nn.Linear(dimension, dimension)
        self.value = nn.Linear(dimension, dimension)
        self.merge = nn.Linear(dimension, dimension)
        self.residual = Residual(dimension)
        self.skipped = False

    def is_idle(self) -> bool:
        """Whether tokens come out as they go in."""
        return self.residual.adds_nothing()

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (1, N, D) and (B, M, D) to (B, N, D), or (1, N, D) if skipped, and (B, M, D)."""
        if self.skipped:
            return x0, x1
        precision = self.value.weight.dtype
        x0, x1 = x0.to(precision), x1.to(precision)
        key0, key1 = _split_heads(self.key(x0)), _split_heads(self.key(x1))
        value0, value1 = _split_heads(self.value(x0)), _split_heads(self.value(x1))
        similarity = key0 @ key1.transpose(-1, -2) / math.sqrt(key0.shape[-1])
        message0 = torch.softmax(similarity, dim=-1) @ value1
        message1 = torch.softmax(similarity.transpose(-1, -2), dim=-1) @ value0
        x0 = x0.expand(x1.shape[0], -1, -1)
        return (
            self.residual(x0, self.merge(_join_heads(message0))),
            self.residual(x1, self.merge(_join_heads(message1))),
        )


class PairMatcher(nn.Module):
    """Cross-attention, final projection, inner products and optimal transport (equation 4)."""

    def __init__(
        self,
        dimension: int = 512,
        sinkhorn_iterations: int = 10,
        temperature: float = 40.0,
        dustbin: float = 0.6,
    ) -> None:
        super().__init__()
        self.cross = CrossAttention(dimension)
        self.project: nn.Module = nn.Linear(dimension, dimension)
        nn.init.eye_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        # Inner products of unit vectors lie in −1…1; the temperature spreads them so that
        # transport can tell them apart, the dustbin is the similarity that is no match.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.dustbin = nn.Parameter(torch.tensor(dustbin))
        self.sinkhorn_iterations = sinkhorn_iterations

    def forward(self, query: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Match one query with B candidates.

        Parameters
        ----------
        query
            (1, N, D) tokens of one image.
        candidates
            (B, M, D) tokens of the others.

        Returns
        -------
        scores
            (B,) transported mass between real patches, 0…1.
        assignment
            (B, N, M) share of each query patch that goes to each candidate patch.
        """
        assignment = sinkhorn(*self._scores(*self.cross(query, candidates)))
        fewer = min(query.shape[1], candidates.shape[1])
        return assignment.sum(dim=(1, 2)) / fewer, assignment

    def log_plan(self, query: Tensor, candidates: Tensor) -> Tensor:
        """(B, N + 1, M + 1) log of the transport plan, dustbins last (for the loss)."""
        return self.transport(*self.cross(query, candidates))

    def transport(self, x0: Tensor, x1: Tensor) -> Tensor:
        """``log_plan`` of tokens (B, N, D) and (B, M, D) that have seen each other."""
        return log_sinkhorn(*self._scores(x0, x1))

    def _scores(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, int]:
        """What ``sinkhorn`` takes, in float32: exponentials overflow float16."""
        temperature = self.log_temperature.exp()
        similarity = self.project(x0).float() @ self.project(x1).float().transpose(1, 2)
        return similarity * temperature, self.dustbin * temperature, self.sinkhorn_iterations


def without_idle_parts(network: Network) -> Network:
    """A copy, to run, that skips attention and projections which change nothing."""
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.skipped = part.is_idle()
        elif isinstance(part, PairMatcher) and isinstance(part.project, nn.Linear):
            weight, bias = part.project.weight, part.project.bias
            if torch.equal(weight, torch.eye(len(weight)).to(weight)) and not bias.any():
                part.project = nn.Identity()
    return network


def sinkhorn(scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    """The plan of ``log_sinkhorn`` between real patches, (B, N, M), without its logarithms.

    Of 20 iterations three times as fast in OpenVINO, twelve times in ONNX Runtime: exponentials
    are taken once and not in each. Scores count from the dustbin's, so that no row and no column
    can vanish: each has a dustbin of 1. Products are summed by hand: matrix products are rounded to
    bfloat16 where the hardware has it, and the error grows from one iteration to the next.
    """
    kernel = torch.exp((scores - dustbin).clamp(max=_MOST_EXPONENT))
    rows, columns = scores.shape[1], scores.shape[2]
    v = torch.ones_like(kernel[:, 0, :])
    v_dustbin = torch.ones_like(kernel[:, 0, :1])
    one = torch.ones(1).to(kernel)  # of the number 1, export would make two operators
    for _ in range(iterations):
        u = one / ((kernel * v[:, None, :]).sum(dim=2) + v_dustbin)
        u_dustbin = columns * one / (v.sum(dim=1, keepdim=True) + v_dustbin)
        v = one / ((kernel * u[:, :, None]).sum(dim=1) + u_dustbin)
        v_dustbin = rows * one / (u.sum(dim=1, keepdim=True) + u_dustbin)
    return u[:, :, None] * kernel * v[:, None, :]


def log_sinkhorn(scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    """Entropy-regularised optimal transport with dustbins, in log space.

    ``scores`` (B, N, M), ``dustbin`` a scalar score. Each patch has mass 1, the two dustbins
    can take the other side's whole mass. Returns the log of the plan, (B, N + 1, M + 1).
    """
    rows, columns = scores.shape[1], scores.shape[2]
    right = dustbin.expand(scores.shape[0], rows, 1)
    below = dustbin.expand(scores.shape[0], 1, columns + 1)
    scores = torch.cat([torch.cat([scores, right], dim=2), below], dim=1)
    log_mass0 = torch.zeros(rows + 1).to(scores)
    log_mass0[-1] = math.log(columns)
    log_mass1 = torch.zeros(columns + 1).to(scores)
    log_mass1[-1] = math.log(rows)
    v = torch.zeros_like(scores[:, 0, :])
    u = torch.zeros_like(scores[:, :, 0])
    for _ in range(iterations):
        u = log_mass0 - torch.logsumexp(scores + v[:, None, :], dim=2)
        v = log_mass1 - torch.logsumexp(scores + u[:, :, None], dim=1)
    return scores + u[:, :, None] + v[:, None, :]


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _split_heads(x: Tensor) -> Tensor:
    """(B, N, D) to (B, heads, N, D / heads)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
