"""The networks: their size as published, their algebra against slow, obvious versions of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vpr_lite_ros.models.matcher import (
    PairMatcher,
    SelfAttention,
    log_sinkhorn,
    sinkhorn,
    without_idle_parts,
)
from vpr_lite_ros.models.netvlad import NetVLAD, Whitening, patch_cells, patch_grid
from vpr_lite_ros.models.place import PlaceNetwork
from vpr_lite_ros.models.repvgg import RepVGGLite, standardise

Networks = tuple[PlaceNetwork, PairMatcher]
MakePicture = Callable[..., NDArray[np.uint8]]

DIMENSION = 64


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _randomise(network: nn.Module) -> None:
    """Statistics as after training: without them batch norm does nothing and hides mistakes."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)


def _random_tokens(batch: int, patches: int, dimension: int = DIMENSION) -> Tensor:
    return F.normalize(torch.randn(batch, patches, dimension), dim=2)


# The backbone


def test_backbone_has_the_published_number_of_parameters() -> None:
    backbone = RepVGGLite().eval()
    assert _count(backbone) == pytest.approx(5.37e6, abs=0.005e6)
    assert _count(backbone.folded()) == pytest.approx(4.82e6, abs=0.005e6)


def test_backbone_has_the_published_multiply_adds_and_map() -> None:
    with torch.device("meta"):  # counts operations without doing them
        backbone = RepVGGLite().eval()
        image = torch.empty(1, 3, 480, 640)
        with FlopCounterMode(display=False) as counter:
            features = backbone(image)
    assert counter.get_total_flops() / 2 == pytest.approx(8.5e9, abs=0.05e9)
    assert features.shape == (1, 192, 30, 40)


@pytest.mark.parametrize(
    ("stage", "width", "blocks", "shape"),
    [(0, 48, 2, (120, 160)), (1, 96, 4, (60, 80)), (2, 192, 14, (30, 40))],
)
def test_stages_have_the_published_widths(
    stage: int, width: int, blocks: int, shape: tuple[int, int]
) -> None:
    with torch.device("meta"):
        backbone = RepVGGLite()
        x = backbone.stem(torch.empty(1, 3, 480, 640))
        assert x.shape == (1, 48, 240, 320)
        for index in range(stage + 1):
            x = backbone.stages[index](x)
    sequence = backbone.stages[stage]
    assert isinstance(sequence, nn.Sequential) and len(sequence) == blocks
    assert x.shape == (1, width, *shape)


def test_folding_changes_nothing_but_rounding() -> None:
    backbone = RepVGGLite()
    _randomise(backbone)
    backbone.eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        branches, folded = backbone(image), backbone.folded()(image)
    assert branches.abs().max() > 0
    assert (branches - folded).norm() / branches.norm() <= 1e-5


def test_folding_returns_a_copy_and_refuses_training_mode() -> None:
    backbone = RepVGGLite()
    with pytest.raises(ValueError, match="evaluation mode"):
        backbone.train().folded()
    before = {name: tensor.clone() for name, tensor in backbone.eval().state_dict().items()}
    for parameter in backbone.folded().parameters():
        parameter.data.zero_()
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_standardise_takes_out_exposure_and_colour_cast() -> None:
    image = torch.rand(2, 3, 24, 32) * 255
    cast = image * 0.4 + torch.tensor([5.0, 30.0, 60.0])[:, None, None]
    first, second = standardise(image), standardise(cast)
    assert first.mean(dim=(2, 3)).abs().max() < 1e-5
    assert first.square().mean(dim=(1, 2, 3)) == pytest.approx(torch.ones(2).numpy(), rel=0.05)
    assert torch.allclose(first, second, atol=0.1)
    assert standardise(torch.full((1, 3, 8, 8), 77.0)).abs().max() == 0  # no division by zero


# NetVLAD and patches


