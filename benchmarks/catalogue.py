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

from .contenders import Entry, rows_of
from .contest import Contest, Goal

SUPCON, INFO_NCE, MATCH = "supervised_contrastive", "info_nce", "dense_correspondence"
BF16, FP16 = torch.bfloat16, torch.float16
# of the issue (bound) and of the prototypes (stretch), by D
SUPCON_VS_CHUNK = {64: (3.5, 4.2), 128: (2.8, 3.2)}
SUPCON_VS_CHUNK_1024 = {64: (3.0, 4.0), 128: (2.0, 2.6)}
INFO_NCE_VS_LCE = {64: (1.5, 1.8), 128: (1.15, 1.3)}
INFO_NCE_VS_LCE_WALL = {64: (3.0, 3.8), 128: (1.7, 2.0)}
INPUT_OVERHEAD, RAGGED_OVERHEAD = 1.1, 1.15
CHANNELS = (3, 16, 48, 65, 100, 128, 192, 256, 320, 512)


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


def headline() -> list[Contest]:
    """SupCon "out" and InfoNCE at the sizes of the goals."""
    contests = []
    for n, d in ((8192, 64), (8192, 128), (4096, 64), (4096, 128), (1024, 64), (1024, 128)):
        contests += [_supcon(n, d), _info_nce(n, d)]
    return contests


def _supcon(n: int, d: int) -> Contest:
    names = ["cpu", "chunk", "class-sums"]
    goals = [Goal("cpu", "class-sums", "speedup", 1.0)]
    if n >= 4096:
        bound, stretch = SUPCON_VS_CHUNK[d]
        goals.append(Goal("cpu", "chunk", "speedup", bound, stretch))
    else:
        bound, stretch = SUPCON_VS_CHUNK_1024[d]
        goals.append(Goal("cpu", "chunk", "speedup", bound, stretch, threads=1))
    if (n, d) != (8192, 128):  # steps of seconds: once is enough
        names += ["eager", "pml"]
        goals.append(Goal("cpu", "eager", "speedup", 10.0 if n >= 4096 else 1.0))
        goals.append(Goal("cpu", "pml", "speedup", 20.0 if n >= 4096 else 1.0))
    if (n, d) in ((8192, 64), (1024, 64)):
        names.append("compile")
    return Contest(
        "supcon",
        f'supervised contrast "out", {n} x {d}',
        entries(SUPCON, timed(SUPCON, n, d), *names),
        tuple(goals),
        seconds=10.0 if n == 8192 else 5.0,
        quick=(n, d) in ((4096, 64), (4096, 128), (1024, 64)),
    )


def _info_nce(n: int, d: int) -> Contest:
    names = ["cpu", "lce", "chunk", "eager"]
    goals = [Goal("cpu", "eager", "speedup", 1.0), Goal("cpu", "chunk", "speedup", 1.0)]
    if n >= 4096:
        bound, stretch = INFO_NCE_VS_LCE[d]
        goals.append(Goal("cpu", "lce", "speedup", bound, stretch, threads=1))
    if n == 8192:
        bound, stretch = INFO_NCE_VS_LCE_WALL[d]
        goals.append(Goal("cpu", "lce", "speedup", bound, stretch, threads=2, clock="wall"))
    if (n, d) in ((8192, 64), (1024, 64)):
        names.append("compile")
    return Contest(
        "info_nce",
        f"InfoNCE, {n} x {d}",
        entries(INFO_NCE, timed(INFO_NCE, n, d), *names),
        tuple(goals),
        seconds=8.0 if n == 8192 else 4.0,
        quick=(n, d) in ((4096, 64), (4096, 128), (1024, 64)),
    )


def nt_xent() -> list[Contest]:
    """InfoNCE in both directions with intra-view negatives, which two libraries have."""
    contests = []
    for n, names in ((128, ("cpu", "eager", "monai", "pml")), (512, ("cpu", "eager", "monai"))):
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
                quick=n == 128,
            )
        )
    return contests


def inputs() -> list[Contest]:
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


