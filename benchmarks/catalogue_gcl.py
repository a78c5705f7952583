"""Contests of the Gradient Filter and the Gradient Mitigator.

Bounds are the project's acceptance list; see catalogue.py for how goals are judged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medcl_kernels.registry import Case, spec

from .contenders import Entry
from .contest import Contest, Goal

SUPCON, FILTERED = "supervised_contrastive", "filtered_contrastive"
TOPK_VS_FORWARD, TOPK_VS_CHUNK = 2.5, 3.0
PCGRAD_VS_EAGER, THREE_PERSPECTIVES = 3.0, 1.15


def selection(quick: bool) -> list[Contest]:
    """The 1 % of pairs with the largest gradient, at most 2^20, beside one forward pass."""
    contests = []
    for n, d in ((4096, 64),) if quick else ((4096, 64), (8192, 64), (8192, 128), (16384, 64)):
        case = Case(f"{n}x{d}", "flat rows", (n, d), options=(("scope", "global"),))
        names = ["cpu", "chunk-topk"] + (["eager"] if n <= 4096 else [])
        forward = Entry("forward", "forward", "pair_logsumexp", replace(case, options=()))
        contests.append(
            Contest(
                "select",
                f"pair_topk, {n} x {d}, 1 % of all pairs, beside pair_logsumexp without backward",
                (forward, *(Entry(name, name, "pair_topk", case) for name in names)),
                (
                    Goal("cpu", "forward", "overhead", TOPK_VS_FORWARD),
                    Goal("cpu", "chunk-topk", "speedup", TOPK_VS_CHUNK),
                ),
                threads=(1,),
                seconds={4096: 6.0, 8192: 12.0, 16384: 20.0}[n],
            )
        )
    return contests


def filtered(quick: bool) -> list[Contest]:
    """A whole step of filtered_contrastive of few pairs and many beside the unfiltered loss and
    plain torch."""
    n = 1024 if quick else 4096
    base = next(case for case in spec(SUPCON).benchmarks if case.name == f"{n}x64")
    entries = [Entry("unfiltered", "cpu", SUPCON, base)]
    for keep in (0.01, 0.1):
        case = kept(base, keep)
        entries.append(Entry(f"keep {keep}", "cpu", FILTERED, case))
        entries.append(Entry(f"keep {keep}, eager", "eager", FILTERED, case))
    title = f"filtered_contrastive, {n} x 64"
    return [Contest("filter", title, tuple(entries), threads=(1,), seconds=6.0)]


def switch(quick: bool) -> list[Contest]:
    """A whole step through a list of the selected pairs and through a threshold, over their number
    per anchor: where `gradient_filter.LISTED_PER_ANCHOR` should lie."""
    contests = []
    for n, d in ((1024, 64),) if quick else ((1024, 64), (4096, 128), (8192, 64)):
        base = next(case for case in spec(SUPCON).benchmarks if case.name == f"{n}x{d}")
        for each in (64, 256) if quick else (16, 32, 64, 128, 192, 256, 384, 512, 1024):
            if each > n // 2:
                continue
            case = replace(kept(base, each / n), name=f"{n}x{d}_{each}")
            title = f"filtered_contrastive, {n} x {d}, {each} pairs per anchor"
            entries = tuple(Entry(name, name, FILTERED, case) for name in ("list", "rule"))
            contests.append(Contest("switch", title, entries, threads=(1,), seconds=n / 1024))
    return contests


def kept(case: Case, keep: float | int, **options: Any) -> Case:
    """A case of `filtered_contrastive` with a share or number of selected pairs."""
    chosen = {"keep": keep, **options}
    name = "_".join([case.name, *map(str, chosen.values())])
    return replace(case, name=name, options=tuple(sorted(chosen.items())))


def mitigation(quick: bool) -> list[Contest]:
    """Rows of three gradients, and a step of three perspectives beside that of one."""
    n = 8192 if quick else 65536
    rows = Case(f"{n}x128", "rows of three gradients", (n, 128), maps=3)
    m = 1024 if quick else 8192
    base = next(case for case in spec(SUPCON).benchmarks if case.name == f"{m}x64")
    three = replace(base, name=f"{m}x64_three", maps=3)
    return [
        Contest(
            "mitigate",
            f"mitigate_rows (pcgrad), 3 x {n} x 128",
            tuple(Entry(name, name, "mitigate_rows", rows) for name in ("cpu", "eager")),
            (Goal("cpu", "eager", "speedup", PCGRAD_VS_EAGER),),
            seconds=6.0,
        ),
        Contest(
            "mitigate",
            f"three perspectives, mitigated per pixel, {m} x 64",
            (
                Entry("one label map", "cpu", SUPCON, base),
                Entry("three, mitigated", "cpu", "mitigated_contrastive", three),
            ),
            (Goal("three, mitigated", "one label map", "overhead", THREE_PERSPECTIVES),),
            threads=(1,),
            seconds=8.0,
        ),
    ]