def _slow_vlad(
    vlad: NetVLAD, features: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Equation 1, before PCA, as it is written, one cluster and one cell at a time."""
    centroids = vlad.centroids.detach().double().numpy()
    rows = []
    for k, centroid in enumerate(centroids):
        total = np.zeros_like(centroid)
        for feature, share in zip(features, shares, strict=True):
            total += share[k] * (feature - centroid)
        rows.append(total / np.linalg.norm(total))
    flat = np.concatenate(rows)
    return np.asarray(flat / np.linalg.norm(flat))


def _projected(vlad: NDArray[np.float64], linear: nn.Linear) -> NDArray[np.float64]:
    projected = linear.weight.detach().double().numpy() @ vlad + linear.bias.detach().numpy()
    return np.asarray(projected / np.linalg.norm(projected))


def test_there_are_1131_patches_at_the_published_input() -> None:
    assert patch_grid(30, 40) == (29, 39)
    cells, centres = patch_cells(30, 40)
    assert cells.shape == (1131, 4) and centres.shape == (1131, 2)
    assert sorted(set(cells.flatten().tolist())) == list(range(1200))
    with pytest.raises(ValueError, match="1132"):
        PlaceNetwork(max_patches=1132)
    with pytest.raises(ValueError, match="multiples of 16"):
        PlaceNetwork(image_size=(640, 470))


def test_patch_cells_are_neighbours_and_centres_lie_between_them() -> None:
    width, height = 160, 128
    cells, centres = patch_cells(height // 16, width // 16)
    for four, centre in zip(cells.tolist(), centres.tolist(), strict=True):
        # Cell (row, column) is centred on input pixel (16 row, 16 column).
        pixels = np.array([(16 * (cell % 10), 16 * (cell // 10)) for cell in four])
        assert np.ptp(pixels, axis=0).tolist() == [16, 16] and len(set(four)) == 4
        assert np.array(centre) * (width, height) == pytest.approx(pixels.mean(axis=0))


def test_cells_are_centred_where_patch_centres_assume() -> None:
    """The response to one bright pixel is symmetric about 16 times the cell's number."""
    backbone = RepVGGLite().eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0)
    image = torch.zeros(1, 3, 12 * 16 + 1, 12 * 16 + 1)
    image[:, :, 6 * 16, 6 * 16] = 1
    with torch.no_grad():
        response = backbone.double()(image.double())[0, 0]
    assert torch.allclose(response, response.flip(0), rtol=1e-9)
    assert torch.allclose(response, response.flip(1), rtol=1e-9)
    assert response.argmax() == 6 * response.shape[1] + 6


