"""What wheel_on_cuda_torch.sh asks of an installed wheel under a CUDA torch: a PASS or FAIL line
each, and exit code 1 if one failed. Needs neither a GPU nor pytest.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def imports() -> str:
    import medcl_kernels

    folder = Path(medcl_kernels.__file__).parent
    assert "site-packages" in folder.parts, f"imported from {folder}, not from the wheel"
    assert torch.version.cuda, f"torch {torch.__version__} was built without CUDA"
    return (
        f"medcl_kernels {medcl_kernels.__version__} under Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def loads() -> str:
    from medcl_kernels import env

    reason = env.load_library()
    assert reason is None, reason
    info = env.build_info()
    return (
        f"the library of torch {info['built_with_torch']} loads; kernels for {info['cuda_archs']}"
    )


def stream_is_bound() -> str:
    from medcl_kernels import env

    bound = env.build_info().get("torch_cuda_stream")
    assert bound == "yes", f"torch_cuda_stream={bound}: kernels could not follow torch's stream"
    return "the symbol of torch's current CUDA stream is bound"


def kernels_are_registered() -> str:
    from medcl_kernels import dispatch

    (cuda,) = (backend for backend in dispatch.BACKENDS if backend.name == "cuda")
    found = []
    for operation in cuda.kernels:
        __import__(f"medcl_kernels.ops.{operation}")
        for name in (operation, f"{operation}_backward"):
            if hasattr(torch.ops.medcl, name):
                has = torch._C._dispatch_has_kernel_for_dispatch_key(f"medcl::{name}", "CUDA")
                assert has, f"medcl::{name} has no kernel for CUDA"
                found.append(name)
    assert found, "the cuda backend lists no kernel"
    return f"{len(found)} CUDA kernels are registered: {', '.join(found)}"


def says_why_it_cannot_run() -> str:
    from medcl_kernels import dispatch

    reason = dispatch.available()["cuda"]
    if torch.cuda.is_available():
        assert reason is None, reason
        return "the cuda backend is available on this machine's device"
    assert reason, "the cuda backend claims to be available without a device"
    return f"without a device: {reason}"


def cpu_operations_are_right() -> str:
    from medcl_kernels import selfcheck
    from medcl_kernels.registry import SPECS

    results = [selfcheck.check_spec(spec, "cpu", "cpu") for spec in SPECS]
    failed = [f"{one.name}: {line}" for one in results for line in one.failures]
    assert not failed, "; ".join(failed)
    return f"{len(results)} operations and losses on the CPU agree with float64"


CHECKS: tuple[Callable[[], str], ...] = (
    imports,
    loads,
    stream_is_bound,
    kernels_are_registered,
    says_why_it_cannot_run,
    cpu_operations_are_right,
)


def main() -> int:
    failed = 0
    for check in CHECKS:
        try:
            print(f"PASS: {check()}", flush=True)
        except Exception as error:  # every check is tried; what broke is in its line
            failed += 1
            print(f"FAIL: {check.__name__}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
