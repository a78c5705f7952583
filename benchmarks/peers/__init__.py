"""Who the package is compared with. Every function here was written for this comparison.

A peer is a function with the arguments of one of the package's losses, so that the same sample
drives all of them. All get features as they leave a network, not normalised: scaling them to unit
length and its gradient are part of every contender's time, by the peer itself where it does so
anyway, by `F.normalize` in front of it where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

SUPCON, INFO_NCE, MATCH = "supervised_contrastive", "info_nce", "dense_correspondence"


@dataclass(frozen=True)
class Peer:
    """One contender from outside the package.

    Attributes:
        name: as it appears in tables.
        what: one line.
        functions: "module:name" by the loss that it computes.
        unavailable: why it cannot run in this process, or None.
        quadratic: it stores at least one N x N matrix.
        compiles: its first call takes long for every new shape.
        devices: device types that it runs on; empty for any.
        forward_only: it computes no gradient.
    """

    name: str
    what: str
    functions: Mapping[str, str]
    unavailable: Callable[[], str | None]
    quadratic: bool = True
    compiles: bool = False
    devices: tuple[str, ...] = ()
    forward_only: bool = False

    def cannot_run(self, device: str) -> str | None:
        """Why it cannot run on a device type, or None."""
        if self.devices and device not in self.devices:
            return f"it trains on {' or '.join(self.devices)} only"
        return self.unavailable()

    def resolve(self, loss: str) -> Callable[..., Any]:
        """The function that computes this loss.

        Raises:
            KeyError: the peer has no such loss.
        """
        if loss not in self.functions:
            raise KeyError(
                f"{self.name} does not compute {loss}: it has {', '.join(self.functions)}"
            )
        module, name = self.functions[loss].split(":")
        return getattr(import_module(module), name)


def _always() -> str | None:
    return None


def _needs(package: str, distribution: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        return None if find_spec(package) else f"{distribution} is not installed"

    return reason


def _needs_linear_cross_entropy() -> str | None:
    import torch

    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def _needs_compiler() -> str | None:
    from shutil import which

    if find_spec("triton") is not None:
        import torch

        if torch.cuda.is_available():
            return None
    if not any(which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler"
    return None


_PATCHES = "benchmarks.peers.patches"
_EAGER, _CHUNKED = "benchmarks.peers.eager", "benchmarks.peers.chunked"
_SELECTION = "benchmarks.peers.selection"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "eager",
            "plain torch as in textbooks: the N x N matrix and the mask of positives",
            {
                SUPCON: f"{_EAGER}:textbook",
                INFO_NCE: f"{_EAGER}:info_nce",
                MATCH: f"{_EAGER}:dense_correspondence",
                "pair_topk": f"{_SELECTION}:eager_topk",
                "filtered_contrastive": f"{_SELECTION}:eager_filtered",
                "mitigate_rows": f"{_SELECTION}:eager_pcgrad",
            },
            _always,
        ),
        Peer(
            "chunk-topk",
            "row blocks through torch.mm and a running torch.topk",
            {"pair_topk": f"{_SELECTION}:chunked_topk"},
            _always,
            quadratic=False,
        ),
        Peer(
            "forward",
            "this package's pair_logsumexp without its backward pass: a yardstick",
            {"pair_logsumexp": f"{_SELECTION}:forward_only"},
            _always,
            quadratic=False,
            forward_only=True,
        ),
        Peer(
            "list",
            "this package's Gradient Filter, always through a list of pairs: a yardstick",
            {"filtered_contrastive": f"{_SELECTION}:filtered_by_list"},
            _always,
            quadratic=False,
        ),
        Peer(
            "rule",
            "this package's Gradient Filter, always through a threshold: a yardstick",
            {"filtered_contrastive": f"{_SELECTION}:filtered_by_rule"},
            _always,
            quadratic=False,
        ),
        Peer(
            "class-sums",
            "plain torch, the positive term by class sums instead of a mask",
            {SUPCON: f"{_EAGER}:class_sums"},
            _always,
        ),
        Peer(
            "chunk",
            "an autograd.Function by hand: row blocks through torch.mm, recomputed in backward",
            {SUPCON: f"{_CHUNKED}:supervised_contrastive", INFO_NCE: f"{_CHUNKED}:info_nce"},
            _always,
            quadratic=False,
        ),
        Peer(
            "lce",
            "torch's F.linear_cross_entropy with default LinearCrossEntropyOptions()",
            {INFO_NCE: "benchmarks.peers.linear_cross_entropy:info_nce"},
            _needs_linear_cross_entropy,
            quadratic=False,
        ),
        Peer(
            "compile",
            "torch.compile of plain torch (class sums; cross entropy)",
            {
                SUPCON: "benchmarks.peers.compiled:supervised_contrastive",
                INFO_NCE: "benchmarks.peers.compiled:info_nce",
            },
            _needs_compiler,
            compiles=True,
        ),
        Peer(
            "flex",
            "torch's FlexAttention, compiled: its log-sum-exp, the values thrown away",
            {
                SUPCON: "benchmarks.peers.flex_attention:supervised_contrastive",
                INFO_NCE: "benchmarks.peers.flex_attention:info_nce",
            },
            _needs("triton", "triton"),
            quadratic=False,
            compiles=True,
            devices=("cuda",),
        ),
        Peer(
            "inf-cl",
            "Inf-CL's flash loss on one device (Triton, tf32)",
            {INFO_NCE: "benchmarks.peers.inf_cl_flash:info_nce"},
            _needs("inf_cl", "inf-cl"),
            quadratic=False,
            devices=("cuda",),
        ),
        Peer(
            "pml",
            "pytorch-metric-learning: SupConLoss; NTXentLoss",
            {
                SUPCON: "benchmarks.peers.metric_learning:supervised_contrastive",
                INFO_NCE: "benchmarks.peers.metric_learning:info_nce",
            },
            _needs("pytorch_metric_learning", "pytorch-metric-learning"),
        ),
        Peer(
            "monai",
            "MONAI's ContrastiveLoss (InfoNCE, symmetric, with intra-view negatives)",
            {INFO_NCE: "benchmarks.peers.monai_contrastive:info_nce"},
            _needs("monai", "monai"),
        ),
        Peer(
            "released",
            "the published PDCR code's way: (B, C, N, N) products, a loop with torch.unique",
            {
                "patch_affinity_contrast": f"{_PATCHES}:broadcast",
                "patch_class_ratio": f"{_PATCHES}:unique",
                "uncertainty_reweight": f"{_PATCHES}:gate",
            },
            _always,
        ),
        Peer(
            "gemm",
            "plain torch: one matrix product for all patch sizes, (B, N, N) matrices",
            {"patch_affinity_contrast": f"{_PATCHES}:gemm"},
            _always,
        ),
    )
}
