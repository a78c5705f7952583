"""Which CUDA devices kernels can run on, and why not: asked before a launch, so that none fails for
a reason that was known.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from . import env

OLDEST = (8, 0)  # Ampere: the first with the bfloat16 and tf32 products that the kernels use


def no_device() -> str | None:
    """Why torch can use no CUDA device at all, and the way out; None where it can."""
    if torch.cuda.is_initialized():
        return None
    torch_is = f"torch {torch.__version__}"
    if torch.version.hip:
        return f"{torch_is} is a ROCm build, the kernels are for NVIDIA devices"
    if not torch.version.cuda:
        return f"{torch_is} was built without CUDA: install a CUDA build of torch"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # says why; nothing is initialised where there is no device
    except (RuntimeError, AssertionError) as error:
        text = str(error)
    else:
        text = "torch.cuda.is_available() is False"
    if "no NVIDIA driver" in text:
        return "there is no NVIDIA driver: install one, or keep the tensors on the CPU"
    if "too old" in text:
        return (
            f"the NVIDIA driver is too old for {torch_is} (CUDA {torch.version.cuda}): update the "
            "driver, or install a torch for an older CUDA"
        )
    visible = env.visible_devices()
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return f"torch sees no CUDA device{hidden}: {text.split('. ')[0].strip()}"


@lru_cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of one device, (9, 0) for sm_90."""
    return torch.cuda.get_device_capability(index)


def architecture(index: int) -> str:
    """`sm_90` and the like."""
    return "sm_{}{}".format(*capability(index))


def too_old(index: int | None = None) -> str | None:
    """Why a device is too old for every kernel, or None.

    Args:
        index: of the device; None asks for all visible ones, of which one must do.
    """
    asked = range(torch.cuda.device_count()) if index is None else (index,)
    if any(capability(i) >= OLDEST for i in asked):
        return None
    named = ", ".join(
        f"cuda:{i} ({torch.cuda.get_device_name(i)}) is {architecture(i)}" for i in asked
    )
    return (
        f"{named}; kernels need sm_{OLDEST[0]}{OLDEST[1]} (Ampere) or newer: "
        'impl="reference" runs there'
    )


def not_built_for(architectures: str, index: int | None = None) -> str | None:
    """Why none of the library's kernels loads on a device, or None.

    Args:
        architectures: what the library was compiled for, such as "80,90a,90+PTX".
        index: as for `too_old`.
    """
    asked = range(torch.cuda.device_count()) if index is None else (index,)
    if any(covers(architectures, capability(i)) for i in asked):
        return None
    named = ", ".join(f"cuda:{i} is {architecture(i)}" for i in asked)
    major, minor = capability(asked[0])
    return (
        f"the library was built for {architectures}, {named}: build it with "
        f"MEDCL_CUDA_ARCHS={major}{minor}"
    )


def covers(architectures: str, device: tuple[int, int]) -> bool:
    """Whether code for one of these architectures runs on a device of this capability.

    Machine code runs on its own major version from its minor version on ("a": on exactly one chip,
    "f": on its family), PTX on everything newer.
    """
    for name in architectures.split(","):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name)
        if not found:
            continue
        built = int(found[1]), int(found[2])
        if found[3] == "a":
            fits = device == built
        elif found[4]:
            fits = device >= built
        else:
            fits = device[0] == built[0] and device[1] >= built[1]
        if fits:
            return True
    return False
