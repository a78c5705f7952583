"""What is measured: contests from the registry's timed cases, and the goals of each.

Bounds are the project's acceptance list; `stretch` is what prototypes of the same algorithms
reached on an idle machine. A goal is judged on the minimum of interleaved turns: of process-CPU
time, or of wall time where it is about threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from medcl_kernels.registry import SPECS, Case, spec

from .catalogue_gcl import filtered, mitigation, selection, switch
from .contenders import Entry, rows_of
from .contest import Contest, Goal
from .patch_catalogue import gates, patches, windows

SUPCON, INFO_NCE, MATCH = "supervised_contrastive", "info_nce", "dense_correspondence"
BF16, FP16 = torch.bfloat16, torch.float16
# of the issue (bound) and of the prototypes (stretch), by D
SUPCON_VS_CHUNK = {64: (3.5, 4.2), 128: (2.8, 3.2)}
SUPCON_VS_CHUNK_1024 = {64: (3.0, 4.0), 128: (2.0, 2.6)}
INFO_NCE_VS_LCE = {64: (1.5, 1.8), 128: (1.15, 1.3)}
INFO_NCE_VS_LCE_WALL = {64: (3.0, 3.8), 128: (1.7, 2.0)}
INPUT_OVERHEAD, RAGGED_OVERHEAD = 1.1, 1.15
SIZES = ((8192, 64), (8192, 128), (4096, 64), (4096, 128), (1024, 64), (1024, 128))
QUICK_SIZES = ((4096, 64), (1024, 64))
CHANNELS, QUICK_CHANNELS = (3, 16, 48, 65, 100, 128, 192, 256, 320, 512), (16, 65, 128, 256)


def entries(op: str, case: Case, *names: str) -> tuple[Entry, ...]:
    """Contenders of one input, labelled by their names."""
    return tuple(Entry(name, name, op, case) for name in names)


def timed(op: str, n: int, d: int) -> Case:
    """The registry's timed case of this size."""
    return next(case for case in spec(op).benchmarks if case.name == f"{n}x{d}")


def flat(op: str, n: int, d: int, **changes: Any) -> Case:
    """A timed case of a size that the registry does not list."""
    key = (n, d) if op != SUPCON else None
    return Case(f"{n}x{d}", "flat rows", (n, d), key, **changes)


def with_options(case: Case, name: str, **options: Any) -> Case:
    """The same input, further keyword arguments of the loss."""
    return replace(case, name=f"{case.name}_{name}", options=tuple(sorted(options.items())))


def supcon(quick: bool) -> list[Contest]:
    """Supervised contrast "out" at the sizes of the goals."""
    sizes = QUICK_SIZES if quick else SIZES
    return [contest for n, d in sizes for contest in _supcon(n, d, quick)]


def _supcon(n: int, d: int, quick: bool) -> list[Contest]:
    bound, stretch = (SUPCON_VS_CHUNK if n >= 4096 else SUPCON_VS_CHUNK_1024)[d]
    names = ["cpu", "chunk", "class-sums"]
    goals = [
        Goal("cpu", "class-sums", "speedup", 1.0),
        # with two threads the small peers pay for their own synchronisation: no goal there
        Goal("cpu", "chunk", "speedup", bound, stretch, threads=None if n >= 4096 else 1),
    ]
    slow, slow_goals = [], []
    if not (quick and n >= 4096) and (n, d) != (8192, 128):
        slow = ["eager", "pml"]
        slow_goals.append(Goal("cpu", "eager", "speedup", 10.0 if n >= 4096 else 1.0))
        slow_goals.append(Goal("cpu", "pml", "speedup", 20.0 if n >= 4096 else 1.0))
    if (n, d) == (8192, 64):
        slow.append("compile")
    plain = Contest(
        "supcon",
        f'supervised contrast "out", {n} x {d}',
        entries(SUPCON, timed(SUPCON, n, d), *names),
        tuple(goals),
        seconds={8192: 9.0, 4096: 4.0, 1024: 3.0}[n],
    )
    with_slow = replace(
        plain,
        entries=plain.entries + entries(SUPCON, plain.entries[0].case, *slow),
        goals=plain.goals + tuple(slow_goals),
    )
    if n < 8192:
        return [with_slow]
    # steps of seconds: once is enough
    return [replace(with_slow, threads=(1,)), replace(plain, threads=(2,))]


