"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills, within shared memory.

No GPU is needed; Triton brings its assembler along. A change of a kernel that would make it spill
or outgrow a chip fails here. `make test` compiles every table with its heaviest kernel and every
kernel once, `make aot` every kernel with every row of its tables and all that the autotuner times
(which may spill).
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: make venv", allow_module_level=True)

from triton_compile import (
    ARCHITECTURES,
    CALLS,
    SHARED_MEMORY,
    in_every_run,
    jobs,
    record,
    resources,
    serves,
    timed_only,
)

from medcl_kernels.triton import configs

# kernel -> the most bytes of spill stores that are accepted of it, in any product, width and
# architecture, as measured; everything else spills nothing. Nothing has shown on a GPU yet whether
# smaller tiles, which would not spill, are faster there.
ALLOWED = {
    # one register too many for 128 x 256 sums; the next smaller tiles share half as much
    "gradient": 4,
    # the assembler holds 256 threads to 128 registers by itself, so that two programs fit
    "heavy": 16,
    "heavy_gradient": 4,
    "pair_affinity": 48,
    "pair_affinity backward": 4,
    "pair_affinity, cold": 48,
    "pair_affinity, cold backward": 4,
    "pair_affinity, release2d, 3 classes backward": 20,
    "pair_affinity, key and shift": 32,
    "pair_affinity, key and shift, cold": 32,
    "pair_affinity, 10 classes": 12,
    "pair_logsumexp, three, running maxima": 36,
    # the sweep that writes the list; the others have none
    "pair_topk": 12,
    # float16 clamps its weights
    "filtered": 36,
    # three label maps at once, each with a running maximum or a logarithm of its own
    "pair_logsumexp backward, three, cold": 124,
    "pair_positive_log, three": 564,
    "pair_positive_log backward, three": 308,
    # shares of more than eight classes are read again for every tile
    "pair_affinity, 10 classes backward": 2752,
    # sums of whole rows of more than 256 channels, once per row and not per pair
    "positive_at": 436,
}
if configs.EARLIER:
    # Triton 3.6 (torch 2.10 and 2.11 bring it) takes more registers for vectors that stream along.
    # Kilobytes: the key's gradient of three patch sizes, and ten classes, 128 x 64 on sm_90.
    ALLOWED |= {
        "statistics": 20,
        "heavy": 24,
        "gradient": 12,
        "heavy_gradient": 336,
        "pair_logsumexp, key, running maximum": 4,
        "pair_logsumexp, three, running maxima": 40,
        "pair_logsumexp backward, three": 104,
        "pair_logsumexp backward, four": 104,
        "pair_logsumexp backward, cold": 16,
        "pair_logsumexp backward, three, cold": 296,
        "pair_positive_log, three": 576,
        "pair_positive_log backward, key": 8,
        "pair_positive_log backward, three": 340,
        "positive_mean": 8,
        "patch_class_ratio": 20,
        "mitigate_rows": 24,
        "pair_affinity backward": 336,
        "pair_affinity, cold backward": 336,
        "pair_affinity, key and shift": 40,
        "pair_affinity, key and shift backward": 2540,
        "pair_affinity, key and shift, cold": 40,
        "pair_affinity, key and shift, cold backward": 2540,
        "pair_affinity, release2d, 3 classes": 8,
        "pair_affinity, release2d, 3 classes backward": 1024,
        "pair_affinity, 10 classes": 16,
        "pair_affinity, 10 classes backward": 2780,
    }


def marks(job):
    return () if in_every_run(job) else pytest.mark.aot


def name(job):
    config = job.config
    tile = f"{config.rows}x{config.columns}" if config else "rows"
    return f"{job.label}-{job.product}-{job.channels}-{tile}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "architecture"),
    [
        pytest.param(job, one, id=f"{name(job)}-sm_{one}", marks=marks(job))
        for job in jobs()
        for one in ARCHITECTURES
        if serves(job, one)
    ],
)
def test_kernel_compiles_without_spills_within_shared_memory(job, architecture):
    for launch in record(job):
        used = resources(launch, architecture)
        said = f"{launch.name}: {used}"
        if timed_only(job):
            continue
        assert used.spills <= ALLOWED.get(job.label, 0), said
        assert used.shared <= SHARED_MEMORY[architecture], said
        if job.config is not None:
            assert used.registers > 32, f"{said}: did the assembler give up?"
        if architecture == 80 and job.config == last(job):
            # the same code runs on sm_86 and sm_89, which have less
            assert used.shared <= SHARED_MEMORY[86], said


def last(job):
    """The configuration that must fit everywhere."""
    if job.label not in CALLS:
        return None
    return configs.candidates(job.table, job.precision, job.channels, 8)[-1]
