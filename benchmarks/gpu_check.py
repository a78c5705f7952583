"""Everything that needs a GPU, in one command without a network: `make gpu-check`.

Builds for the device that is there (or takes a wheel), runs the tests marked gpu, then the
benchmarks of grid.py, and writes one JSON file; a short table comes last. A step that fails, hangs
or runs out of its time stops no other one, but makes the exit status 1. Test files run in processes
of their own, one per backend, because one illegal access makes every later call of its process
fail. After Ctrl-C the file holds what was done until then.

`--dry-run` does the same on the CPU with tiny inputs and the tests that do not need the device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-check"
TOTAL = 520.0  # seconds for everything; the steps below have these at most
BUILD, ENV, TESTS = 150.0, 30.0, 190.0
CLOSING = 12.0  # kept for the last file and table
STALL = 100.0  # seconds without a line of progress after which the benchmarks are started again
GRACE = 15.0  # seconds between SIGINT and SIGKILL
SHARDS = ("not triton", "triton")  # what pytest's -k selects, one process each
ARITHMETIC = ("ieee", "tf32", "bf16", "fp16")
TOOLS = ("racecheck", "memcheck")  # of compute-sanitizer, the slow one first
# about half of what Triton compiles for the operations' tests, three to four minutes of one core
HEAVY = "(pair_topk or pair_filtered_grad or pair_affinity or uncertainty)"
MORE_SHARDS = {
    "test_gpu_ops.py": (
        *(f"triton and {a} and {part}" for a in ARITHMETIC for part in (HEAVY, f"not {HEAVY}")),
        *(f"not triton and {a}" for a in ARITHMETIC),
    ),
    "test_gpu_sanitizer.py": (
        *(f"{s} and {tool}" for tool in TOOLS for s in SHARDS),
        " and ".join(f"not {tool}" for tool in TOOLS),
    ),
}
TEST_PROCESSES = 12  # Triton compiles on the CPU; the device is shared and mostly idle


@dataclass
class Step:
    """One step and how it went.

    Attributes:
        name: of the step, or of the test file and backend.
        status: "ok", "failed", "timeout", "stopped" or "skipped".
        seconds: it took.
        detail: what went wrong: names of failed tests, or the end of the output.
        counts: of tests by outcome.
        skipped: reasons of skipped tests and how often each was given.
    """

    name: str
    status: str = "ok"
    seconds: float = 0.0
    detail: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class Check:
    """One run: its options, clock, running children and finished steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.steps: list[Step] = []
        self.children: set[subprocess.Popen[str]] = set()
        self.lock = threading.RLock()
        self.rows_file = FOLDER / "benchmarks.json"
        self.variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        if not options.dry_run:  # the benchmark package would set one worker, for timing on CPUs
            workers = str(min(8, os.cpu_count() or 1))
            self.variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", workers)
        self.set_path()

    def set_path(self, *folders: Path) -> None:
        """Puts folders in front of the checkout on the children's PYTHONPATH."""
        paths = [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    def left(self) -> float:
        """Seconds until the end of everything."""
        return self.options.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def add(self, step: Step) -> None:
        """Notes a finished step; the tests' threads take turns here."""
        counts = ", ".join(f"{number} {what}" for what, number in step.counts.items() if number)
        with self.lock:
            self.steps.append(step)
            counts = counts and f": {counts}"
            self.say(f"{step.name}: {step.status} in {step.seconds:.0f} s{counts}")
            for line in step.detail[:12]:
                print(f"         {line[:200]}", flush=True)
            self.save()

    # ---- children

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """A child in a process group of its own."""
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )
        self.children.add(child)
        return child

    def end(self, child: subprocess.Popen[str]) -> None:
        """Lets a child save what it has, then makes sure that its whole group is gone."""
        for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
            try:
                os.killpg(child.pid, number)
                child.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.children.discard(child)

    def run(self, name: str, command: list[str], seconds: float) -> tuple[Step, Path]:
        """A child whose output goes to a log."""
        log = FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.log"
        step, before = Step(name), time.monotonic()
        with open(log, "w") as file:
            child = self.start(command, stdout=file)
            try:
                code = child.wait(max(1.0, min(seconds, self.left())))
                step.status = "ok" if code == 0 else "failed"
                self.children.discard(child)
            except subprocess.TimeoutExpired:
                step.status = "timeout"
                self.end(child)
        step.seconds = round(time.monotonic() - before, 1)
        if step.status != "ok":
            step.detail = log.read_text(errors="replace").splitlines()[-30:]
        return step, log

    # ---- steps

    def install(self) -> bool:
        """Builds here, or unpacks the wheels that were given; whether it worked."""
        python, options = sys.executable, self.options
        extra = sorted(Path(options.wheels).glob("*.whl")) if options.wheels else []
        wanted = [Path(options.wheel)] if options.wheel else []
        site = FOLDER / "site"
        if wanted or extra:
            command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            command += ["--upgrade", "--target", str(site), *map(str, [*wanted, *extra])]
            step, _ = self.run("wheels", command, BUILD)
            self.add(step)
            self.set_path(site)
            if step.status != "ok" and wanted:
                return False
        if wanted or options.dry_run:
            return True
        self.variables.setdefault("MEDCL_CUDA", "1")
        self.variables.setdefault("MEDCL_CUDA_ARCHS", architecture())
        self.variables.setdefault("MEDCL_BUILD_DIR", str(FOLDER / "cmake"))
        self.say(f"build for {self.variables['MEDCL_CUDA_ARCHS']}")
        # setup.py is run by its path: PYTHONSAFEPATH does not hide its own folder's modules
        command = [python, "setup.py", "-q", "egg_info", "build_ext", "--inplace"]
        step, _ = self.run("build", command, BUILD)
        self.add(step)
        return step.status == "ok"

    def environment(self) -> None:
        """What `python -m medcl_kernels env` says, in the log and on the terminal."""
        step, log = self.run("env", [sys.executable, "-m", "medcl_kernels", "env"], ENV)
        print(log.read_text(errors="replace"), end="", flush=True)
        self.add(step)

    def tests(self) -> None:
        """Every test file with GPU tests, one process per file and backend, a few at a time."""
        files = [Path(name) for name in self.options.tests] or gpu_tests()
        end = min(TESTS, self.left() - CLOSING)
        deadline = time.monotonic() + max(end, 1.0)
        self.say(f"tests of {len(files)} files, {end:.0f} s at most")

        def one(file: Path, backend: str) -> None:
            name = f"{file.name} -k '{backend}'"
            seconds = deadline - time.monotonic()
            if seconds < 5:
                self.add(Step(name, "skipped", detail=["no time was left"]))
                return
            report = FOLDER / f"{file.stem}-{re.sub('[^a-z0-9]+', '-', backend)}.xml"
            report.unlink(missing_ok=True)
            marker = "not gpu and not slow" if self.options.dry_run else "gpu"
            command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-k", backend]
            # plugins that start threads or processes of their own are not wanted beside a device
            command += ["-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
            step, _ = self.run(name, command, seconds)
            read_report(report, step)
            if step.counts or step.status != "ok":
                self.add(step)

        with ThreadPoolExecutor(TEST_PROCESSES) as pool:
            jobs = [
                pool.submit(one, file, backend)
                for file in files
                for backend in MORE_SHARDS.get(file.name, SHARDS)
            ]
            try:
                for job in jobs:
                    job.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def benchmarks(self) -> None:
        """benchmarks.run --gpu, started again behind a contender that broke or hung it."""
        step, before = Step("benchmarks"), time.monotonic()
        self.rows_file.unlink(missing_ok=True)
        progress = -1
        while True:
            seconds = self.left() - CLOSING
            if seconds < 10:
                step.status = "timeout"
                step.detail.append("no time was left for all contests")
                break
            command = [sys.executable, "-m", "benchmarks.run", "--gpu", "--no-tables", "--out"]
            command += [str(self.rows_file), f"--seconds={seconds - 5:.0f}", "--timeout=30"]
            command += ["--dry-run"] if self.options.dry_run else []
            command += ["--resume"] if progress >= 0 else []
            code = self.follow(command + self.options.benchmark_options, seconds)
            if code == 0:
                break
            step.status = "failed"
            step.detail.append(f"exit {code} after {time.monotonic() - before:.0f} s")
            if code in (1, 2, 130):  # ran to its end, with wrong results or wrong options
                break
            # a process that died is followed by another as long as each gets further
            rows = self.rows()
            if rows <= progress:
                step.detail.append("no progress since the process before")
                break
            progress = rows
            self.say(f"benchmarks: {step.detail[-1]}, going on in a new process")
        step.seconds = round(time.monotonic() - before, 1)
        self.add(step)

    def rows(self) -> int:
        """How many rows the benchmarks have written."""
        try:
            return len(json.loads(self.rows_file.read_text())["rows"])
        except (OSError, ValueError, KeyError):
            return 0

    def follow(self, command: list[str], seconds: float) -> int | str:
        """Runs a child and prints its lines; its exit code, "stall" or "timeout"."""
        child = self.start(command, stdout=subprocess.PIPE)
        last = [time.monotonic()]

        def copy() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                last[0] = time.monotonic()
                print(line, end="", flush=True)

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        end = time.monotonic() + seconds
        while child.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            verdict = "timeout" if now > end else "stall" if now - last[0] > STALL else ""
            if verdict:
                self.end(child)
                return verdict
        self.children.discard(child)
        reader.join(5)
        return child.returncode

    # ---- the file

    def stop(self) -> None:
        """Ends every child."""
        for child in list(self.children):
            self.end(child)

    def content(self) -> dict[str, Any]:
        """What the benchmarks wrote, or an empty file of theirs, with the steps."""
        try:
            content = json.loads(self.rows_file.read_text())
        except (OSError, json.JSONDecodeError):
            from benchmarks import record

            content = record.document([], [], False)
        content["steps"] = [asdict(step) for step in self.steps]
        content["check_seconds"] = round(time.monotonic() - self.started, 1)
        return content

    def out(self, content: dict[str, Any]) -> Path:
        """`benchmarks/results/<device>.json`, unless another place was named."""
        if self.options.out:
            return Path(self.options.out)
        if self.options.dry_run:
            return FOLDER / "dry-run.json"
        name = content["machine"].get("gpu", {}).get("name", "gpu")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return ROOT / "benchmarks" / "results" / f"{slug}.json"

    def save(self, final: bool = False) -> Path:
        """Writes the file; before the end in the working folder, so that a run that is cut short
        replaces no whole one.
        """
        from benchmarks import record

        content = self.content()
        path = self.out(content) if final else FOLDER / "partial.json"
        record.save(path, content)
        return path


def architecture() -> str:
    """What to compile for: the first device's own architecture, such as "90a"."""
    code = "import torch; print(*torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    major, minor = done.stdout.split()
    # "a" and "f" name the instructions of one chip or family, wgmma and tcgen05 among them
    suffix = {"9": "a", "10": "f", "12": "f"}.get(major, "")
    return f"{major}{minor}{suffix}"


def gpu_tests() -> list[Path]:
    """Test files with tests marked gpu, the sanitizer's first: they take longest."""
    marks = re.compile(r"mark\.gpu|\bbackends\(\)")
    found = [path for path in (ROOT / "tests").glob("test_*.py") if marks.search(path.read_text())]
    return sorted(found, key=lambda path: ("sanitizer" not in path.name, path.name))


def read_report(path: Path, step: Step) -> None:
    """Fills in counts, failures and reasons for skips from pytest's JUnit file."""
    if not path.is_file():
        return
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in xml.parse(path).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skips = [child for child in case if child.tag == "skipped"]
        counts["failed" if bad else "skipped" if skips else "passed"] += 1
        for child in bad:
            message = (child.get("message") or "").strip().splitlines() or [""]
            failures.append(f"{case.get('name')}: {message[0]}")
        for child in skips:
            reason = (child.get("message") or "").strip()
            step.skipped[reason] = step.skipped.get(reason, 0) + 1
    if not any(counts.values()):
        step.status = "ok"  # pytest's code 5: this file has no test for this backend
        step.detail = []
        return
    step.counts = counts
    if failures:
        step.detail = failures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    made.add_argument("--wheel", help="a medcl_kernels wheel to install instead of building")
    made.add_argument("--wheels", help="a folder with wheels of further peers")
    made.add_argument("--out", help="JSON file; default benchmarks/results/<device>.json")
    made.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    made.add_argument("--dry-run", action="store_true", help="on the CPU, tiny: tries the harness")
    made.add_argument("--tests", nargs="*", default=[], help="only these files; default: all")
    made.add_argument(
        "--skip", default="", help="comma-separated steps of build, env, tests, benchmarks"
    )
    made.add_argument(
        "benchmark_options", nargs="*", help="after --: options of benchmarks.run, such as --only"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; 0 if all passed, 1 if one did not, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    check = Check(options)
    skip = options.skip.split(",")

    def terminated(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    stopped = False
    try:
        built = "build" in skip or check.install()
        if "env" not in skip:
            check.environment()
        if "tests" not in skip:
            check.tests()
        if "benchmarks" not in skip:
            check.benchmarks()
        if not built:
            check.say("the build failed: what ran, ran without CUDA C++ kernels")
    except KeyboardInterrupt:
        stopped = True
        check.stop()
        check.add(Step("run", "stopped"))
    finally:
        signal.signal(signal.SIGTERM, before)
    return conclude(check, stopped)


def conclude(check: Check, stopped: bool) -> int:
    """Writes the file and prints the tables and what failed."""
    from benchmarks import gpu_table, table
    from benchmarks.record import Row

    path = check.save(final=True)
    content = check.content()
    rows = [Row(**row) for row in content["rows"]]
    if "gpu" in content["machine"]:
        only = gpu_table.SHORT
        print("\n" + table.render(content, rows, only=only))
    print()
    for step in check.steps:
        counts = " ".join(f"{number} {what}" for what, number in step.counts.items())
        print(f"{step.status:8} {step.seconds:5.0f} s  {step.name}  {counts}".rstrip())
    wrong = [row for row in rows if row.status in ("FAIL", "error")]
    for row in wrong:
        print(f"{row.status:8} {row.op} {row.case} {row.dtype} {row.label}: {row.reason[:120]}")
    bad = [step for step in check.steps if step.status != "ok"]
    verdict = "stopped" if stopped else f"{len(bad)} steps failed" if bad else "all steps passed"
    print(f"gpu-check: {verdict} in {content['check_seconds']:.0f} s -> {path}")
    return 130 if stopped else 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