def info_nce(quick: bool) -> list[Contest]:
    """InfoNCE at the sizes of the goals."""
    contests = []
    for n, d in QUICK_SIZES if quick else SIZES:
        names = ["cpu", "lce", "chunk"]
        goals = [Goal("cpu", "chunk", "speedup", 1.0)]
        if n >= 4096:
            bound, stretch = INFO_NCE_VS_LCE[d]
            goals.append(Goal("cpu", "lce", "speedup", bound, stretch, threads=1))
        if n == 8192:
            bound, stretch = INFO_NCE_VS_LCE_WALL[d]
            goals.append(Goal("cpu", "lce", "speedup", bound, stretch, threads=2, clock="wall"))
        if not (quick and n >= 4096):
            names.append("eager")
            goals.append(Goal("cpu", "eager", "speedup", 1.0))
        if (n, d) == (8192, 64):
            names.append("compile")
        contests.append(
            Contest(
                "info_nce",
                f"InfoNCE, {n} x {d}",
                entries(INFO_NCE, timed(INFO_NCE, n, d), *names),
                tuple(goals),
                seconds={8192: 8.0, 4096: 4.0, 1024: 3.0}[n],
            )
        )
    return contests


def nt_xent(quick: bool) -> list[Contest]:
    """InfoNCE in both directions with intra-view negatives, which two libraries have."""
    contests = []
    sizes = ((128, ("cpu", "eager", "monai", "pml")), (512, ("cpu", "eager", "monai")))
    for n, names in ((128, ("cpu", "eager", "monai")),) if quick else sizes:
        case = replace(flat(INFO_NCE, n, 64), labels="none")
        case = with_options(case, "nt_xent", symmetric=True, intra_view=True)
        goals = tuple(Goal("cpu", name, "speedup", 1.0) for name in names[1:])
        contests.append(
            Contest(
                "nt_xent",
                f"NT-Xent (symmetric, intra-view), 2 x {n} x 64",
                entries(INFO_NCE, case, *names),
                goals,
                seconds=2.0,
            )
        )
    return contests


def inputs(quick: bool) -> list[Contest]:
    """bfloat16, float16 and dense NCHW input beside float32 rows."""
    contests = []
    for op in (SUPCON, INFO_NCE):
        dense = next(case for case in spec(op).benchmarks if case.name == "8192x64_nchw")
        rows = timed(op, 8192, 64)
        forms = (
            ("rows fp32", rows, torch.float32),
            ("rows bf16", rows, BF16),
            ("rows fp16", rows, FP16),
            ("NCHW fp32", dense, torch.float32),
            ("NCHW bf16", dense, BF16),
        )
        contests.append(
            Contest(
                "input",
                f"{op}: 8192 x 64 in other dtypes and layouts",
                tuple(Entry(label, "cpu", op, case, dtype) for label, case, dtype in forms),
                tuple(
                    Goal(label, "rows fp32", "overhead", INPUT_OVERHEAD, 1.05)
                    for label, *_ in forms[1:]
                ),
                threads=(1,),
                seconds=8.0,
            )
        )
    return contests


def small(quick: bool) -> list[Contest]:
    """Never slower than plain torch, down to a handful of rows."""
    contests = []
    for n in (64, 256) if quick else (64, 128, 256, 512, 1024):
        for d in (3, 64) if quick else (3, 16, 64, 128, 256):
            for op in (SUPCON, INFO_NCE):
                names = ("cpu", "eager") + (("class-sums",) if op == SUPCON else ())
                goals = tuple(Goal("cpu", name, "speedup", 1.0) for name in names[1:])
                contests.append(
                    Contest(
                        "small",
                        f"{op}, {n} x {d}",
                        entries(op, flat(op, n, d), *names),
                        goals,
                        seconds=0.8 if quick else 0.4,
                    )
                )
    return contests


def ragged(quick: bool) -> list[Contest]:
    """Time per needed FLOP against the aligned case, N = 4096 and D = 64; for few channels with the
    exponentials at the price of torch.exp."""
    contests = []
    for op in (SUPCON, INFO_NCE):
        sizes = [(4096, 64), (4097, 64), *((4096, d) for d in QUICK_CHANNELS)]
        if not quick:
            sizes = [(n, 64) for n in (4096, 4000, 4097, 5003)]
            sizes += [(4096, d) for d in CHANNELS] + [(5003, 65), (4097, 100)]
        listed = tuple(Entry(f"{n}x{d}", "cpu", op, flat(op, n, d)) for n, d in sizes)
        goals = tuple(
            Goal(
                entry.label,
                "4096x64",
                # below, the exponential of a pair costs as much as its products
                "overhead_per_flop" if rows_of(entry.case)[1] >= 48 else "overhead_per_work",
                RAGGED_OVERHEAD,
            )
            for entry in listed[1:]
        )
        contests.append(
            Contest(
                "ragged",
                f"{op}: time per needed FLOP against 4096 x 64",
                listed,
                goals,
                threads=(1,),
                seconds=15.0,
            )
        )
    return contests


