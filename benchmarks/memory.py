"""Extra peak memory of one step, in a process of its own.

The child draws the input, takes one step on a small input (so that libraries, thread pools and
their buffers exist), hands freed memory back to the system, sets the kernel's high-water mark of
resident memory back to now (`5` into /proc/self/clear_refs), takes one step, and reads the mark
(VmHWM). The difference to the resident memory before the step is what the step needed on top of its
inputs, gradients included. Where the mark cannot be set back, a thread samples resident memory
every millisecond instead; `method` says which. The address space is limited first, so a contender
that wants more than the machine has ends with an allocation error: "OOM".
"""

from __future__ import annotations

import ctypes
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .contenders import Entry


@dataclass(frozen=True)
class Peak:
    """What the child found.

    Attributes:
        status: "ok", "OOM" or "timeout".
        reason: for the last two.
        extra_mb: growth of the peak in 2^20 bytes.
        gradients_mb: of which gradients.
        cpu_ms, wall_ms: of the one step.
        method: "VmHWM" or "sampled".
        tensors: (outputs, gradients by leaf), if asked for.
    """

    status: str
    reason: str = ""
    extra_mb: float | None = None
    gradients_mb: float | None = None
    cpu_ms: float | None = None
    wall_ms: float | None = None
    method: str = ""
    tensors: Any = None


def measure(
    entry: Entry, threads: int, *, limit: int, timeout: float, tensors: bool = False
) -> Peak:
    """Runs one step of `entry` in a child.

    Args:
        entry: who and on what.
        threads: of torch in the child.
        limit: bytes that the child may allocate on top of what it has after its imports.
        timeout: seconds for the whole child.
        tensors: bring the results back too.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder) / "results.pt") if tensors else None
        order = pickle.dumps((entry, threads, limit, results))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory"],
                input=order,
                capture_output=True,
                timeout=timeout,
                cwd=Path(__file__).resolve().parents[1],
            )
        except subprocess.TimeoutExpired:
            return Peak("timeout", f"not done after {timeout:.0f} s")
        if done.returncode == -9:
            return Peak("OOM", "killed by the system")
        if done.returncode != 0:
            raise RuntimeError(
                f"memory of {entry.label} on {entry.case.name}: the child ended with "
                f"{done.returncode}:\n{done.stderr.decode(errors='replace')[-2000:]}"
            )
        found = Peak(**json.loads(done.stdout.splitlines()[-1]))
        if results and found.status == "ok":
            import torch

            found = replace(found, tensors=torch.load(results, weights_only=True))
        return found


def _child() -> None:
    """Reads an order from standard input, prints one JSON object."""
    import torch

    from .contenders import run_once
    from .contest import address_space, first_line, out_of_memory

    entry, threads, limit, results = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    function = entry.function()
    small = entry if entry.compiles else replace(entry, case=_small(entry.case))
    run_once(function, small.sample())
    sample = entry.sample()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + limit,) * 2)
    try:
        with _Watch() as watch:
            start, start_cpu = time.perf_counter(), time.process_time()
            outputs, gradients = run_once(function, sample)
            cpu, wall = time.process_time() - start_cpu, time.perf_counter() - start
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(json.dumps({"status": "OOM", "reason": first_line(error)}))
        return
    if results:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        torch.save((tuple(value.detach() for value in outputs), gradients), results)
    size = sum(g.numel() * g.element_size() for g in gradients.values() if g is not None)
    answer = {
        "status": "ok",
        "extra_mb": watch.extra / 2**20,
        "gradients_mb": size / 2**20,
        "cpu_ms": cpu * 1e3,
        "wall_ms": wall * 1e3,
        "method": watch.method,
    }
    print(json.dumps(answer))


def _small(case: Any) -> Any:
    """The same kind of input with few rows."""

    def cut(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is None:
            return None
        return (256, shape[1]) if len(shape) == 2 else (min(2, shape[0]), shape[1], 8, 8)

    return replace(case, shape=cut(case.shape), key_shape=cut(case.key_shape))


class _Watch:
    """Growth of this process's peak resident memory inside a `with` block."""

    def __enter__(self) -> _Watch:
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            pass  # not glibc: freed memory may still count as resident, which flatters nobody
        self.before = _status("VmRSS")
        self.method = "VmHWM"
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            self.method = "sampled"
        # the mark follows page accounting that the kernel batches; far off means it was not reset
        if self.method == "VmHWM" and _status("VmHWM") > self.before + 2**20:
            self.method = "sampled"
        self.top, self.stop = self.before, threading.Event()
        if self.method == "sampled":
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.001):
            self.top = max(self.top, _status("VmRSS"))

    def __exit__(self, *_: object) -> None:
        if self.method == "sampled":
            self.stop.set()
            self.thread.join()
        else:
            self.top = _status("VmHWM")
        self.extra = max(0, self.top - self.before)


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    # run as a module, so that classes in the order are those of the package
    from benchmarks import memory

    memory._child()
