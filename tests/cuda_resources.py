"""Registers, spills and shared memory of every CUDA kernel, as ptxas reported them in a build.

    python tests/cuda_resources.py build/cmake            print the table
    python tests/cuda_resources.py build/cmake --write    and replace cuda_resources.json
    python tests/cuda_resources.py --markdown             the committed table, for docs/gpu-notes.md

`tests/test_cuda_build.py` compares a build with the table in cuda_resources.json, so that a kernel
that begins to spill is noticed without a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
COMMITTED = ("sm_80", "sm_90a", "sm_100f", "sm_120f")  # one of every generation
SELECTIONS = 3  # at once: kSelectionsAtOnce of sides.cuh
# floats of state of an epilogue (engine.cuh) per thread, selection, row piece and half; per block;
# and how many selections' terms are read at most
STATE = {"LogSumExp": (3, 0, SELECTIONS), "PositiveLog": (4, 0, SELECTIONS), "Argmax": (0, 0, 0)}
GRADIENTS = ("BoundedSoftmaxGradient", "SoftmaxGradient", "SigmoidGradient")
STATE |= {name: (4, 0, SELECTIONS) for name in GRADIENTS}
STATE |= {"Affinity": (4, 0, SELECTIONS), "AffinityGradient": (0, 0, SELECTIONS)}
STATE |= {"PairSelect": (0, 4096, 1), "FilteredGradient": (4, 0, 3)}
# dynamic shared memory that a block may ask for, in bytes; kernels stay below the smallest
LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_90a": 232448, "sm_120f": 101376}
KERNEL = re.compile(
    r"pair_kernel<medcl::cuda::Tile<medcl::cuda::(?P<product>\w+)Product, (?P<slab>\d+), "
    r"(?P<warps>\d+), (?P<pieces>\d+), (?P<columns>\d+), (?P<stages>\d+), (?P<resident>\w+)>, "
    r"medcl::cuda::(?P<epilogue>\w+)<.*?(?:\(medcl::cuda::Weights\)(?P<weights>\d))?> ?>\("
)


# the same loop over tiles for wgmma, csrc/cuda/wgmma.cuh, which only sm_90a has: elsewhere an empty
# kernel that no launch can start
WGMMA = re.compile(KERNEL.pattern.replace("::Tile<", "::WgmmaTile<").replace(
    r"(?P<warps>\d+), (?P<pieces>\d+), (?P<columns>\d+), (?P<stages>\d+), (?P<resident>\w+)>",
    r"(?P<stages>\d+)>",
))  # fmt: skip
WGMMA_TILE = {"warps": "8", "pieces": "1", "columns": "128", "resident": "true"}
WGMMA_ARCH, ALIGNMENT = "sm_90a", 1024 - 128


def shared_bytes(tile: re.Match[str] | dict[str, str], epilogue: str) -> int:
    """The most dynamic shared memory of a launch: `shared_bytes` of engine.cuh."""
    slab, warps, pieces, columns, stages = (
        int(tile[name]) for name in ("slab", "warps", "pieces", "columns", "stages")
    )
    pitch = slab * (2 if tile["product"] in ("Bf16", "Fp16") else 4)
    owned, streamed = 16 * pieces * warps * pitch, columns * pitch
    per_row, per_block, selections = STATE[epilogue]
    resident = tile["resident"] == "true"
    stage = streamed + (0 if resident else owned) + selections * 16 * columns
    state = 4 * (selections * per_row * pieces * 2 * 32 * warps + per_block)
    return (owned if resident else 0) + stages * stage + state


def label(name: str) -> tuple[str, int]:
    """A short name of a kernel and its dynamic shared memory."""
    tile = WGMMA.search(name)
    if tile is not None:
        bytes_ = shared_bytes({**tile.groupdict(), **WGMMA_TILE}, tile["epilogue"]) + ALIGNMENT
        return f"{tile['epilogue']} {tile['product'].lower()} {tile['slab']} wgmma", bytes_
    tile = KERNEL.search(name)
    if tile is None:
        return re.sub(r"medcl::cuda::(\(anonymous namespace\)::)?|\(.*", "", name).strip(), 0
    epilogue = GRADIENTS[int(tile["weights"])] if tile["weights"] else tile["epilogue"]
    width = f"{tile['slab']}{'' if tile['resident'] == 'true' else ' streamed'}"
    return f"{epilogue} {tile['product'].lower()} {width}", shared_bytes(tile, epilogue)


def collect(build: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers, spill bytes, shared bytes, from the kept logs."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for log in sorted(build.rglob("*.cu.o.log")):
        for entry in log.read_text().split("Compiling entry function '")[1:]:
            mangled, _, rest = entry.partition("' for '")
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", rest)
            registers = re.search(r"Used (\d+) registers", rest)
            assert spills is not None and registers is not None, f"{log}: not as ptxas writes it"
            demangled = subprocess.run(
                ["c++filt", mangled], capture_output=True, text=True, check=True
            ).stdout
            name, shared = label(demangled)
            arch = rest.split("'")[0]
            if name.endswith(" wgmma") and arch != WGMMA_ARCH:
                assert int(registers[1]) <= 8, f"{arch} {name}: not empty"
                continue
            static = re.search(r"(\d+) bytes smem", rest)
            found.setdefault(arch, {})[name] = {
                "registers": int(registers[1]),
                "spill_bytes": int(spills[1]) + int(spills[2]),
                "shared_bytes": shared + (int(static[1]) if static else 0),
            }
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(found.items())}


def markdown(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """Registers on sm_80 / sm_90a and the most KiB of shared memory, by row width."""
    lines = ["| kernel | 64 | 128 | 256 | streamed |", "|---|---|---|---|---|"]
    for epilogue in STATE:
        for product in ("bf16", "fp16", "tf32", "ieee"):
            cells = [f"{epilogue}, {product}"]
            for width in ("64", "128", "256", "128 streamed", "64 streamed"):
                uses = [
                    table[arch].get(f"{epilogue} {product} {width}") for arch in ("sm_80", "sm_90a")
                ]
                if None in uses:
                    if width == "256":
                        cells.append("")
                    continue
                registers = " / ".join(str(use["registers"]) for use in uses if use)
                shared = next(use["shared_bytes"] for use in uses if use)
                cells.append(f"{registers}, {shared / 1024:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def nvcc_release() -> str:
    """Such as 13.0."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def main() -> int:
    if sys.argv[1] == "--markdown":
        print(markdown(json.loads(TABLE.read_text())["kernels"]))
        return 0
    found = collect(Path(sys.argv[1]))
    if not found:
        print(f"no compiler logs under {sys.argv[1]}: build with nvcc first")
        return 1
    for arch, kernels in found.items():
        print(f"\n{arch}: {len(kernels)} kernels")
        for name, use in kernels.items():
            print(f"{name:45} {use['registers']:4} {use['spill_bytes']:5} {use['shared_bytes']:7}")
    if "--write" in sys.argv:
        kept = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
        new = {arch: kernels for arch, kernels in found.items() if arch in COMMITTED}
        table = {"nvcc": nvcc_release(), "kernels": {**kept["kernels"], **new}}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
