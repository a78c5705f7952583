"""Speed and memory of medcl_kernels beside its peers: `python -m benchmarks.run`.

Importing this package loads no torch, but fixes how torch's threads wait: an idle OpenMP thread
that spins makes a step of everybody else on the machine up to 20 times longer, and OpenMP reads the
variable when torch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The compiler workers of torch.compile would go on living beside the contenders.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
