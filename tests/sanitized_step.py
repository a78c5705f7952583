"""One forward and backward of every operation on small ragged inputs, for a memory checker:
`python sanitized_step.py IMPL DEVICE several|few`. Prints a line per operation that ran.
"""

from __future__ import annotations

import sys

import torch

from medcl_kernels import dispatch
from medcl_kernels.registry import SPECS

# Names of cases. "few": one or two of each operation, for a checker that is slow.
FEW = ("ragged", "key_ragged", "three", "one_vector")
CASES = {
    "few": FEW,
    "several": (*FEW, "one_row", "key_several", "several", "ragged_listed", "global", "two_flat"),
}


def main(impl: str, device: str, which: str) -> int:
    """0, or 3 where nothing ran."""
    steps = 0
    for one in SPECS:
        if one.kind != "op":
            continue
        before = steps
        for case in one.cases:
            if case.name not in CASES[which]:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    dispatch.select(one.name, impl, device, dtype)
                except dispatch.BackendUnavailable as reason:
                    print(f"{one.name}: {reason}")
                    continue
                sample = one.sample(case, dtype, device)
                outputs = one.resolve()(*sample.args, **sample.kwargs, impl=impl)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                smooth = [value for value in outputs if value.requires_grad]
                if smooth:
                    ones = [torch.ones_like(value) for value in smooth]
                    leaves = list(sample.differentiable.values())
                    torch.autograd.grad(smooth, leaves, ones, allow_unused=True)
                steps += 1
        if steps > before:
            print(f"{one.name}: done")
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{steps} steps")
    return 0 if steps else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
