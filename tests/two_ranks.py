"""Two processes that form a gloo group on the CPU, and what test_distributed.py has them compute.

`Pair.run(function, *arguments)` calls `function(rank, *arguments)` in both and returns both
answers; functions, arguments and answers travel through pipes, tensors as NumPy arrays.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import medcl_kernels as medcl

RANKS = 2
PATIENCE = 60  # seconds after which a wait of one rank for the other counts as a hang
IGNORED = -100
Data = dict[str, Any]


class Pair:
    """Both processes, until `close`."""

    def __init__(self, meeting_point: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting_point, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(2 * PATIENCE), "a rank does not answer"
            answers.append(pipe.recv())
        for failed, answer in answers:
            assert not failed, answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, meeting_point: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PATIENCE),
    )
    while (job := pipe.recv()) is not None:
        try:
            pipe.send((False, job[0](rank, *job[1])))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


# ---- losses


@dataclass(frozen=True)
class Case:
    """A loss on `Data`; flat: rows instead of maps; by_label: pixels without a label do not count,
    whatever they hold."""

    call: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    flat: bool = False
    by_label: bool = False


def _supervised(data: Data, **options: Any) -> Tensor:
    return medcl.supervised_contrastive(data["x"], data["labels"], **options)


def _supervised_key(data: Data, **options: Any) -> Tensor:
    other = {"key": data["k"], "key_labels": data["key_labels"]}
    return medcl.supervised_contrastive(data["x"], data["labels"], **other, **options)


def _perspectives(data: Data, **options: Any) -> Tensor:
    maps = [data["labels"], data["more_labels"]]
    return medcl.supervised_contrastive(data["x"], maps, **options)


def _info_nce(data: Data, **options: Any) -> Any:
    if "positives" in options:
        options["positives"] = data[options["positives"]]
    return medcl.info_nce(data["x"], data["k"], pairs="batch", **options)


def _with_queue(data: Data, **options: Any) -> Tensor:
    return medcl.info_nce(data["x"], data["k"], pairs="batch", queue=data["queue"], **options)


def _learnt(data: Data, **options: Any) -> Tensor:
    return _supervised(data, temperature=data["temperature"], **options)


def _learnt_nt_xent(data: Data, **options: Any) -> Any:
    options |= {"temperature": data["temperature"], "symmetric": True, "intra_view": True}
    return _info_nce(data, **options)


def _filtered(data: Data, **options: Any) -> Tensor:
    other = {"labels": data["labels"], "key_labels": data["key_labels"], "pairs": "batch"}
    return medcl.filtered_contrastive(data["x"], data["k"], **other, **options)


def _filtered_index(data: Data, **options: Any) -> Tensor:
    options |= {"positives": data["index"], "pairs": "batch"}
    return medcl.filtered_contrastive(data["x"], data["k"], **options)


def _patches(data: Data, **options: Any) -> Tensor:
    return medcl.patch_affinity_contrast(data["x"], data["ratios"], **options)


def _patches_key(data: Data, **options: Any) -> Tensor:
    options |= {"key": data["k"], "key_ratios": data["key_ratios"]}
    return medcl.patch_affinity_contrast(data["x"], data["ratios"], **options)


CASES = {
    "supervised_out": Case(_supervised, by_label=True),
    "supervised_in": Case(_supervised, {"form": "in"}, by_label=True),
    "supervised_pixel": Case(_supervised, {"form": "pixel"}, by_label=True),
    "supervised_flat": Case(_supervised, {"base_temperature": 0.05}, flat=True, by_label=True),
    "supervised_key": Case(_supervised_key, by_label=True),
    "perspectives_out": Case(_perspectives),
    "perspectives_in": Case(_perspectives, {"form": "in"}),
    "supervised_learnt": Case(_learnt, by_label=True),
    "info_nce": Case(_info_nce),
    "info_nce_index": Case(_info_nce, {"positives": "index"}),
    "info_nce_flat": Case(_info_nce, {"positives": "index"}, flat=True),
    "info_nce_several": Case(_info_nce, {"positives": "several", "multi_positive": "in"}),
    "info_nce_symmetric": Case(_info_nce, {"symmetric": True, "intra_view": True}),
    "info_nce_queue": Case(_with_queue),
    "nt_xent": Case(_info_nce, {"symmetric": True, "intra_view": True}, flat=True),
    "nt_xent_learnt": Case(_learnt_nt_xent, flat=True),
    "filtered_anchor": Case(_filtered, {"scope": "anchor", "keep": 3}, by_label=True),
    "filtered_image": Case(_filtered, {"keep": 0.2, "form": "in"}, by_label=True),
    "filtered_all": Case(_filtered, {"keep": 1.0, "form": "pixel"}, by_label=True),
    "filtered_positives": Case(_filtered, {"keep": (2, 9), "use": "recompute"}, by_label=True),
    "filtered_index": Case(_filtered_index, {"keep": 0.3, "ignore_index": 3}),
    "filtered_index_flat": Case(_filtered_index, {"scope": "anchor", "keep": 4}, flat=True),
    "patches": Case(_patches, flat=True),
    "patches_key": Case(_patches_key, {"form": "release2d"}, flat=True),
}
SIZES = {"even": ((2, 2), (6, 6)), "ragged": ((1, 2), (9, 4)), "silent": ((2, 2), (6, 6))}
SHARED = ("temperature", "queue")
LEAVES = ("x", "k", "temperature")


def whole_data(name: str, layout: str, dtype: torch.dtype) -> tuple[Data, tuple[int, ...]]:
    """What both ranks hold together, and how many images or rows each has. "silent": the second
    rank has no anchor that counts."""
    case = CASES[name]
    sizes = SIZES[layout][case.flat]
    generator = torch.Generator().manual_seed(len(name))
    space = () if case.flat else (2, 3)
    total, pixels = sum(sizes), 6

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, 3, shape, generator=generator)

    def shares() -> Tensor:
        return torch.rand(2, 1, 2, total, generator=generator).to(dtype) / 2

    data = {
        "x": random(total, 5, *space),
        "k": random(total, 5, *space),
        "weight": random(total, *space).abs(),
        "labels": classes(total, *space),
        "key_labels": classes(total, *space),
        "more_labels": classes(total, *space),
        "index": torch.cat(
            [
                torch.randint(
                    -1, size if case.flat else pixels, (size, *space), generator=generator
                )
                for size in sizes
            ]
        ),
        "several": torch.randint(-1, pixels, (total, *space, 2), generator=generator),
        "queue": random(4, 5),
        "temperature": torch.tensor(0.2, dtype=dtype),
    }
    data |= {"ratios": shares(), "key_ratios": shares()} if case.flat else {}
    data["labels"].view(-1)[::7] = IGNORED
    data["more_labels"].view(-1)[1::5] = IGNORED
    if layout == "silent":
        rest = slice(sizes[0], None)
        data["index"][rest] = -1
        data["several"][rest] = -1
        for maps in ("labels", "key_labels", "more_labels"):
            data[maps][rest] = IGNORED
        if case.by_label:
            data["x"][rest] = torch.nan
            data["k"][rest] = torch.nan
    return data, sizes


def share(data: Data, sizes: tuple[int, ...], rank: int) -> Data:
    """What one rank holds."""
    first = sum(sizes[:rank])
    return {
        name: value
        if name in SHARED
        else value.narrow(3 if name.endswith("ratios") else 0, first, sizes[rank])
        for name, value in data.items()
    }


def one_process(data: Data, sizes: tuple[int, ...], flat: bool) -> Data:
    """The whole batch as one process takes it: indices into rows count from the first of all."""
    if not flat:
        return data
    place = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    offset = torch.tensor([sum(sizes[:rank]) for rank in range(len(sizes))])[place]
    return {**data, "index": torch.where(data["index"] < 0, -1, data["index"] + offset)}


def outcome(name: str, data: Data, **options: Any) -> dict[str, Any]:
    """Values per anchor, the anchors in axis 0, and the gradients of their weighted sum; with a
    reduction the value and its gradients."""
    case = CASES[name]
    leaves = {
        leaf: data[leaf].detach().clone().requires_grad_()
        for leaf in LEAVES
        if leaf in ("x", "k") or "learnt" in name
    }
    found = case.call({**data, **leaves}, **case.options, **options)
    found = torch.stack(found) if isinstance(found, tuple) else found
    weighted = found * data["weight"] if options.get("reduction") == "none" else found
    weighted.sum().backward()
    if options.get("reduction") == "none":
        found = found.movedim(found.dim() - data["weight"].dim(), 0)
    gradients = {
        f"d_{leaf}": value.grad for leaf, value in leaves.items() if value.grad is not None
    }
    return {"value": found.detach(), **gradients}


def arrays(found: dict[str, Tensor]) -> dict[str, Any]:
    """Through a pipe: NumPy has no bfloat16, and float64 holds every value exactly."""
    return {name: value.double().numpy() for name, value in found.items()}


def step(rank: int, name: str, layout: str, dtype: torch.dtype, reduction: str) -> dict[str, Any]:
    """A loss on the own share, with the candidates of both ranks; twice, for the same bits."""
    data = share(*whole_data(name, layout, dtype), rank)
    options = {"reduction": reduction, "gather_distributed": True}
    once, again = (outcome(name, data, **options) for _ in range(2))
    for part, value in once.items():
        assert torch.equal(value, again[part]) and value.dtype == again[part].dtype, part
    return arrays(once)


# ---- a model under DistributedDataParallel


class Model(torch.nn.Module):
    """A convolution and a learnt temperature; made alike in every process."""

    def __init__(self, loss: str, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.convolution = torch.nn.Conv2d(3, 5, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        kind = {"info_nce": medcl.InfoNCELoss, "supervised": medcl.SupervisedContrastiveLoss}[loss]
        self.loss = kind(temperature=temperature, pairs="batch", **options)

    def forward(self, images: Tensor, others: Tensor, labels: Tensor) -> Tensor:
        features = self.convolution(images)
        if isinstance(self.loss, medcl.InfoNCELoss):
            return self.loss(features, self.convolution(others))
        return self.loss(features, labels)


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Two views and labels of a batch of four; every class stands in both halves."""
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    return (*views, torch.arange(64).reshape(4, 4, 4) % 3)


