"""From the run folders of a paired study to numbers and a Markdown page."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

RATIO_LIMITS = (0.5, 2.0)
# what else a run has, and where its summary holds it: distances in 3-D, overlaps per image in 2-D
_MEANS = {
    "hd95": ("mean", "hd95"),
    "assd": ("mean", "assd"),
    "jaccard": ("mean", "jaccard"),
    "accuracy": ("mean", "accuracy"),
    "macro_dice": ("macro", "dice"),
    "macro_jaccard": ("macro", "jaccard"),
}
_SHOWN = {
    "hd95": ("HD95 {unit}", 2),
    "jaccard": ("JA", 3),
    "accuracy": ("AC", 3),
    "macro_dice": ("macro Dice", 3),
    "macro_jaccard": ("macro JA", 3),
}


def collect_run(folder: Path) -> dict:
    """Scores of one finished run: Dice averaged per subject, then over subjects; HD95; what a
    collapse would show."""
    with open(folder / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    labels = sorted({row["class"] for row in rows} - {"0"}, key=int)
    names = list(summary["classes"])
    dice = {name: _by_subject(rows, label) for name, label in zip(names, labels, strict=True)}
    steps = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    step_ms = [r["step_ms"] for r in steps if r["stage"] != "pretrain" and "step_ms" in r]
    means = {
        key: summary[part][metric]["mean"]
        for key, (part, metric) in _MEANS.items()
        if metric in summary.get(part, {})
    }
    return means | {
        "unit": summary["settings"]["unit"],
        "dice": float(np.mean(list(dice.values()))),
        "dice_by_class": dice,
        "missed": summary["mean"]["n_missed"],
        "min_case_dice": min(float(row["dice"]) for row in rows if row["class"] != "0"),
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
    runs: Sequence[dict],
    arms: Sequence[str],
    config,
    pretrain_seeds: int | None,
    command: str,
    against: Sequence[str] = (),
) -> str:
    """The result page: scores per arm, paired differences, every draw, and what the numbers cannot
    show.

    Args:
        arms: all are compared with the first.
        pretrain_seeds: how many pre-trainings the draws share, None without any.
        against: some of `arms`; those that stand between the first and one of these are compared
            with it too.
    """
    plan = {
        n: sorted({r["draw"] for r in runs if r["labeled"] == n})
        for n in sorted({r["labeled"] for r in runs}, key=lambda n: int(str(n).removesuffix("%")))
    }
    chosen = {(r["arm"], r["labeled"], r["draw"]): r for r in runs}
    sections = [
        ("Scores", _scores(plan, chosen, arms) + "\n\n" + _score_notes(runs[0], config)),
        ("Paired differences", _differences(plan, chosen, pairs_of(arms, against))),
        ("Every draw (mean Dice)", _draws(plan, chosen, arms, pretrain_seeds)),
        ("What these numbers cannot show", _limits(runs[0], pretrain_seeds)),
        ("Command", f"```\n{command}\n```"),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections) + "\n"


def pairs_of(arms: Sequence[str], against: Sequence[str]) -> list[tuple[str, str]]:
    """(arm, the one it is compared with)."""
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    for other in against:
        pairs += [(arm, other) for arm in arms[1 : arms.index(other)]]
    return pairs


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _scores(plan, chosen, arms) -> str:
    first = next(iter(chosen.values()))
    classes, shown = list(first["dice_by_class"]), {k: v for k, v in _SHOWN.items() if k in first}
    columns = ["labelled", "arm", "draws", *classes, "mean Dice"]
    columns += [title.format(unit=first["unit"]) for title, _ in shown.values()]
    columns += ["missed", "worst case", "volume ratio", "collapsed"]
    rows = []
    for n, numbers in plan.items():
        for arm in arms:
            mine = [chosen[arm, n, d] for d in numbers]
            ratios = [v for r in mine for v in r["volume_ratio"].values() if v is not None]
            rows.append(
                [
                    str(n),
                    arm,
                    str(len(numbers)),
                    *(_mean_sd([r["dice_by_class"][c] for r in mine]) for c in classes),
                    _mean_sd([r["dice"] for r in mine]),
                    *(_mean_sd([r[k] for r in mine], d) for k, (_, d) in shown.items()),
                    str(sum(r["missed"] for r in mine)),
                    f"{min(r['min_case_dice'] for r in mine):.3f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    f"{sum(r['collapsed'] for r in mine)} of {len(mine)}",
                ]
            )
    return _table(columns, rows)


def _differences(plan, chosen, pairs) -> str:
    columns = ["labelled", "comparison", "difference of mean Dice", "95 % interval", "p", "wins"]
    rows = []
    for n, numbers in plan.items():
        for arm, other in pairs:
            d = paired_difference(
                *([chosen[a, n, i]["dice"] for i in numbers] for a in (arm, other))
            )
            spread = ["", "–", "–"]
            if d["n"] > 1:
                interval = f"{d['low']:+.4f} to {d['high']:+.4f}"
                spread = [f" (sd {d['sd']:.4f})", interval, f"{d['p']:.3f}"]
            rows.append(
                [
                    str(n),
                    f"{arm} − {other}",
                    f"{d['mean']:+.4f}{spread[0]}",
                    *spread[1:],
                    f"{d['wins']} of {d['n']}",
                ]
            )
    return _table(columns, rows)


def _draws(plan, chosen, arms, pretrain_seeds) -> str:
    shared = ["pre-training"] if pretrain_seeds else []
    rows = [
        [str(n), str(i)]
        + [str(i % pretrain_seeds) for _ in shared]
        + [f"{chosen[arm, n, i]['dice']:.4f}" for arm in arms]
        for n, numbers in plan.items()
        for i in numbers
    ]
    return _table(["labelled", "draw", *shared, *arms], rows)


def _score_notes(run: dict, config) -> str:
    low, high = RATIO_LIMITS
    if "hd95" in run:
        what = (
            "Scores are 3-D on the source grid. Dice: per class and case, averaged per subject, "
            f"then over the {run['subjects']} test subjects ({run['cases']} cases), the same for "
            f"every draw; ± is the sd over draws. HD95 ({run['unit']}, {config.definition}): mean "
            "over cases where it is defined"
        )
    else:
        what = (
            "Scores are per image at the size of the mask on disk, foreground only, averaged over "
            f"the {run['cases']} test images, the same for every draw; ± is the sd over draws. JA: "
            "Jaccard; AC: share of pixels that are right; macro: background counted as a class"
        )
    return (
        f"{what}; missed: masks empty on one side only. Worst case: the lowest Dice of a class in "
        "a case. A run counts as collapsed when the total predicted volume of a class is outside "
        f"{low} to {high} times the true one. Weights of the last iteration, head {config.head}. "
        "Differences are paired by draw, intervals are Student's t over draws."
    )


def _limits(run: dict, pretrain_seeds: int | None) -> str:
    volumes = "hd95" in run
    shared = (
        f", and draws d and d + {pretrain_seeds} share one pre-training ({pretrain_seeds} in all): "
        "draws are not fully independent, and the"
        if pretrain_seeds
        else ": the"
    )
    return (
        f"- All draws share one test set{shared} intervals are about the draw of labels (and "
        f"initial weights), not about the choice of test {'subjects' if volumes else 'images'}.\n"
        "- Nothing is corrected for the number of comparisons.\n"
        "- One small network, one data set, the readings in the config file."
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
