"""Segmentation metrics: hand-made cases, medpy and MONAI as witnesses, the rules for empty
masks."""

import csv
import math

import numpy as np
import pytest

from medcl_train.metrics import (
    METRICS,
    dice,
    format_mean_sd,
    score_case,
    score_masks,
    summarize,
    surface_distances,
    write_csv,
)

SPACING = (10.0, 1.5, 1.25)


def _box(shape, low, high):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def _blobs(seed, shape=(6, 24, 28)):
    """Two overlapping ragged masks."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    masks = []
    for _ in range(2):
        center = np.array(shape) / 2 + random.uniform(-2, 2, 3)
        distance = (((grid - center) / np.array([2.2, 6, 8])) ** 2).sum(-1)
        masks.append(distance + random.normal(0, 0.25, shape) < 1)
    return masks


def test_dice_of_half_overlapping_boxes():
    a, b = _box((4, 8, 8), (0, 0, 0), (2, 4, 4)), _box((4, 8, 8), (1, 0, 0), (3, 4, 4))
    assert dice(a, b) == pytest.approx(2 * 16 / 64)
    assert dice(a, a) == 1.0
    assert dice(a, ~a) == 0.0


def test_distances_of_two_points_use_the_spacing():
    a, b = _box((3, 9, 9), (0, 0, 0), (1, 1, 1)), _box((3, 9, 9), (2, 4, 2), (3, 5, 3))
    expected = math.sqrt((2 * 10) ** 2 + (4 * 1.5) ** 2 + (2 * 1.25) ** 2)
    scores = score_masks(a, b, SPACING)
    assert scores["dice"] == 0.0
    for metric in ("hd", "hd95", "asd", "assd"):
        assert scores[metric] == pytest.approx(expected), metric


def test_shifted_squares_by_hand():
    """A 4x4 square moved by 2 along x: 12 surface pixels each."""
    a, b = _box((8, 10), (1, 1), (5, 5)), _box((8, 10), (1, 3), (5, 7))
    to_truth, to_prediction = surface_distances(a, b)
    by_hand = {
        (1, 1): 2, (1, 2): 1, (1, 3): 0, (1, 4): 0, (4, 1): 2, (4, 2): 1, (4, 3): 0, (4, 4): 0,
        (2, 1): 2, (3, 1): 2, (2, 4): 1, (3, 4): 1,
    }  # fmt: skip
    assert sorted(to_truth.tolist()) == sorted(by_hand.values())
    assert sorted(to_prediction.tolist()) == sorted(by_hand.values())
    scores = score_masks(a, b)
    assert scores["hd"] == 2.0
    assert scores["assd"] == pytest.approx(np.mean(list(by_hand.values())))


def test_directed_and_pooled_percentiles_differ_by_definition():
    a = _box((40, 40), (0, 0), (30, 30))
    b = a | _box((40, 40), (30, 10), (38, 11))  # a thin spike that only b has
    to_truth, to_prediction = surface_distances(a, b)
    pooled = score_masks(a, b, definition="pooled")
    directed = score_masks(a, b, definition="directed")
    both = np.concatenate([to_truth, to_prediction])
    assert pooled["hd95"] == pytest.approx(np.percentile(both, 95))
    assert directed["hd95"] == pytest.approx(np.percentile(to_prediction, 95))
    assert directed["hd95"] > pooled["hd95"]
    assert pooled["hd"] == directed["hd"] == 8.0


def test_asd_is_directed_from_prediction_to_truth():
    a = _box((20, 20), (5, 5), (15, 15))
    b = a | _box((20, 20), (15, 9), (19, 10))
    assert score_masks(a, b)["asd"] < score_masks(b, a)["asd"]
    assert score_masks(a, b)["assd"] == pytest.approx(score_masks(b, a)["assd"])


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_medpy(seed):
    binary = pytest.importorskip("medpy.metric.binary")
    a, b = _blobs(seed)
    scores = score_masks(a, b, SPACING)
    assert scores["dice"] == pytest.approx(binary.dc(a, b))
    assert scores["hd"] == pytest.approx(binary.hd(a, b, SPACING))
    assert scores["hd95"] == pytest.approx(binary.hd95(a, b, SPACING))
    assert scores["asd"] == pytest.approx(binary.asd(a, b, SPACING))
    assert scores["assd"] == pytest.approx(binary.assd(a, b, SPACING))


@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_monai(seed):
    monai = pytest.importorskip("monai.metrics")
    import torch

    a, b = _blobs(seed)
    p, g = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    directed = score_masks(a, b, SPACING, definition="directed")
    options = {"include_background": True, "spacing": SPACING}
    hd95 = monai.compute_hausdorff_distance(p, g, percentile=95, **options)
    assert directed["hd95"] == pytest.approx(float(hd95), rel=1e-5)
    hd = monai.compute_hausdorff_distance(p, g, **options)
    assert directed["hd"] == pytest.approx(float(hd), rel=1e-5)
    assd = monai.compute_average_surface_distance(p, g, symmetric=True, **options)
    assert directed["assd"] == pytest.approx(float(assd), rel=1e-5)
    asd = monai.compute_average_surface_distance(p, g, symmetric=False, **options)
    assert directed["asd"] == pytest.approx(float(asd), rel=1e-5)


def test_objects_at_the_image_border_have_a_surface_there():
    """Cropping to the masks must not change which voxels are surface."""
    binary = pytest.importorskip("medpy.metric.binary")
    a, b = _box((5, 9, 9), (0, 0, 0), (5, 6, 9)), _box((5, 9, 9), (1, 2, 0), (5, 9, 9))
    assert score_masks(a, b, SPACING)["assd"] == pytest.approx(binary.assd(a, b, SPACING))


# prediction empty?, truth empty?, rule -> dice, distance, missed
DIAGONAL = math.sqrt(40**2 + 6**2 + 5**2)
EMPTY_CASES = [
    (True, True, "nan", 1.0, 0.0, 0),
    (True, True, "worst", 1.0, 0.0, 0),
    (True, True, "ssl4mis", 0.0, 0.0, 0),
    (True, False, "nan", 0.0, math.nan, 1),
    (True, False, "worst", 0.0, DIAGONAL, 1),
    (True, False, "ssl4mis", 0.0, 0.0, 1),
    (False, True, "nan", 0.0, math.nan, 1),
    (False, True, "worst", 0.0, DIAGONAL, 1),
    (False, True, "ssl4mis", 0.0, math.nan, 1),
]


@pytest.mark.parametrize(("no_p", "no_g", "rule", "overlap", "distance", "missed"), EMPTY_CASES)
def test_empty_masks_follow_the_rule(no_p, no_g, rule, overlap, distance, missed):
    full, none = _box((4, 4, 4), (1, 1, 1), (3, 3, 3)), np.zeros((4, 4, 4), bool)
    scores = score_masks(none if no_p else full, none if no_g else full, SPACING, empty=rule)
    assert scores["dice"] == overlap
    assert scores["missed"] == missed
    for metric in ("hd", "hd95", "asd", "assd"):
        assert scores[metric] == pytest.approx(distance, nan_ok=True), metric


def test_wrong_input_is_refused_with_what_arrived():
    a = _box((4, 4, 4), (0, 0, 0), (2, 2, 2))
    with pytest.raises(ValueError, match=r"\(4, 4, 4\).*\(4, 4, 5\)"):
        score_masks(a, np.zeros((4, 4, 5), bool))
    with pytest.raises(ValueError, match="binary"):
        score_masks(a.astype(int) * 2, a)
    with pytest.raises(ValueError, match="definition"):
        score_masks(a, a, definition="mean")
    with pytest.raises(ValueError, match="empty"):
        score_masks(a, a, empty="drop")
    with pytest.raises(ValueError, match="3 positive"):
        score_masks(a, a, (1.0, 1.0))
    with pytest.raises(ValueError, match="not empty"):
        surface_distances(a, np.zeros_like(a))


def _rows():
    truth, prediction = np.zeros((2, 4, 10, 10), int)
    truth[1:3, 2:6, 2:6], truth[1:3, 7:9, 7:9] = 1, 2
    prediction[1:3, 2:6, 3:7] = 1
    options = {"num_classes": 3, "subject": "p1"}
    rows = score_case(prediction, truth, SPACING, case="p1_ed", **options)
    rows += score_case(truth, truth, SPACING, case="p1_es", **options)
    return rows + score_case(truth, truth, SPACING, num_classes=3, case="p2", missing_classes=(1,))


def test_a_case_gives_one_row_per_annotated_class():
    rows = _rows()
    assert [(r["case"], r["class"]) for r in rows] == [
        ("p1_ed", 1), ("p1_ed", 2), ("p1_es", 1), ("p1_es", 2), ("p2", 2),
    ]  # fmt: skip
    assert rows[0]["dice"] == pytest.approx(0.75)
    assert rows[0]["volume_ratio"] == 1.0
    assert rows[0]["true_ml"] == pytest.approx(32 * 10 * 1.5 * 1.25 / 1000)
    assert rows[1]["missed"] == 1 and rows[1]["volume_ratio"] == 0.0


def test_summary_averages_classes_of_a_case_first_and_counts_missed():
    summary = summarize(_rows(), {1: "ring", 2: "cavity"})
    ring, cavity = summary["classes"]["ring"], summary["classes"]["cavity"]
    assert ring["n_cases"] == 2 and cavity["n_cases"] == 3
    assert ring["dice"]["mean"] == pytest.approx((0.75 + 1) / 2)
    assert ring["dice"]["sd"] == pytest.approx(np.std([0.75, 1], ddof=1))
    assert cavity["n_missed"] == 1
    assert cavity["hd95"] == {"mean": 0.0, "sd": 0.0, "n": 2}  # the missed one has no distance
    per_case = [0.75 / 2, 1.0, 1.0]
    assert summary["mean"]["dice"]["mean"] == pytest.approx(np.mean(per_case))
    assert summary["by_subject"]["dice"]["mean"] == pytest.approx((np.mean(per_case[:2]) + 1) / 2)
    assert summary["by_subject"]["n_cases"] == 2


def test_csv_holds_every_row_and_leaves_no_temporary_file(tmp_path):
    rows = _rows()
    write_csv(tmp_path / "cases.csv", rows)
    with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for row, written in zip(rows, read, strict=True):
        for metric in METRICS:
            assert float(written[metric]) == pytest.approx(row[metric], rel=1e-5, nan_ok=True)
    assert [p.name for p in tmp_path.iterdir()] == ["cases.csv"]


def test_undefined_means_are_shown_as_a_dash():
    assert format_mean_sd({"mean": 0.8123, "sd": 0.034}) == "0.812 ± 0.034"
    assert format_mean_sd({"mean": math.nan, "sd": math.nan}) == "–"