def gradients(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    loss = model(*batch)
    loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def train_step(rank: int, loss: str) -> dict[str, Any]:
    """A step of DistributedDataParallel on the own half of the batch."""
    model = torch.nn.parallel.DistributedDataParallel(Model(loss, gather_distributed=True))
    return arrays(gradients(model, tuple(part.chunk(RANKS)[rank] for part in images())))


# ---- what else is promised


def _features(*shape: int, requires_grad: bool = False, **options: Any) -> Tensor:
    return torch.ones(shape or (4, 3), **options).requires_grad_(requires_grad)


def _call(features: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    if labels is None:
        labels = torch.zeros(features.shape[0], *features.shape[2:], dtype=torch.int64)
    return medcl.supervised_contrastive(features, labels, gather_distributed=True, **options)


# what the second rank does where the first has `_call(_features())`
FAULTS: dict[str, Callable[[], Any]] = {
    "labels": lambda: _call(_features(), torch.zeros(5, dtype=torch.int64)),
    "type": lambda: _call(_features().long()),
    "empty": lambda: _call(_features(0, 3)),
    "form": lambda: _call(_features(), form="sideways"),
    "channels": lambda: _call(_features(4, 2)),
    "maps": lambda: _call(_features(4, 3, 2)),
    "dtype": lambda: _call(_features(dtype=torch.float64)),
    "grad": lambda: _call(_features(requires_grad=True)),
    "loss": lambda: medcl.info_nce(
        _features(), _features(), pairs="batch", gather_distributed=True
    ),
    "finite": lambda: _call(_features() / 0),
}


def fault(rank: int, name: str) -> str:
    """The error of each rank, when only the second does something wrong."""
    from pytest import MonkeyPatch

    with MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_CHECK_FINITE", "1")
        try:
            FAULTS[name]() if rank else _call(_features())
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def groups(rank: int) -> dict[str, Any]:
    """Groups of one's own, and `gather` by itself."""
    alone = [dist.new_group([r]) for r in range(RANKS)]
    data = share(*whole_data("supervised_out", "ragged", torch.float64), rank)
    x, labels = data["x"], data["labels"]
    plain = medcl.supervised_contrastive(x, labels)
    own = medcl.supervised_contrastive(x, labels, gather_distributed=alone[rank])
    every = medcl.supervised_contrastive(x, labels, gather_distributed=True)
    named = medcl.supervised_contrastive(x, labels, gather_distributed=dist.group.WORLD)
    assert torch.equal(plain, own) and torch.equal(every, named) and not torch.equal(plain, every)
    assert medcl.distributed.gather(x, group=alone[rank]) is x
    return arrays({"own": x, "gathered": medcl.distributed.gather(x)})


def mixed_precision(rank: int) -> dict[str, Any]:
    """bfloat16 rows, gathered under autocast; the gradient of a row is 1 here and 0.5 there."""
    x = whole_data("supervised_flat", "even", torch.bfloat16)[0]["x"].chunk(RANKS)[rank]
    x = x.clone().requires_grad_()
    with torch.autocast("cpu"):
        everyone = medcl.distributed.gather(x)
    weight = torch.full_like(everyone, 1.0 if rank else 0.5)
    (everyone * weight).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    return arrays({"d_x": x.grad})


def twice(rank: int) -> dict[str, Any]:
    """The gradient of a penalty on the gradient."""
    data = share(*whole_data("supervised_out", "ragged", torch.float64), rank)
    return arrays(penalty(data, gather_distributed=True))


def penalty(data: Data, **options: Any) -> dict[str, Tensor]:
    x = data["x"].clone().requires_grad_()
    loss = medcl.supervised_contrastive(
        x, data["labels"], impl="reference", reduction="sum", **options
    )
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    first.square().sum().backward()
    assert x.grad is not None
    return {"d_x": x.grad}


def compiled(rank: int) -> str:
    """torch.compile leaves the loss out of its graph; asked for one graph, it says why."""
    data = share(*whole_data("supervised_out", "ragged", torch.float64), rank)

    def loss(x: Tensor) -> Tensor:
        return medcl.supervised_contrastive(x * 2, data["labels"], gather_distributed=True) + 1

    eager, x = data["x"].clone().requires_grad_(), data["x"].clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, backend="eager")(x).backward()
    assert torch.equal(eager.grad, x.grad)
    torch.compiler.reset()  # it would take the code that it has
    try:
        torch.compile(loss, backend="eager", fullgraph=True)(x)
    except Exception as error:
        return str(error)
    return "no error"
