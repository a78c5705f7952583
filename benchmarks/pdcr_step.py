"""Time and memory of whole training steps of PDCR and UAFS: fused kernels, plain torch, and the way
of the published code (peers/patches.py), on the same network, batches and settings.

    python -m benchmarks.pdcr_step --config python/configs/pdcr_isic.yaml --data-root ISIC

Other options are those of python/train_pdcr.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import medcl_kernels as mk

from .peers import patches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))


class ReleasedLoss(mk.PatchDragsawLoss):
    """The loss of the settings by the published algorithm: (B, C, N, N) products once per patch
    size, a Python loop over patches with `torch.unique` for the class shares."""

    def _contrast(
        self,
        rows: Tensor,
        ratios: Tensor,
        key: Tensor | None = None,
        key_ratios: Tensor | None = None,
    ) -> Tensor:
        assert (self.shift, self.reduction, self.divergence) == ("constant", "mean", "sum")
        return patches.broadcast(
            rows,
            ratios,
            key=key,
            key_ratios=key_ratios,
            temperature=self.temperature,
            form=self.form,
        )

    def _ratios(self, labels: Tensor, centers: Tensor, windows: Any, dtype: torch.dtype) -> Tensor:
        return patches.unique(
            labels, centers, windows, num_classes=self.num_classes, dtype=dtype
        ).to(labels.device)


class ReleasedBlock(mk.UncertaintyFeatureSelection):
    """The block with the entropy as the published code writes it."""

    def forward(self, features: Tensor) -> Tensor:
        return patches.gate(features, self.logits(features))


def released(stage: Any) -> Any:
    """A built training stage that computes loss and blocks the published way. Both classes have the
    state of the ones they replace."""
    if stage.contrast is not None:
        stage.contrast.loss.__class__ = ReleasedLoss
    for module in stage.net.modules():
        if isinstance(module, mk.UncertaintyFeatureSelection):
            module.__class__ = ReleasedBlock
    return stage


def measure(config: Any, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """(milliseconds, MiB) of a step by name, and of the backbone alone."""
    from train_pdcr import Training

    from medcl_train import pdcr
    from medcl_train.engine.environment import choose_device
    from medcl_train.engine.profiling import peak_memory, profile_stages

    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = pdcr.load_data(config)

    def build(**changes: Any) -> Any:
        return Training(dataclasses.replace(config, **changes), data, device)

    stages = {
        f"{config.method}, fused": build(),
        f"{config.method}, plain torch": build(impl="reference"),
        f"{config.method}, released": released(build()),
        "backbone alone": build(method="backbone"),
    }
    times = profile_stages(stages, steps, device)
    return times, {name: peak_memory(stage, device) for name, stage in stages.items()}


def main() -> None:
    from medcl_train.engine.config import parse_config
    from medcl_train.engine.profiling import profile_lines
    from medcl_train.pdcr import PdcrConfig

    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--steps", type=int, default=20)
    own, rest = parser.parse_known_args()
    times, memory = measure(parse_config(PdcrConfig, rest), own.steps)
    print("\n".join(profile_lines(times, memory)))


if __name__ == "__main__":
    main()
