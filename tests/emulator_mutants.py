"""Planted bugs: one string changed in a copy of the CUDA sources, and who notices.

    python tests/emulator_mutants.py            every bug in every mode, as a table
    python tests/emulator_mutants.py WORD       those whose name or file has the word

Keeps the emulator honest: a bug that no mode notices is a hole in the tests. The copy has fewer
kernels (two products, two widths), so that it compiles quickly; the kernels are the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
from planted_bugs import CONTROL, MUTANTS, Mutant

Mode = tuple[str, str, tuple[str, ...]]  # name, sanitizer, arguments
MODES: tuple[Mode, ...] = (
    ("forward eager", "", ("forward", "eager", "0", "norace")),
    ("forward eager race", "", ("forward", "eager", "0")),
    ("forward late", "", ("forward", "late", "0", "norace")),
    ("reverse late", "", ("reverse", "late", "0", "norace")),
    ("random late race", "", ("random", "late", "1")),
    ("ASan+UBSan", "address", ("random", "late", "1")),
    ("TSan", "thread", ("random", "late", "1", "norace")),
)
QUICK_MODES = MODES[4:5]
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "MAX_JOBS": "1",
}
_local = threading.local()


def sources(folder: Path) -> Path:
    """A copy of csrc in which each worker plants its bugs, one after the other."""
    if getattr(_local, "root", None) != folder:
        copy = Path(tempfile.mkdtemp(dir=folder)) / "csrc"
        shutil.copytree(host_build.ROOT / "csrc", copy)
        sides = copy / "cuda/sides.cuh"
        text = sides.read_text()
        for product in ("Fp16", "Ieee"):
            case = rf"    case Product::{product.lower()}:\n      return run_width.*\n"
            text, found = re.subn(case, "", text)
            assert found == 1, "sides.cuh has changed: adapt the trimming"
        wgmma = copy / "cuda/wgmma.cuh"
        case, found = re.subn(
            r"    if \(owned.product == Product::fp16\).*\n", "", wgmma.read_text()
        )
        assert found == 1, "wgmma.cuh has changed: adapt the trimming"
        wgmma.write_text(case)
        wide = text.index("  else if (pitch <= 128)"), text.index("  else\n    run_pairs")
        sides.write_text(text[: wide[0]] + text[wide[1] :])
        _local.root, _local.copy = folder, copy
    return _local.copy


def planted(mutant: Mutant, original: str) -> str:
    """The text of the mutant's file with the bug in it."""
    assert original.count(mutant.old), f"{mutant.name}: not in {mutant.file}: {mutant.old}"
    return original.replace(mutant.old, mutant.new)


def judge(mutant: Mutant, calls: Path, folder: Path, modes: tuple[Mode, ...]) -> dict[str, str]:
    """For every mode what it noticed, "" for nothing."""
    copy = sources(folder)
    path = copy / mutant.file
    original = path.read_text()
    path.write_text(planted(mutant, original))
    verdicts = {}
    try:
        for name, sanitizer, arguments in modes:
            build = host_build.build(("replay",), sanitizer, copy, copy.parent / f"b{sanitizer}")
            try:
                done = subprocess.run(
                    [str(build / "replay"), str(calls), *arguments],
                    env={**os.environ, **_OPTIONS},
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                verdicts[name] = "never ends"
                continue
            verdicts[name] = _verdict(done.returncode, done.stdout + done.stderr)
    finally:
        path.write_text(original)
    return verdicts


def _verdict(code: int, output: str) -> str:
    conflicts = re.search(r"bank_conflicts (\d+)", output)
    if code == 0:
        return "bank conflicts" if conflicts and conflicts[1] != "0" else ""
    for sign, word in (
        ("WARNING: ThreadSanitizer", "TSan"),
        ("ERROR: AddressSanitizer", "ASan"),
        ("runtime error", "UBSan"),
        ("race", "race"),
        ("never waited for", "pending"),
        ("STOPPED", "message"),
        ("WRONG", "value"),
    ):
        if sign in output:
            return word
    return "crash"


def main() -> int:
    import emulator_cases as cases

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = folder / "calls"
        cases.write(calls, trimmed_calls())
        print("| planted bug |", " | ".join(mode[0] for mode in MODES), "|")
        print("|---" * (len(MODES) + 1) + "|")
        missed = 0

        def row(mutant: Mutant) -> tuple[Mutant, dict[str, str]]:
            return mutant, judge(mutant, calls, folder, MODES)

        word = sys.argv[1] if len(sys.argv) > 1 else ""
        chosen = [one for one in MUTANTS if word in one.name or word in one.file]
        with ThreadPoolExecutor(2) as pool:
            for mutant, verdicts in pool.map(row, (CONTROL, *chosen)):
                cells = (verdicts[mode[0]] or "-" for mode in MODES)
                print(f"| {mutant.name} |", " | ".join(cells), "|", flush=True)
                missed += any(verdicts.values()) == (mutant is CONTROL)
    print(f"\n{len(chosen)} bugs, {missed} rows not as they should be")
    return missed


def trimmed_calls() -> list:
    """Calls for the kernels that the copies have."""
    import emulator_cases as cases
    import emulator_filter_cases as filter_cases
    import emulator_patch_cases as patches
    import emulator_wgmma_cases as wgmma

    chosen = [wgmma.call(*one) for one in wgmma.ALL if one[1] == "bf16"]
    for operation, case, product in patches.ALL:
        if product == "bf16" or (product == "ieee" and operation != "pair_affinity"):
            if case.name not in ("D256", "many_classes"):
                chosen += patches.calls(operation, case, product)
    for operation in cases.OPERATIONS:
        for product in ("bf16", "tf32"):
            for shape in cases.selected(product, operation):
                pair = operation in cases.PAIRS
                if product == "tf32" and (not pair or shape.dim not in (3, 16, 96)):
                    continue
                if shape.dim == 256:
                    continue
                chosen += cases.calls(operation, shape, product)
    return chosen + filter_cases.few_calls()


if __name__ == "__main__":
    sys.exit(main())
