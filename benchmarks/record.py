"""What is written down: rows, the machine, the file.

One JSON object: `schema`, `created`, `command`, `finished`, `machine`, `versions`, `commit`,
`rows`. A row is one contender on one input at one number of threads; `status` says whether it has
times.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
OWN = ("medcl_kernels", "torch", "triton", "numpy")
STATUSES = ("ok", "FAIL", "OOM", "timeout", "error", "skipped", "running")


@dataclass
class Row:
    """One measurement.

    Attributes:
        group: table. op: operation or loss. impl: contender. label: its name in the table.
        case: input by name; shape, n (rows), d (channels), dtype ("tf32": float32 whose products
            may be tf32), options say what it is.
        threads: of torch. device: "cpu" or "cuda". mode: "full" (forward and backward), "forward".
        flops_needed: of that, as the registry counts them.
        status: "ok", "FAIL" (wrong result), "OOM", "timeout", "error" (it raised, or took the
            process with it) or "skipped", with `reason`.
        repeats: turns taken.
        wall_*_ms, cpu_*_ms: per step; cpu is process time, all threads together. On a GPU wall is
            the time between two CUDA events.
        gflops_needed_per_s: at the minimum, on a GPU at the median; roofline_share: of
            the ceiling, the rate of a large matrix product in the same arithmetic and run.
        peak_mb: growth of the peak resident memory in one step (on a GPU: of torch's allocations),
            gradients included, in 2^20 bytes.
        error, max_error, value_error: against float64, see gate.Verdict; judged_on: on which case.
        speedup_vs: by label, how many times this one's time the other's is, for `cpu_min` and
            `wall_min`.
        goals: {"name", "value", "bound", "sense", "met", "stretch", "stretch_met"}.
        notes: further measured numbers.
    """

    group: str
    op: str
    impl: str
    label: str
    case: str
    shape: list[int]
    n: int
    d: int
    dtype: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    flops_needed: float = 0.0
    device: str = "cpu"
    mode: str = "full"
    status: str = "running"
    reason: str = ""
    repeats: int = 0
    wall_min_ms: float | None = None
    wall_median_ms: float | None = None
    wall_p20_ms: float | None = None
    wall_p80_ms: float | None = None
    cpu_min_ms: float | None = None
    cpu_median_ms: float | None = None
    cpu_p20_ms: float | None = None
    cpu_p80_ms: float | None = None
    gflops_needed_per_s: float | None = None
    ceiling_gflops_per_s: float | None = None
    roofline_share: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    max_error: float | None = None
    value_error: float | None = None
    judged_on: str = ""
    speedup_vs: dict[str, dict[str, float]] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def fail(self, status: str, reason: str) -> None:
        """No time, and why."""
        self.status, self.reason = status, reason

    def set_verdict(self, verdict: Any) -> None:
        """What the gate found."""
        self.error, self.max_error = verdict.error, verdict.max_error
        self.value_error, self.judged_on = verdict.value_error, verdict.judged_on

    def set_times(self, cpu: list[float], wall: list[float]) -> None:
        """Times of the turns, in ms per step."""
        self.status, self.repeats = "ok", len(wall)
        for clock, values in (("cpu", cpu), ("wall", wall)):
            setattr(self, f"{clock}_min_ms", min(values))
            setattr(self, f"{clock}_median_ms", statistics.median(values))
            setattr(self, f"{clock}_p20_ms", percentile(values, 0.2))
            setattr(self, f"{clock}_p80_ms", percentile(values, 0.8))
        if self.flops_needed:
            quoted = min(wall) if self.device == "cpu" else statistics.median(wall)
            self.gflops_needed_per_s = self.flops_needed / quoted / 1e6
            if self.ceiling_gflops_per_s:
                self.roofline_share = self.gflops_needed_per_s / self.ceiling_gflops_per_s

    def add_goal(self, value: float | None, goal: Any) -> None:
        """Records a goal of this row; without a value it is neither met nor missed."""
        at_least = goal.kind in ("speedup", "roofline")
        alone = goal.kind in ("roofline", "extra MB")
        self.goals.append(
            judged_goal(
                goal.kind if alone else f"{goal.kind} {goal.clock} vs {goal.against}",
                value,
                goal.bound,
                ">=" if at_least else "<=",
                goal.stretch,
            )
        )


def judged_goal(
    name: str, value: float | None, bound: float, sense: str, stretch: float | None = None
) -> dict[str, Any]:
    """A goal as it is written down."""

    def met(limit: float | None) -> bool | None:
        if value is None or limit is None:
            return None
        return value >= limit if sense == ">=" else value <= limit

    return {
        "name": name,
        "value": value,
        "bound": bound,
        "sense": sense,
        "met": met(bound),
        "stretch": stretch,
        "stretch_met": met(stretch),
    }


def percentile(values: list[float], fraction: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def machine() -> dict[str, Any]:
    """Where this ran."""
    import torch

    from medcl_kernels import env

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "library": dict(env.build_info()) if env.load_library() is None else {},
        "load_average_at_start": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {"python": platform.python_version()}
    for name in (*OWN, "pytorch-metric-learning", "monai", "inf-cl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of the checkout and whether it was changed since."""
    repo = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], cwd=repo, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"hash": git("rev-parse", "HEAD"), "changed": None if status is None else bool(status)}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def document(rows: list[Row], command: list[str], finished: bool) -> dict[str, Any]:
    """The whole file as one object."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "finished": finished,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": [filled(row) for row in rows],
    }


def filled(row: Row) -> dict[str, Any]:
    """The fields that say something; `load` gives the others their defaults again."""

    def default(one: Field[Any]) -> Any:
        return one.default if one.default_factory is MISSING else one.default_factory()

    values = {one.name: (getattr(row, one.name), default(one)) for one in fields(row)}
    return {name: value for name, (value, usual) in values.items() if value != usual}


def six_digits(value: Any) -> Any:
    """A value of JSON whose numbers are rounded to what a measurement is worth."""
    if isinstance(value, dict):
        return {name: six_digits(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [six_digits(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        # a line for each row: small, and comparable line by line
        head = json.dumps({key: content[key] for key in content if key != "rows"}, indent=1)
        rows = ",\n".join(json.dumps(row) for row in content["rows"])
        file.write(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The file and its rows.

    Raises:
        ValueError: it is not a file of this suite; the message says what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    problem = invalid(content)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return content, [Row(**row) for row in content["rows"]]


def invalid(content: Any) -> str | None:
    """What is wrong with a file's content, or None."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return f"expected an object with schema {SCHEMA}, as benchmarks.run writes it"
    missing = [name for name in ("machine", "versions", "commit", "rows") if name not in content]
    if missing:
        return f"it lacks {', '.join(missing)}"
    known = {one.name for one in fields(Row)}
    required = {"group", "op", "impl", "label", "case", "shape", "n", "d", "dtype", "threads"}
    for number, row in enumerate(content["rows"]):
        if not required <= row.keys() or not row.keys() <= known:
            return f"row {number}: fields {sorted((row.keys() - known) | (required - row.keys()))}"
        status = row.get("status", "running")
        if status not in STATUSES:
            return f"row {number}: status {status!r} is none of {', '.join(STATUSES)}"
        unmeasured = row.get("wall_min_ms") is None and row.get("peak_mb") is None
        if status == "ok" and unmeasured and not row.get("notes"):
            return f"row {number}: status ok without a measurement"
    return None


def die(message: str) -> None:
    """Ends a command with a message and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
