"""The definitions, on cases small enough to work out by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vpr_lite_ros.evaluation import (
    PairTruth,
    RadiusTruth,
    findable,
    precision_recall,
    recall_at,
    roc_auc,
    score_closures,
)

SECOND = 10**9


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def seconds(*values: float) -> np.ndarray:
    return np.array([round(value * SECOND) for value in values], np.int64)


# -- who shows whose place -----------------------------------------------------------------------


def test_radius_includes_its_rim_and_counts_height() -> None:
    truth = RadiusTruth(np.array([[0, 0, 0], [3, 4, 0], [3, 4, 0.1], [9, 9, 9.0]]), 5.0)
    assert truth.same_place(0, ints(0, 1, 2, 3)).tolist() == [True, True, False, False]
    assert truth.definition == "taken within 5 m"


def test_radius_knows_nothing_of_frames_without_a_pose() -> None:
    truth = RadiusTruth(np.array([[0, 0, 0], [np.nan, 0, 0]]), 5.0)
    assert truth.known(ints(0, 1)).tolist() == [True, False]
    assert truth.same_place(0, ints(1)).tolist() == [False]
    assert truth.same_place(1, ints(1)).tolist() == [False]


def test_pairs_hold_in_both_directions() -> None:
    truth = PairTruth([(7, 2)])
    assert truth.same_place(7, ints(2, 3)).tolist() == [True, False]
    assert truth.same_place(2, ints(7)).tolist() == [True]
    assert truth.same_place(5, ints()).tolist() == []
    assert truth.known(ints(0, 99)).all()


# -- what could be found --------------------------------------------------------------------------


def test_findable_needs_an_earlier_keyframe_that_is_old_enough() -> None:
    # Out and back along a line: 0, 10, 20, 10, 0 m, a frame every 10 s.
    xyz = np.array([[0.0, 0, 0], [10, 0, 0], [20, 0, 0], [10, 0, 0], [0, 0, 0]])
    stamps = seconds(0, 10, 20, 30, 40)
    truth = RadiusTruth(xyz, 1.0)
    everything = [0, 1, 2, 3, 4]
    assert findable(truth, everything, stamps, 0).tolist() == [False, False, False, True, True]
    # Frame 3 saw its place 20 s before: exactly that gap is enough, a little more is not.
    assert findable(truth, everything, stamps, 20 * SECOND)[3]
    assert findable(truth, everything, stamps, 20 * SECOND + 1).tolist() == [False] * 4 + [True]
    # What is no keyframe cannot be found.
    assert findable(truth, [1, 2, 4], stamps, 0).tolist() == [False, False, False]


def test_findable_is_exact_for_stamps_of_today() -> None:
    today = 1_700_000_000 * SECOND
    stamps = np.array([today, today + 30 * SECOND - 1, today + 30 * SECOND])
    truth = RadiusTruth(np.zeros((3, 3)), 1.0)
    assert findable(truth, [0, 1, 2], stamps, 30 * SECOND).tolist() == [False, False, True]


# -- closures ------------------------------------------------------------------------------------


def test_score_of_closures_worked_by_hand() -> None:
    # Two laps of four places; the last frame is somewhere new.
    xyz = np.array([[x, 0.0, 0.0] for x in (0, 10, 20, 30, 0, 10, 20, 30, 99)])
    stamps = seconds(*range(0, 90, 10))
    score = score_closures(
        RadiusTruth(xyz, 2.0),
        # 4 and 5 rightly, 6 wrongly, 7 not at all, 8 wrongly.
        [(4, 0), (5, 1), (6, 3), (8, 0)],
        list(range(9)),
        stamps,
        30 * SECOND,
    )
    assert (score.closures, score.true_closures, score.unjudged) == (4, 2, 0)
    assert (score.queries, score.recalled) == (4, 2)
    assert (score.precision, score.recall) == (0.5, 0.5)


def test_closures_without_ground_truth_are_not_judged() -> None:
    xyz = np.array([[0.0, 0, 0], [np.nan] * 3, [0, 0, 0]])
    score = score_closures(
        RadiusTruth(xyz, 1.0), [(2, 0), (2, 1), (2, -1)], [0, 1, 2], seconds(0, 1, 2), 0
    )
    assert (score.closures, score.true_closures, score.unjudged) == (1, 1, 2)
    assert (score.precision, score.recall) == (1.0, 1.0)


def test_a_query_counts_once_however_often_it_is_answered() -> None:
    score = score_closures(
        PairTruth([(2, 0), (2, 1)]), [(2, 0), (2, 1)], [0, 1, 2], seconds(0, 1, 2), 0
    )
    assert (score.true_closures, score.recalled, score.queries) == (2, 1, 1)


def test_nothing_found_and_nothing_to_find_are_undefined_not_zero() -> None:
    apart = RadiusTruth(np.array([[0.0, 0, 0], [50, 0, 0]]), 1.0)
    score = score_closures(apart, [], [0, 1], seconds(0, 1), 0)
    assert math.isnan(score.precision) and math.isnan(score.recall)
    together = RadiusTruth(np.zeros((2, 3)), 1.0)
    score = score_closures(together, [], [0, 1], seconds(0, 1), 0)
    assert math.isnan(score.precision) and score.recall == 0.0
    assert math.isnan(score_closures(together, [], [], seconds(), 0).recall)


# -- curves ----------------------------------------------------------------------------------------


def test_curve_worked_by_hand() -> None:
    curve = precision_recall(np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, True, False, True]))
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert curve.precision.tolist() == [1, 1 / 2, 2 / 3, 3 / 4]
    assert curve.recall.tolist() == [1 / 3, 1 / 3, 2 / 3, 1]
    assert curve.auc == pytest.approx((1 + 0 + 2 / 3 + 3 / 4) / 3)
    assert curve.recall_at_100_precision == 1 / 3


def test_equal_scores_are_one_threshold_whatever_their_order() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.5])
    for correct in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]):
        curve = precision_recall(scores, np.array(correct, bool))
        assert curve.thresholds.tolist() == [0.9, 0.5]
        assert curve.precision.tolist() == [1, 0.5]
        assert curve.recall.tolist() == [0.5, 1]
        assert curve.auc == 0.75
        assert curve.recall_at_100_precision == 0.5


def test_a_tie_of_true_and_false_at_the_top_leaves_no_flawless_threshold() -> None:
    curve = precision_recall(np.array([0.9, 0.9, 0.1]), np.array([True, False, True]))
    assert curve.recall_at_100_precision == 0.0


def test_all_positive() -> None:
    curve = precision_recall(np.array([0.3, 0.2, 0.1]), np.ones(3, bool))
    assert curve.precision.tolist() == [1, 1, 1]
    assert curve.auc == pytest.approx(1.0)
    assert curve.recall_at_100_precision == 1.0


def test_no_positive_is_undefined() -> None:
    curve = precision_recall(np.array([0.3, 0.2]), np.zeros(2, bool))
    assert curve.precision.tolist() == [0, 0]
    assert math.isnan(curve.auc) and math.isnan(curve.recall_at_100_precision)


def test_no_answer_finds_nothing() -> None:
    curve = precision_recall(np.empty(0), np.empty(0, bool), positives=3)
    assert curve.auc == 0.0 and curve.recall_at_100_precision == 0.0
    assert math.isnan(precision_recall(np.empty(0), np.empty(0, bool)).auc)


def test_what_nobody_answered_lowers_recall_and_area() -> None:
    curve = precision_recall(np.array([0.9, 0.8]), np.ones(2, bool), positives=4)
    assert curve.recall.tolist() == [0.25, 0.5]
    assert curve.auc == 0.5
    assert curve.recall_at_100_precision == 0.5


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="as long as"):
        precision_recall(np.zeros(2), np.zeros(3, bool))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(np.array([math.nan]), np.ones(1, bool))
    with pytest.raises(ValueError, match="2 true answers, but only 1"):
        precision_recall(np.zeros(2), np.ones(2, bool), positives=1)


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(seed)
    # Few distinct scores: many ties.
    scores = rng.integers(0, 8, 40) / 8
    correct = rng.random(40) < scores
    correct[0] = True
    curve = precision_recall(scores, correct)
    precision, recall, thresholds = metrics.precision_recall_curve(correct, scores)
    # scikit-learn lets the threshold rise and adds the point (1, 0) at its end.
    assert curve.thresholds.tolist() == thresholds[::-1].tolist()
    np.testing.assert_array_equal(curve.precision, precision[-2::-1])
    np.testing.assert_array_equal(curve.recall, recall[-2::-1])
    assert curve.auc == pytest.approx(metrics.average_precision_score(correct, scores), abs=1e-15)


# -- ROC area --------------------------------------------------------------------------------------


def test_roc_area_worked_by_hand() -> None:
    # Of the four pairs of a true and a false one, three are in order.
    scores, true = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert roc_auc(scores, true) == 3 / 4
    # Equal scores are half in order.
    assert roc_auc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert roc_auc(np.array([0.9, 0.5, 0.5]), np.array([True, True, False])) == 1.5 / 2
    for all_alike in (np.ones(3, bool), np.zeros(3, bool), np.ones(0, bool)):
        assert math.isnan(roc_auc(np.arange(len(all_alike)) * 0.1, all_alike))


@pytest.mark.parametrize("seed", range(20))
def test_roc_area_agrees_with_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, 40) / 8
    true = rng.random(40) < scores
    true[:2] = True, False
    assert roc_auc(scores, true) == pytest.approx(metrics.roc_auc_score(true, scores), abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_near_frames_are_found_as_among_all_frames(seed: int) -> None:
    """``findable`` looks only where places can be near; that must leave none out."""
    rng = np.random.default_rng(seed)
    xyz = rng.normal(0, 6, (80, 3)).round(1)
    xyz[:40, 2] = 0
    xyz[rng.integers(0, 80, 5)] = np.nan
    stamps, queries = np.arange(80) * 10**9, np.arange(0, 80, 1 + seed % 2)
    truth = RadiusTruth(xyz, 2.0)
    expected = [
        any(
            np.linalg.norm(xyz[query] - xyz[other]) <= 2.0
            for other in queries
            if other < query and query - other >= 5
        )
        for query in queries
    ]
    assert findable(truth, queries.tolist(), stamps, 5 * 10**9).tolist() == expected
    assert any(expected)


# -- retrieval -------------------------------------------------------------------------------------


def test_recall_at_k_worked_by_hand() -> None:
    ranks = [
        [True],
        [False, True, True],
        [False] * 5 + [True],
        [False] * 20,
        [],
    ]
    assert recall_at(ranks) == {1: 1 / 5, 5: 2 / 5, 10: 3 / 5}
    assert recall_at(ranks, (2, 6)) == {2: 2 / 5, 6: 3 / 5}


def test_recall_at_k_without_queries_is_undefined() -> None:
    assert math.isnan(recall_at([], (1,))[1])