def test_global_descriptor_and_patches_equal_a_slow_vlad(
    tiny_networks: Networks, make_picture: MakePicture
) -> None:
    place, _ = tiny_networks
    image = torch.from_numpy(make_picture(1)[None])
    with torch.no_grad():
        descriptor, tokens, centres = place(image)
        features = place.local_features(image)
        cells = F.normalize(features, dim=2)
        shares = place.vlad.soft_assign(cells)
        # At half the resolution: each pixel the mean of four.
        height, width = image.shape[1:3]
        fours = image.double().reshape(1, height // 2, 2, width // 2, 2, 3).mean(dim=(2, 4))
        coarse = F.normalize(place.local_features(fours), dim=2)
        coarse_shares = place.vlad.soft_assign(coarse)
    unit, share = cells[0].double().numpy(), shares[0].double().numpy()
    of_half = _slow_vlad(place.vlad, coarse[0].double().numpy(), coarse_shares[0].double().numpy())
    vlads = np.concatenate([_slow_vlad(place.vlad, unit, share), of_half])
    assert descriptor[0, 0].numpy() == pytest.approx(_projected(vlads, place.whole), abs=2e-4)
    # Of 10 columns the left part has the first six; of the five at half the resolution, three.
    for part, fine, few in ((1, slice(0, 6), slice(0, 3)), (2, slice(4, 10), slice(2, 5))):
        both = []
        for map_cells, map_shares, part_columns, wide in (
            (cells, shares, fine, 10),
            (coarse, coarse_shares, few, 5),
        ):
            chosen = [
                values[0].double().reshape(-1, wide, values.shape[2])[:, part_columns].flatten(0, 1)
                for values in (map_cells, map_shares)
            ]
            both.append(_slow_vlad(place.vlad, *(values.numpy() for values in chosen)))
        expected = _projected(np.concatenate(both), place.whole)
        assert descriptor[0, part].numpy() == pytest.approx(expected, abs=2e-4)
    assert tokens.shape == (1, place.max_patches, place.vlad.dimension)
    columns, rows = (side // 16 for side in place.image_size)
    # Untrained self-attention is the identity, so tokens are the patches' descriptors.
    for token, (x, y) in zip(tokens[0].numpy(), centres[0].tolist(), strict=True):
        column, row = round(x * columns - 0.5), round(y * rows - 0.5)
        four = [(row + dr) * columns + column + dc for dr in (0, 1) for dc in (0, 1)]
        patch = _projected(_slow_vlad(place.vlad, unit[four], share[four]), place.vlad.pca)
        assert token == pytest.approx(patch, abs=2e-4)


def test_the_most_salient_patches_are_kept(
    tiny_networks: Networks, make_picture: MakePicture
) -> None:
    place, _ = tiny_networks
    with torch.no_grad():
        features = place.local_features(torch.from_numpy(make_picture(2)[None]))
        chosen = place.salient_patches(features).tolist()
    columns, rows = (side // 16 for side in place.image_size)
    strength = features[0].norm(dim=1).reshape(rows, columns)
    salience = strength[:-1, :-1] + strength[1:, :-1] + strength[:-1, 1:] + strength[1:, 1:]
    best = salience.flatten().argsort(descending=True)[: place.max_patches].tolist()
    assert set(chosen) == set(best)


def test_set_clusters_assigns_by_distance() -> None:
    vlad = NetVLAD(width=16, clusters=5, dimension=8)
    centroids, features = torch.randn(5, 16), torch.randn(30, 16)
    vlad.set_clusters(centroids, sharpness=3.0)
    expected = torch.softmax(-3.0 * torch.cdist(features, centroids).square(), dim=1)
    assert torch.allclose(vlad.soft_assign(features), expected, atol=1e-4)


def test_whitening_whitens() -> None:
    whitening = Whitening(12, 6)
    data = torch.randn(500, 12) @ torch.randn(12, 12) + torch.randn(12)
    mean = data.mean(dim=0)
    _, deviations, components = torch.linalg.svd(data - mean, full_matrices=False)
    whitening.set(mean, components[:6], (deviations**2 / 500)[:6])
    white = F.linear(data, whitening.weight, whitening.bias).detach()
    assert torch.allclose(whitening(data), F.normalize(white, dim=1), atol=1e-5)
    assert white.mean(dim=0).abs().max() < 1e-4
    assert torch.allclose(white.T @ white / 500, torch.eye(6), atol=1e-3)


# The matcher


def test_matcher_has_the_published_number_of_parameters() -> None:
    count = _count(SelfAttention(512)) + _count(PairMatcher(512))
    assert count == pytest.approx(5.1e6, abs=0.1e6)


def test_untrained_matcher_passes_descriptors_through() -> None:
    patches, centres = _random_tokens(1, 15), torch.rand(1, 15, 2)
    others = _random_tokens(3, 12)
    with torch.no_grad():
        assert torch.equal(SelfAttention(DIMENSION)(patches, centres), patches)
        match = PairMatcher(DIMENSION)
        x0, x1 = match.cross(patches, others)
        assert torch.equal(x0, patches.expand(3, -1, -1)) and torch.equal(x1, others)
        plan = match.log_plan(patches, others)
        temperature = match.log_temperature.exp()
        raw = log_sinkhorn(
            temperature * torch.einsum("nd,bmd->bnm", patches[0], others),
            temperature * match.dustbin,
            match.sinkhorn_iterations,
        )
    assert torch.allclose(plan, raw, atol=1e-4)


def _slow_sinkhorn(
    scores: NDArray[np.float64], dustbin: float, iterations: int
) -> NDArray[np.float64]:
    """Transport plan (N + 1, M + 1) by scaling rows and columns of a matrix, no logarithms."""
    rows, columns = scores.shape
    kernel = np.full((rows + 1, columns + 1), math.exp(dustbin))
    kernel[:rows, :columns] = np.exp(scores)
    row_mass = np.append(np.ones(rows), columns)
    column_mass = np.append(np.ones(columns), rows)
    for _ in range(iterations):
        kernel *= (row_mass / kernel.sum(axis=1))[:, None]
        kernel *= column_mass / kernel.sum(axis=0)
    return kernel


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (9, 14), (14, 9), (1, 1)])
def test_sinkhorn_equals_a_slow_one_in_double_precision(rows: int, columns: int) -> None:
    scores = torch.randn(3, rows, columns) * 5
    dustbin = torch.tensor(2.0)
    plan = log_sinkhorn(scores, dustbin, 20).exp().double().numpy()
    assert plan.shape == (3, rows + 1, columns + 1)
    for one, score in zip(plan, scores.double().numpy(), strict=True):
        assert one == pytest.approx(_slow_sinkhorn(score, 2.0, 20), abs=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (9, 14), (14, 9)])
def test_sinkhorn_gives_each_patch_mass_one(rows: int, columns: int) -> None:
    plan = log_sinkhorn(torch.randn(2, rows, columns) * 3, torch.tensor(1.0), 200).exp()
    to_rows, to_columns = plan.sum(dim=2), plan.sum(dim=1)
    assert torch.allclose(to_rows[:, :-1], torch.ones(2, rows), atol=1e-3)
    assert torch.allclose(to_columns[:, :-1], torch.ones(2, columns), atol=1e-3)
    assert torch.allclose(to_rows[:, -1], torch.tensor(float(columns)), atol=1e-2)
    assert torch.allclose(to_columns[:, -1], torch.tensor(float(rows)), atol=1e-2)