def small() -> list[Contest]:
    """Never slower than plain torch, down to a handful of rows."""
    contests = []
    for n in (64, 128, 256, 512, 1024):
        for d in (3, 16, 64, 128, 256):
            for op in (SUPCON, INFO_NCE):
                names = ("cpu", "eager") + (("class-sums",) if op == SUPCON else ())
                goals = tuple(Goal("cpu", name, "speedup", 1.0) for name in names[1:])
                contests.append(
                    Contest(
                        "small",
                        f"{op}, {n} x {d}",
                        entries(op, flat(op, n, d), *names),
                        goals,
                        seconds=0.5,
                        quick=d in (3, 64) and n in (64, 256),
                    )
                )
    return contests


def ragged() -> list[Contest]:
    """Time per needed FLOP against the aligned case, N = 4096 and D = 64."""
    contests = []
    for op in (SUPCON, INFO_NCE):
        sizes = [(4096, 64), (4000, 64), (4097, 64), (5003, 64), *((4096, d) for d in CHANNELS)]
        sizes += [(5003, 65), (4097, 100)]
        listed = tuple(Entry(f"{n}x{d}", "cpu", op, flat(op, n, d)) for n, d in sizes)
        goals = tuple(
            Goal(entry.label, "4096x64", "overhead_per_flop", RAGGED_OVERHEAD)
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


def forms() -> list[Contest]:
    """The other forms of supervised contrast, and several label maps at once."""
    base = timed(SUPCON, 4096, 64)
    contests = [
        Contest(
            "forms",
            f'supervised contrast "{form}", 4096 x 64',
            entries(SUPCON, with_options(base, form, form=form), "cpu", "eager"),
            (Goal("cpu", "eager", "speedup", 1.0),),
            seconds=4.0,
        )
        for form in ("in", "pixel")
    ]
    three = replace(base, name="4096x64_three_maps", maps=3)
    contests.append(
        Contest(
            "forms",
            "three label maps (perspectives) in one pass, 4096 x 64",
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


def per_image() -> list[Contest]:
    """Many small independent problems: candidates of the own image only."""
    contests = []
    for side in (14, 28):
        for d in (64, 128):
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
                        quick=(side, d) == (14, 64),
                    )
                )
    return contests


def matching() -> list[Contest]:
    """Correspondences, forward only."""
    return [
        Contest(
            "match",
            f"dense_correspondence, {case.name}",
            entries(MATCH, case, "cpu", "eager"),
            (Goal("cpu", "eager", "speedup", 1.0),),
            seconds=2.0,
            quick=case.name == "1024x64",
        )
        for case in spec(MATCH).benchmarks
        if "_" not in case.name
    ]


def operations() -> list[Contest]:
    """Every operation of the registry on its timed cases, the reference beside it at 1024 rows."""
    contests = []
    for one in SPECS:
        if one.kind != "op":
            continue
        for case in one.benchmarks:
            if rows_of(case)[0] > 4096:
                continue  # the losses cover the large sizes
            names = ("cpu", "reference") if rows_of(case)[0] <= 1024 else ("cpu",)
            contests.append(
                Contest(
                    "ops",
                    f"{one.name}, {case.name}{'' if case.key_shape is None else ' against a key'}",
                    entries(one.name, case, *names),
                    threads=(1,),
                    seconds=0.8,
                    quick=case.name == "1024x64",
                )
            )
    return contests


CONTESTS = {
    "supcon": headline,
    "info_nce": headline,
    "input": inputs,
    "small": small,
    "ragged": ragged,
    "forms": forms,
    "image": per_image,
    "match": matching,
    "nt_xent": nt_xent,
    "ops": operations,
}
# measured in other ways: benchmarks/probes.py
PROBES = ("memory", "bits")
GROUPS = (*CONTESTS, *PROBES)


def contests(only: tuple[str, ...], quick: bool) -> list[Contest]:
    """The contests of some groups, in the order of `CONTESTS`, each once."""
    found: list[Contest] = []
    for group, make in CONTESTS.items():
        if group in only:
            found += [one for one in make() if one.group == group and (one.quick or not quick)]
    return found