def forms(quick: bool) -> list[Contest]:
    """The other forms of supervised contrast, and several label maps at once."""
    n = 1024 if quick else 4096
    base = timed(SUPCON, n, 64)
    contests = [
        Contest(
            "forms",
            f'supervised contrast "{form}", {n} x 64',
            entries(SUPCON, with_options(base, form, form=form), "cpu", "eager"),
            (Goal("cpu", "eager", "speedup", 1.0),),
            seconds=4.0,
        )
        for form in ("in", "pixel")
    ]
    three = replace(base, name=f"{n}x64_three_maps", maps=3)
    contests.append(
        Contest(
            "forms",
            f"three label maps (perspectives) in one pass, {n} x 64",
            (
                Entry("cpu, 1 map", "cpu", SUPCON, base),
                Entry("cpu, 3 maps", "cpu", SUPCON, three),
                Entry("eager, 3 maps", "eager", SUPCON, three),
            ),
            (
                Goal("cpu, 3 maps", "cpu, 1 map", "overhead", 1.1),
                Goal("cpu, 3 maps", "eager, 3 maps", "speedup", 1.0),
            ),
            threads=(1,),
            seconds=5.0,
        )
    )
    return contests


def per_image(quick: bool) -> list[Contest]:
    """Many small independent problems: candidates of the own image only."""
    contests = []
    for side in (14,) if quick else (14, 28):
        for d in (64,) if quick else (64, 128):
            for op in (SUPCON, INFO_NCE):
                shape = (12, d, side, side)
                key = None if op == SUPCON else shape
                case = Case(f"12x{side * side}x{d}", "per image", shape, key, pairs="image")
                contests.append(
                    Contest(
                        "image",
                        f"{op}, 12 images x {side * side} x {d}",
                        entries(op, case, "cpu", "eager"),
                        (Goal("cpu", "eager", "speedup", 1.0),),
                        seconds=2.0,
                    )
                )
    return contests


def matching(quick: bool) -> list[Contest]:
    """Correspondences, forward only."""
    return [
        Contest(
            "match",
            f"dense_correspondence, {case.name}",
            entries(MATCH, case, "cpu", "eager"),
            (Goal("cpu", "eager", "speedup", 1.0),),
            seconds=2.0,
        )
        for case in spec(MATCH).benchmarks
        if "_" not in case.name and (not quick or case.name == "1024x64")
    ]


def operations(quick: bool) -> list[Contest]:
    """Every operation of the registry on its timed cases, the reference beside it at 1024 rows."""
    contests = []
    for one in SPECS:
        if one.kind != "op":
            continue
        for case in one.benchmarks:
            if rows_of(case)[0] > 4096 or (quick and case.name != "1024x64"):
                continue  # the losses cover the large sizes
            names = ("cpu", "reference") if rows_of(case)[0] <= 1024 else ("cpu",)
            contests.append(
                Contest(
                    "ops",
                    f"{one.name}, {case.name}{'' if case.key_shape is None else ' against a key'}",
                    entries(one.name, case, *names),
                    threads=(1,),
                    seconds=0.8,
                )
            )
    return contests


CONTESTS = {
    "supcon": supcon,
    "info_nce": info_nce,
    "input": inputs,
    "small": small,
    "ragged": ragged,
    "forms": forms,
    "image": per_image,
    "match": matching,
    "nt_xent": nt_xent,
    "select": selection,
    "filter": filtered,
    "switch": switch,
    "mitigate": mitigation,
    "patches": patches,
    "windows": windows,
    "gate": gates,
    "ops": operations,
}
# measured in other ways: benchmarks/probes.py
PROBES = ("memory", "bits")
GROUPS = (*CONTESTS, *PROBES)


def contests(only: tuple[str, ...], quick: bool) -> list[Contest]:
    """The contests of some groups, in the order of `CONTESTS`."""
    return [one for group, make in CONTESTS.items() if group in only for one in make(quick)]
