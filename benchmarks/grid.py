"""What is measured on a GPU, the most wanted first: a run that ends early has those.

Goals are the project's own for one H200; shares of the roofline make the first two hold for any
device: needed FLOPs (6u for supervised contrast, 8u for InfoNCE, u = N * N * D) over the time, over
the rate of a large matrix product of the same run. A dry run has the same contests on the CPU at a
fraction of the size: it shows that the harness works, its times say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from medcl_kernels import dispatch
from medcl_kernels.registry import SPECS, Case, spec

from .catalogue import INFO_NCE, MATCH, SUPCON, flat
from .catalogue_gcl import PCGRAD_VS_EAGER, TOPK_VS_FORWARD
from .contenders import Entry
from .contest import Contest, Goal
from .patch_catalogue import AFFINITY, CONTRAST, GATE, RATIO

LOSSES = (SUPCON, INFO_NCE)
NAMES = {SUPCON: 'supervised contrast "out"', INFO_NCE: "InfoNCE"}
ARITHMETIC = {"bf16": (torch.bfloat16, "bfloat16"), "tf32": (torch.float32, "tf32")}
IEEE = {**ARITHMETIC, "fp32": (torch.float32, "")}
ROWS, CHANNELS = (4096, 16384, 32768, 65536, 131072), (64, 128, 256)
MIDDLE, LARGEST, IMAGE = 32768, 131072, 4096  # rows; of one image
ROOFLINE = (0.45, 0.65)  # bound, stretch
EXTRA_MB = {SUPCON: 64.0, INFO_NCE: 112.0}  # at N = 65536, D = 64, gradients included
# at `MIDDLE` rows and D = 128: how many times our time a peer takes at least
SPEEDUPS = {
    "bf16": {"eager": 4.0, "compile": 2.0, "chunk": 2.0, "flex": 1.3, "inf-cl": 8.0},
    "tf32": {"eager": 4.0, "compile": 2.0, "chunk": 2.0, "flex": 1.3, "inf-cl": 3.0},
}
ROW_TOPK_VS_FORWARD = 1.25  # 64 pairs per anchor
BATCH_RATE = 0.7  # B images of 4096 pixels against one large problem
AFFINITY_RATE = 3.0  # three patch sizes against a forward pass of supervised contrast, at most


@dataclass(frozen=True)
class Site:
    """Where the contests run.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        ours: the package's backends there.
        rows, channels: divide the sizes.
        seconds: multiplies the time of every contest.
    """

    device: str
    ours: tuple[str, ...]
    rows: int = 1
    channels: int = 1
    seconds: float = 1.0

    def flat(self, op: str, n: int, d: int) -> Case:
        """Rows `(n, d)` at this site's scale."""
        return flat(op, n // self.rows, d // self.channels)

    def images(self, op: str, batch: int, d: int) -> Case:
        """`batch` images of `IMAGE` pixels, each contrasted with itself."""
        side = int((IMAGE // self.rows) ** 0.5)
        shape = (batch, d // self.channels, side, side)
        name = f"{batch}x{side * side}x{shape[1]}"
        return Case(name, "per image", shape, None if op == SUPCON else shape, pairs="image")

    def entry(self, name: str, op: str, case: Case, kind: str, **changes: Any) -> Entry:
        """One contender, labelled by its name."""
        dtype, products = IEEE[kind]
        changes = {"label": name, "device": self.device, "products": products, **changes}
        return Entry(contender=name, op=op, case=case, dtype=dtype, **changes)

    def entries(self, names: tuple[str, ...], op: str, case: Case, kind: str) -> tuple[Entry, ...]:
        """Our backends, then others by name."""
        return tuple(self.entry(name, op, case, kind) for name in (*self.ours, *names))


GPU = Site("cuda", ("triton", "cuda"))
DRY_RUN = Site("cpu", ("cpu",), rows=64, channels=8, seconds=0.01)


def _title(op: str, n: int, d: int, kind: str) -> str:
    return f"{NAMES[op]}, {n} x {d}, {kind}"


def peers(site: Site) -> list[Contest]:
    """Everybody at the sizes of the goals."""
    everybody = {
        SUPCON: ("chunk", "flex", "class-sums", "compile", "eager", "pml"),
        INFO_NCE: ("chunk", "flex", "inf-cl", "lce", "compile", "eager"),
    }
    linear = {SUPCON: ("chunk", "flex"), INFO_NCE: ("chunk", "flex", "inf-cl", "lce")}
    no_flex = {SUPCON: ("chunk",), INFO_NCE: ("chunk", "inf-cl", "lce")}  # it compiles for long
    contests = []
    for kind in ARITHMETIC:
        largest = linear if kind == "bf16" else no_flex
        for n, names, seconds in ((LARGEST, largest, 3.0), (MIDDLE, everybody, 2.5)):
            for op in LOSSES:
                case = site.flat(op, n, 128)
                entries = site.entries(names[op], op, case, kind)
                goals = []
                for label in site.ours:
                    if n == LARGEST and kind == "bf16":
                        goals.append(Goal(label, label, "roofline", *ROOFLINE))
                    if n == MIDDLE:
                        goals += [
                            Goal(label, name, "speedup", bound, clock="wall", stat="median")
                            for name, bound in SPEEDUPS[kind].items()
                            if name in names[op]
                        ]
                title = _title(op, n, 128, kind)
                contests.append(Contest("peers", title, entries, tuple(goals), (1,), seconds))
    return contests


def batches(site: Site) -> list[Contest]:
    """Images of 4096 pixels in one launch, beside one large problem."""
    contests = []
    for op in LOSSES:
        entries, goals = [], []
        for name in site.ours:
            large = f"{name}, {MIDDLE} rows"
            entries.append(site.entry(name, op, site.flat(op, MIDDLE, 128), "bf16", label=large))
            for batch in (32, 8):
                label = f"{name}, {batch} images"
                case = site.images(op, batch, 128)
                entries.append(site.entry(name, op, case, "bf16", label=label))
                bound = 1 / BATCH_RATE
                goals.append(
                    Goal(label, large, "overhead_per_flop", bound, clock="wall", stat="median")
                )
        title = f"{NAMES[op]}, images of {IMAGE} x 128, bf16"
        contests.append(Contest("batches", title, tuple(entries), tuple(goals), (1,), 1.5))
    return contests


def operations(site: Site) -> list[Contest]:
    """Every operation in each of our backends: what `impl="auto"` chooses from."""
    contests = []
    for n in (MIDDLE, 4096):
        for one in SPECS:
            parts = dispatch.COMPOSED.get(one.name, (one.name,))
            kernels = {
                name
                for backend in dispatch.BACKENDS
                if backend.name in site.ours
                for name in backend.kernels
            }
            if one.kind != "op" or not kernels.intersection((one.name, *parts)):
                continue  # plain torch in every backend, or not there yet
            if one.name in (RATIO, GATE):
                continue  # no pairs: `patches` has them at sizes of their own
            keys = {case.key_shape is not None for case in one.benchmarks}
            channels = CHANNELS if one.name == "pair_logsumexp" else (128,)
            for d in channels:
                for kind in IEEE:
                    for key in sorted(keys):
                        shape = n // site.rows, d // site.channels
                        suffix = "_key" if key and len(keys) > 1 else ""
                        case = Case(
                            f"{shape[0]}x{shape[1]}{suffix}", "", shape, shape if key else None,
                            maps=3 if one.name == "mitigate_rows" else 1,
                        )  # fmt: skip
                        entries = site.entries((), one.name, case, kind)
                        title = f"{one.name}{suffix}, {n} x {d}, {kind}"
                        contests.append(Contest("operations", title, entries, (), (1,), 0.3))
    return contests


def sizes(site: Site) -> list[Contest]:
    """All sizes, ours beside chunks of cuBLAS products, and at one of them beside the others that
    never store N x N numbers."""
    contests = []
    linear = {SUPCON: ("chunk", "flex"), INFO_NCE: ("chunk", "lce")}  # flex compiles for long
    for d in (128, 64, 256):
        for n in reversed(ROWS):
            for kind in ARITHMETIC:
                if d == 128 and n in (MIDDLE, LARGEST):
                    continue  # `peers` has them
                for op in LOSSES:
                    others = linear[op] if (n, kind) == (MIDDLE, "bf16") else ("chunk",)
                    entries = site.entries(others, op, site.flat(op, n, d), kind)
                    goals = ()
                    if (n, d, kind) == (65536, 64, "bf16"):
                        goals = tuple(
                            Goal(name, name, "extra MB", EXTRA_MB[op]) for name in site.ours
                        )
                    title = _title(op, n, d, kind)
                    contests.append(Contest("sizes", title, entries, goals, (1,), 0.6))
    return contests


def forward(site: Site) -> list[Contest]:
    """The value alone."""
    contests = []
    for n in (MIDDLE, LARGEST):
        for kind in ARITHMETIC:
            for op in LOSSES:
                case = site.flat(op, n, 128)
                entries = tuple(
                    site.entry(name, op, case, kind, mode="forward")
                    for name in (*site.ours, "chunk")
                )
                title = f"{_title(op, n, 128, kind)}, forward alone"
                contests.append(Contest("forward", title, entries, (), (1,), 0.6))
    return contests


def wgmma(site: Site) -> list[Contest]:
    """Hopper's wgmma beside mma.sync, which every other contest runs: row statistics."""
    contests = []
    name, op = site.ours[-1], "pair_logsumexp"
    for d in (128, 64):
        entries = tuple(
            site.entry(name, op, site.flat(SUPCON, MIDDLE, d), "bf16", mode="forward", **changes)
            for changes in ({"label": name}, {"label": f"{name}, wgmma", "wgmma": True})
        )
        title = f"{op}, {MIDDLE} x {d}, bf16, mma.sync and wgmma"
        contests.append(Contest("wgmma", title, entries, (), (1,), 0.6))
    return contests


def limits(site: Site) -> list[Contest]:
    """Few rows against everybody, then the sizes at which N x N matrices end."""
    contests = []
    everybody = {
        SUPCON: ("chunk", "class-sums", "eager", "pml"),
        INFO_NCE: ("chunk", "eager", "pml"),
    }
    for n, names in (
        (4096, everybody),
        (65536, {op: ("eager",) for op in LOSSES}),
        (LARGEST, {op: ("eager", "compile") for op in LOSSES}),
    ):
        for op in LOSSES:
            entries = site.entries(names[op], op, site.flat(op, n, 128), "bf16")
            title = f"{_title(op, n, 128, 'bf16')}, with N x N matrices"
            contests.append(Contest("limits", title, entries, (), (1,), 1.0))
    for name in ("bf16", "tf32"):
        case = site.flat(MATCH, MIDDLE, 128)
        entries = site.entries(("eager",), MATCH, case, name)
        title = f"correspondence, {MIDDLE} x 128, {name}"
        contests.append(Contest("limits", title, entries, (), (1,), 0.6))
    return contests


def patches(site: Site) -> list[Contest]:
    """Patch-affinity contrast, the windows behind it, and the uncertainty gate."""
    contests = []
    for kind in ARITHMETIC:
        plain = site.flat(SUPCON, MIDDLE, 128)
        case = replace(plain, temperature=1.0, options=(("patches", 3),))
        ours, goals = [], []
        for name in site.ours:
            label = f"{name}, 3 patch sizes"
            ours += [
                site.entry(name, AFFINITY, case, kind, label=label, mode="forward"),
                site.entry(name, SUPCON, plain, kind, mode="forward"),
            ]
            goals.append(Goal(label, name, "overhead", AFFINITY_RATE, clock="wall", stat="median"))
        title = f"three patch sizes beside {_title(SUPCON, MIDDLE, 128, kind)}, forward alone"
        contests.append(Contest("patches", title, tuple(ours), tuple(goals), (1,), 0.6))
        few = site.flat(SUPCON, 4096, 128)
        few = replace(case, name=few.name, shape=(1, *reversed(few.shape)))  # one image
        for n, one, others in ((MIDDLE, case, ()), (4096, few, ("gemm",))):
            entries = site.entries(others, CONTRAST, one, kind)
            title = f"patch_affinity_contrast, 3 patch sizes, {n} x 128, {kind}"
            contests.append(Contest("patches", title, entries, (), (1,), 0.6))
    for op, kinds in ((RATIO, ("fp32",)), (GATE, ("fp32", "bf16"))):
        for timed in spec(op).benchmarks:
            case = _shrunk(timed, 1 if op == RATIO else 2, site)
            # the published way would take hundreds of thousands of torch.unique for every cell
            others = () if timed.name == "dense512" else ("released",)
            for kind in kinds:
                title = f"{op}, {case.reason}, {case.name}, {kind}"
                entries = site.entries(others, op, case, kind)
                contests.append(Contest("patches", title, entries, (), (1,), 0.4))
    return contests


def _shrunk(case: Case, axes: int, site: Site) -> Case:
    """A map at the site's scale; `axes` come before the spatial ones."""
    spatial = case.shape[axes:]
    shrink = round(site.rows ** (1 / len(spatial)))
    return replace(case, shape=(*case.shape[:axes], *(size // shrink for size in spatial)))


def selection(site: Site) -> list[Contest]:
    """The pairs with the largest gradients beside a forward pass, and projected gradients."""
    contests = []
    for scope, most, bound, kinds in (
        ("global", 2**20, TOPK_VS_FORWARD, ARITHMETIC),
        ("anchor", 64, ROW_TOPK_VS_FORWARD, ("bf16",)),
    ):
        plain = site.flat(SUPCON, MIDDLE, 128)
        plain = replace(plain, name=f"{plain.name}_{scope}")
        case = replace(plain, options=(("most", most), ("scope", scope)))
        for kind in kinds:
            entries, goals = [], []
            for name in site.ours:
                forward = f"{name}, forward"
                entries += [
                    site.entry(name, "pair_topk", case, kind, mode="forward"),
                    site.entry(name, "pair_logsumexp", plain, kind, mode="forward", label=forward),
                ]
                goals.append(Goal(name, forward, "overhead", bound, clock="wall", stat="median"))
            title = f"pair_topk, {scope}, {MIDDLE} x 128, {kind}, beside pair_logsumexp"
            contests.append(Contest("selection", title, tuple(entries), tuple(goals), (1,), 0.6))
    for kind in ("bf16", "fp32"):
        rows = replace(site.flat(SUPCON, 65536, 128), maps=3)
        entries = site.entries(("eager",), "mitigate_rows", rows, kind)
        goals = tuple(
            Goal(name, "eager", "speedup", PCGRAD_VS_EAGER, clock="wall", stat="median")
            for name in site.ours
        )
        title = f"mitigate_rows (pcgrad), 3 x 65536 x 128, {kind}"
        contests.append(Contest("selection", title, entries, goals, (1,), 0.4))
    return contests


CONTESTS: dict[str, Callable[[Site], list[Contest]]] = {
    "peers": peers,
    "batches": batches,
    "wgmma": wgmma,
    "sizes": sizes,
    "patches": patches,
    "selection": selection,
    "operations": operations,
    "forward": forward,
    "limits": limits,
}


def contests(only: tuple[str, ...], site: Site) -> list[Contest]:
    """The contests of some groups, in the order of `CONTESTS`."""
    return [one for group, make in CONTESTS.items() if group in only for one in make(site)]
