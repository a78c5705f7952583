"""DI, JA and AC of 2-D images: by hand, MONAI as a witness, empty masks, both summaries."""

import csv
import math

import numpy as np
import pytest

from medcl_train.metrics import (
    IMAGE_METRICS,
    dice,
    image_table_lines,
    score_image,
    summarize_images,
    write_image_csv,
)


def halves(*widths, size=(4, 8)):
    """Class i in the i-th stripe of columns of these widths."""
    return np.repeat(np.arange(len(widths)), widths)[None].repeat(size[0], 0)


def test_by_hand():
    truth, prediction = halves(4, 4), halves(2, 6)
    rows = score_image(prediction, truth, num_classes=2, case="a")
    background, lesion = rows
    assert lesion["dice"] == pytest.approx(2 * 4 / 10) and lesion["jaccard"] == pytest.approx(4 / 6)
    assert background["dice"] == pytest.approx(2 * 2 / 6)
    assert background["jaccard"] == pytest.approx(2 / 4)
    assert background["accuracy"] == lesion["accuracy"] == 0.75
    assert lesion["predicted_share"] == 0.75 and lesion["true_share"] == 0.5
    assert lesion["subject"] == "a" and not lesion["missed"]


def test_three_classes_against_masks_one_by_one():
    random = np.random.default_rng(0)
    truth, prediction = random.integers(0, 3, (2, 13, 17)).astype(np.uint8)
    for row in score_image(prediction, truth, num_classes=3, case="a"):
        p, g = prediction == row["class"], truth == row["class"]
        assert row["dice"] == pytest.approx(dice(p, g))
        assert row["jaccard"] == pytest.approx((p & g).sum() / (p | g).sum())
        assert row["accuracy"] == pytest.approx((p == g).mean())


def test_agrees_with_monai():
    monai = pytest.importorskip("monai.metrics")
    import torch

    random = np.random.default_rng(1)
    truth, prediction = random.integers(0, 3, (2, 20, 20))
    p, g = (
        torch.nn.functional.one_hot(torch.from_numpy(x), 3).movedim(-1, 0)[None]
        for x in (prediction, truth)
    )
    rows = score_image(prediction, truth, num_classes=3, case="a")
    for metric, other in (("dice", monai.compute_dice), ("jaccard", monai.compute_iou)):
        assert [r[metric] for r in rows] == pytest.approx(other(p, g)[0].tolist(), rel=1e-6)


# prediction empty?, truth empty?, rule -> dice and jaccard of the lesion, missed
EMPTY = [
    (True, True, "nan", 1.0, 0),
    (True, True, "worst", 1.0, 0),
    (True, True, "ssl4mis", 0.0, 0),
    (True, False, "nan", 0.0, 1),
    (True, False, "ssl4mis", 0.0, 1),
    (False, True, "nan", 0.0, 1),
    (False, True, "ssl4mis", 0.0, 1),
]


@pytest.mark.parametrize(("no_p", "no_g", "rule", "overlap", "missed"), EMPTY)
def test_empty_masks_follow_the_rule(no_p, no_g, rule, overlap, missed):
    full, none = halves(4, 4), np.zeros((4, 8), int)
    _, row = score_image(
        none if no_p else full, none if no_g else full, num_classes=2, case="a", empty=rule
    )
    assert (row["dice"], row["jaccard"], row["missed"]) == (overlap, overlap, missed)
    assert row["accuracy"] == (1.0 if no_p == no_g else 0.5)


def test_an_image_without_background_has_a_macro_score_too():
    full = np.ones((4, 8), int)
    rows = score_image(full, full, num_classes=2, case="a")
    assert [r["dice"] for r in rows] == [1.0, 1.0]


def rows_of_three():
    truth = halves(2, 3, 3)
    pairs = (("a", "s1", truth), ("b", "s1", halves(2, 6)), ("c", "s2", halves(4, 2, 2)))
    return [
        row
        for case, subject, prediction in pairs
        for row in score_image(prediction, truth, num_classes=3, case=case, subject=subject)
    ]


def test_summaries_with_and_without_background():
    rows = rows_of_three()
    summary = summarize_images(rows, {0: "skin", 1: "spot", 2: "rim"})
    assert list(summary["classes"]) == ["spot", "rim"]
    spot = [r["dice"] for r in rows if r["class"] == 1]
    assert summary["classes"]["spot"]["dice"]["mean"] == pytest.approx(np.mean(spot))
    assert summary["classes"]["rim"]["n_missed"] == 1  # image b has none
    by_image = np.array([r["jaccard"] for r in rows]).reshape(3, 3)  # image, class
    foreground, macro = by_image[:, 1:].mean(1), by_image.mean(1)
    for entry, values in ((summary["mean"], foreground), (summary["macro"], macro)):
        assert entry["jaccard"]["mean"] == pytest.approx(values.mean())
        assert entry["jaccard"]["sd"] == pytest.approx(values.std(ddof=1))
        assert entry["n_cases"] == 3 and entry["n_missed"] == 1
    subjects = [foreground[:2].mean(), foreground[2]]
    assert summary["by_subject"]["jaccard"]["mean"] == pytest.approx(np.mean(subjects))
    lines = image_table_lines(summary)
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "spot",
        "rim",
        "foreground",
        "with background",
    ]
    assert f"{foreground.mean():.3f}" in lines[3] and f"{macro.mean():.3f}" in lines[4]


def test_csv_has_a_row_per_image_and_class(tmp_path):
    rows = rows_of_three()
    write_image_csv(tmp_path / "images.csv", rows)
    with open(tmp_path / "images.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [(r["case"], int(r["class"])) for r in read] == [(c, k) for c in "abc" for k in range(3)]
    for row, written in zip(rows, read, strict=True):
        for metric in IMAGE_METRICS:
            assert math.isclose(float(written[metric]), row[metric], rel_tol=1e-5)


def test_wrong_input_is_refused_with_what_arrived():
    mask = halves(4, 4)
    with pytest.raises(ValueError, match=r"photo.*\(4, 8\).*\(4, 7\)"):
        score_image(mask, mask[:, 1:], num_classes=2, case="photo")
    with pytest.raises(ValueError, match=r"truth must hold integers 0\.\.1, got int64 0\.\.255"):
        score_image(mask, mask * 255, num_classes=2, case="photo")
    with pytest.raises(ValueError, match="float"):
        score_image(mask.astype(float), mask, num_classes=2, case="photo")
    with pytest.raises(ValueError, match="empty must be one of"):
        score_image(mask, mask, num_classes=2, case="photo", empty="drop")
