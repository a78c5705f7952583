"""From the run folders of a paired study to numbers and a Markdown page."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

RATIO_LIMITS = (0.5, 2.0)


def collect_run(folder: Path) -> dict:
    """Scores of one finished run: Dice averaged per subject, then over subjects; HD95; what a
    collapse would show."""
    with open(folder / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    labels = sorted({row["class"] for row in rows}, key=int)
    names = list(summary["classes"])
    dice = {name: _by_subject(rows, label) for name, label in zip(names, labels, strict=True)}
    steps = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    step_ms = [r["step_ms"] for r in steps if r["stage"] == "finetune" and "step_ms" in r]
    return {
        "dice": float(np.mean(list(dice.values()))),
        "dice_by_class": dice,
        "hd95_mm": summary["mean"]["hd95"]["mean"],
        "assd_mm": summary["mean"]["assd"]["mean"],
        "missed": summary["mean"]["n_missed"],
        "min_case_dice": min(float(row["dice"]) for row in rows),
        "volume_ratio": summary["collapse"]["volume_ratio"],
        "collapsed": summary["collapse"]["collapsed"],
        "cases": summary["mean"]["n_cases"],
        "subjects": summary["by_subject"]["n_cases"],
        "val_dice": [r["val_mean_dice"] for r in steps if "val_mean_dice" in r][-1:],
        "step_ms": float(np.median(step_ms)) if step_ms else None,
    }


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict:
    """Mean difference with its 95 % t-interval, two-sided p of the paired t-test, wins. NaN where
    one pair is too few."""
    difference = np.subtract(values, baseline)
    n, mean = len(difference), float(np.mean(difference))
    result = {
        "mean": mean,
        "n": n,
        "wins": int((difference > 0).sum()),
        "each": difference.tolist(),
    }
    if n < 2:
        return result | {"sd": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
    sd = float(np.std(difference, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    p = float(stats.ttest_rel(values, baseline).pvalue) if sd > 0 else math.nan
    return result | {"sd": sd, "low": mean - half, "high": mean + half, "p": p}


def study_markdown(
    runs: Sequence[dict], arms: Sequence[str], config, pretrain_seeds: int, command: str
) -> str:
    """The result page: scores per arm, paired differences, every draw, and what the numbers cannot
    show."""
    plan = {
        n: sorted({r["draw"] for r in runs if r["labeled"] == n})
        for n in sorted({r["labeled"] for r in runs})
    }
    chosen = {(r["arm"], r["labeled"], r["draw"]): r for r in runs}
    classes = list(runs[0]["dice_by_class"])
    baseline, others = arms[0], arms[1:]

    columns = ["labelled subjects", "arm", "draws", *classes, "mean Dice", "HD95 mm", "missed"]
    columns += ["worst case", "volume ratio", "collapsed"]
    scores = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    differences = [
        "| labelled subjects | comparison | difference of mean Dice | 95 % interval | p | wins |",
        "|" + "---|" * 6,
    ]
    draws = [
        "| labelled subjects | draw | pre-training | " + " | ".join(arms) + " |",
        "|" + "---|" * (3 + len(arms)),
    ]
    for n, numbers in plan.items():
        for arm in arms:
            mine = [chosen[arm, n, d] for d in numbers]
            ratios = [v for r in mine for v in r["volume_ratio"].values() if v is not None]
            cells = [_mean_sd([r["dice_by_class"][c] for r in mine]) for c in classes]
            cells += [
                _mean_sd([r["dice"] for r in mine]),
                _mean_sd([r["hd95_mm"] for r in mine], 2),
            ]
            cells += [
                str(sum(r["missed"] for r in mine)),
                f"{min(r['min_case_dice'] for r in mine):.3f}",
            ]
            cells += [
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{sum(r['collapsed'] for r in mine)} of {len(mine)}",
            ]
            scores.append(f"| {n} | {arm} | {len(numbers)} | {' | '.join(cells)} |")
        for arm in others:
            d = paired_difference(
                *([chosen[a, n, i]["dice"] for i in numbers] for a in (arm, baseline))
            )
            spread = " | – | –"
            if d["n"] > 1:
                spread = f" (sd {d['sd']:.4f}) | {d['low']:+.4f} to {d['high']:+.4f} | {d['p']:.3f}"
            differences.append(
                f"| {n} | {arm} − {baseline} | {d['mean']:+.4f}{spread} | {d['wins']} of {d['n']} |"
            )
        for i in numbers:
            row = [f"{chosen[arm, n, i]['dice']:.4f}" for arm in arms]
            draws.append(f"| {n} | {i} | {i % pretrain_seeds} | {' | '.join(row)} |")
    subjects, cases = runs[0]["subjects"], runs[0]["cases"]
    low, high = RATIO_LIMITS
    notes = (
        "Scores are 3-D on the source grid. Dice: per class and case, averaged per subject, then "
        "over "
        f"the {subjects} test subjects ({cases} cases), the same for every draw; ± is the sd over "
        f"draws. HD95 (mm, {config.definition}): mean over cases where it is defined; missed: "
        "masks "
        "empty on one side only. Worst case: the lowest Dice of a class in a case. A run counts as "
        f"collapsed when the total predicted volume of a class is outside {low} to {high} times "
        "the "
        f"true one. Weights of the last iteration, head {config.head}. Differences are paired by "
        "draw, "
        "intervals are Student's t over draws."
    )
    limits = (
        f"- All draws share one test set, and draws d and d + {pretrain_seeds} share one "
        "pre-training "
        f"({pretrain_seeds} in all): draws are not fully independent, and the intervals are "
        "about the "
        "draw of labels (and initial weights), not about the choice of test subjects.\n"
        "- Nothing is corrected for the number of comparisons.\n"
        "- One small network, one data set, 2-D slices, the readings in the config file."
    )
    return (
        "\n\n".join(
            [
                "## Scores",
                "\n".join(scores),
                notes,
                "## Paired differences",
                "\n".join(differences),
                "## Every draw (mean Dice)",
                "\n".join(draws),
                "## What these numbers cannot show",
                limits,
                "## Command",
                f"```\n{command}\n```",
            ]
        )
        + "\n"
    )


def _by_subject(rows: Sequence[dict], label: str) -> float:
    subjects: dict[str, list[float]] = {}
    for row in rows:
        if row["class"] == label:
            subjects.setdefault(row["subject"], []).append(float(row["dice"]))
    return float(np.mean([np.mean(values) for values in subjects.values()]))


def _mean_sd(values: Sequence[float | None], digits: int = 3) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    sd = np.std(known, ddof=1) if len(known) > 1 else 0.0
    return f"{np.mean(known):.{digits}f} ± {sd:.{digits}f}"
