"""impl="cuda" without a device: loads the library medcl_emulated and lets the backend "cuda" run on
CPU tensors, in a process of its own, since one process has one library. A plugin of pytest
(`-p emulator_backend`), which test_emulator_backend.py starts.
"""

from __future__ import annotations

import os
from dataclasses import replace

import host_build
import torch

LIBRARY = "libmedcl_emulated.so"


def use() -> None:
    """Changes this process for good."""
    os.environ["MEDCL_LIBRARY"] = str(host_build.build(("medcl_emulated",)) / LIBRARY)
    from medcl_kernels import dispatch, env

    assert env.load_library() is None, env.load_library()
    assert env.build_info()["cuda_archs"] == "emulator"
    changes = {
        "cuda": {"devices": ("cpu",), "unavailable": lambda: None},
        "cpu": {"unavailable": lambda: "the library of this process has the CUDA kernels instead"},
    }
    dispatch.BACKENDS = tuple(
        replace(one, **changes.get(one.name, {})) for one in dispatch.BACKENDS
    )
    # torch's empty tensors hold NaN then, as large integers where they are integers
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


use()