def test_sinkhorn_survives_scores_that_overflow_outside_log_space() -> None:
    plan = log_sinkhorn(torch.randn(1, 10, 10) * 300, torch.tensor(-100.0), 20).exp()
    assert torch.isfinite(plan).all()
    assert torch.allclose(plan.sum(dim=1)[:, :-1], torch.ones(1, 10), atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (9, 14), (1, 30)])
@pytest.mark.parametrize("spread", [0.1, 5.0, 40.0])
def test_sinkhorn_without_logarithms_is_the_same(rows: int, columns: int, spread: float) -> None:
    scores = (torch.randn(3, rows, columns) * spread).clamp(max=70)
    dustbin = torch.tensor(12.0)
    logarithmic = log_sinkhorn(scores, dustbin, 20).exp()[:, :-1, :-1]
    assert torch.allclose(sinkhorn(scores, dustbin, 20), logarithmic, atol=2e-5)


def test_sinkhorn_stays_finite_whatever_the_scores() -> None:
    for value in (-1e4, 1e4):
        plan = sinkhorn(torch.full((1, 300, 300), value), torch.tensor(0.0), 20)
        assert torch.isfinite(plan).all()
        assert (plan >= 0).all() and (plan.sum(dim=2) <= 1 + 1e-3).all()
        assert (plan.sum() > 290) == (value > 0)


def test_what_is_untrained_is_left_out_and_nothing_else() -> None:
    query, candidates = _random_tokens(1, 10), _random_tokens(4, 12)
    match, attention = PairMatcher(DIMENSION).eval(), SelfAttention(DIMENSION).eval()
    lean = without_idle_parts(match)
    assert lean.cross.skipped and isinstance(lean.project, nn.Identity)
    assert without_idle_parts(attention).skipped
    assert not match.cross.skipped and isinstance(match.project, nn.Linear), "it is a copy"
    with torch.no_grad():
        for full, without in zip(match(query, candidates), lean(query, candidates), strict=True):
            assert torch.allclose(full, without, atol=1e-5)
        match.cross.residual.out.bias[3] = 1e-3
        for layer in (attention.position.layers[-1], match.project):
            assert isinstance(layer, nn.Linear)
            layer.bias[3] = 1e-3
    trained = without_idle_parts(match)
    assert not trained.cross.skipped and isinstance(trained.project, nn.Linear)
    assert not without_idle_parts(attention).skipped


def test_sinkhorn_follows_a_permutation() -> None:
    scores, dustbin = torch.randn(2, 8, 11) * 4, torch.tensor(1.0)
    rows, columns = torch.randperm(8), torch.randperm(11)
    plan = log_sinkhorn(scores, dustbin, 20)
    moved = log_sinkhorn(scores[:, rows][:, :, columns], dustbin, 20)
    expected = plan[:, torch.cat([rows, torch.tensor([8])])]
    expected = expected[:, :, torch.cat([columns, torch.tensor([11])])]
    assert torch.allclose(moved, expected, atol=1e-4)


def test_each_candidate_is_matched_as_if_alone() -> None:
    match = PairMatcher(DIMENSION).eval()
    for layer in match.modules():  # trained or not must not matter here
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.1)
    query, candidates = _random_tokens(1, 10), _random_tokens(4, 12)
    with torch.no_grad():
        scores, assignment = match(query, candidates)
        for index in range(4):
            score, alone = match(query, candidates[index : index + 1])
            assert torch.allclose(score, scores[index], atol=1e-5)
            assert torch.allclose(alone[0], assignment[index], atol=1e-5)


def test_scores_lie_between_0_and_1_and_identical_images_score_highest(
    tiny_networks: Networks, make_picture: MakePicture
) -> None:
    place, match = tiny_networks
    with torch.no_grad():
        tokens = torch.cat([place(torch.from_numpy(make_picture(i)[None]))[1] for i in range(5)])
        for index in range(5):
            scores, assignment = match(tokens[index : index + 1], tokens)
            assert scores.min() >= 0 and scores.max() <= 1 + 1e-5
            assert assignment.min() >= 0 and assignment.max() <= 1 + 1e-5
            others = torch.cat([scores[:index], scores[index + 1 :]])
            assert scores[index] > 0.8 and scores[index] > others.max() + 0.1
            assert torch.equal(assignment[index].argmax(dim=1), torch.arange(place.max_patches))


def test_scores_stay_below_1_for_any_similarity() -> None:
    match = PairMatcher(DIMENSION)
    same = F.normalize(torch.randn(1, 1, DIMENSION), dim=2)
    for rows, columns in ((5, 5), (5, 30), (30, 5)):  # all patches look alike
        with torch.no_grad():
            scores, _ = match(same.expand(1, rows, -1), same.expand(1, columns, -1))
        assert 0 <= scores.item() <= 1 + 1e-5
