"""The GPU that a run is on: what it is, what it can do at best, how it is doing."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from types import SimpleNamespace
from typing import Any

import torch

from .turns import turns_on

# what nvidia-smi is asked for, and the name of the last before driver 535
STATE = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "pstate",
    "clocks_event_reasons.active",
)
OLDER_NAME = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
SIDE = {"cuda": 8192, "cpu": 256}  # of the square products that give the ceilings
COPIED_BYTES = {"cuda": 4 * 2**30, "cpu": 2**24}


def describe(device: str) -> dict[str, Any]:
    """Name, architecture, memory, driver."""
    if device != "cuda":
        return {"name": "no GPU, a dry run", "device": device}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "device": device,
        "architecture": f"sm_{found.major}{found.minor}",
        "memory_gb": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "l2_mb": getattr(found, "L2_cache_size", 0) / 2**20,
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": smi("driver_version").get("driver_version", "unknown"),
    }


def state() -> dict[str, str]:
    """Clocks (MHz), power (W), temperature and the reasons for throttling, by nvidia-smi; or why
    they are not known.
    """
    found = smi(*STATE)
    return smi(*(OLDER_NAME.get(name, name) for name in STATE)) if "error" in found else found


def smi(*names: str) -> dict[str, str]:
    """Fields of `nvidia-smi --query-gpu` of the first device; {"error": ...} where it has none."""
    if shutil.which("nvidia-smi") is None:
        return {"error": "nvidia-smi was not found"}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(names):
        return {"error": (done.stderr or done.stdout).strip()[:200]}
    return dict(zip(names, values, strict=True))


def ceilings(device: str) -> dict[str, float]:
    """What a large matrix product does in each arithmetic (GFLOP/s), and a large copy (GB/s, bytes
    read and written): medians of ten, on random numbers.
    """
    side, found = SIDE[device], {}
    before = torch.get_float32_matmul_precision()
    kinds = {
        "bfloat16": (torch.bfloat16, "highest"),
        "float16": (torch.float16, "highest"),
        "tf32": (torch.float32, "high"),
        "float32": (torch.float32, "highest"),
    }
    try:
        for name, (dtype, precision) in kinds.items():
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            ms = _median(device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            found[name] = 2.0 * side**3 / ms / 1e6
    finally:
        torch.set_float32_matmul_precision(before)
    source = torch.randint(-128, 127, (COPIED_BYTES[device],), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = _median(device, lambda: target.copy_(source))
    found["copy_gb_per_s"] = 2.0 * source.numel() / ms / 1e6
    return found


def _median(device: str, step: Any) -> float:
    """Milliseconds."""
    turns = turns_on(device)(SimpleNamespace(peak_mb=None), step)
    turns.warm_up()
    for _ in range(10):
        turns.turn()
    return statistics.median(turns.wall)
