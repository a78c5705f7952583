"""Every refusal: the right type, before any kernel runs, with what was expected, what arrived and
the way out in the message."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch

import medcl_kernels as medcl
from medcl_kernels import checks, dispatch
from medcl_kernels.ops import registration

Q = torch.randn(2, 6, 3, 4)
K = torch.randn(2, 6, 3, 4)
Y = torch.zeros(2, 3, 4, dtype=torch.int64)


def nce(query=Q, key=K, positives=None, **options):
    return medcl.info_nce(query, key, positives, **options)


def sup(features=Q, labels=Y, **options):
    return medcl.supervised_contrastive(features, labels, **options)


def hinge(query=Q, key=K, positives=None, **options):
    return medcl.dense_hinge(query, key, positives, **options)


def match(query=Q, key=K, **options):
    return medcl.dense_correspondence(query, key, **options)


def filtered(query=Q, labels=Y, **options):
    return medcl.filtered_contrastive(query, labels=labels, **options)


def mitigate(gradients=None, **options):
    return medcl.mitigate_gradients(
        torch.randn(3, 5, 4) if gradients is None else gradients, **options
    )


W = torch.nn.Parameter(torch.ones(3))
# what is wrong, the call, the error, words that the message must hold
REFUSED = [
    # features
    ("not a tensor", lambda: nce([[1.0]]), TypeError, ["query", "torch.Tensor", "list"]),
    ("integers", lambda: nce(Q.int(), K), TypeError, ["query", "int32", "query.float()"]),
    ("complex", lambda: sup(Q.cfloat()), TypeError, ["features", "complex64", "float32"]),
    ("one axis", lambda: sup(torch.randn(5)), ValueError, ["(B, C, *spatial)", "(5,)"]),
    ("empty batch", lambda: nce(Q[:0], K[:0]), ValueError, ["query", "empty", "(0, 6, 3, 4)"]),
    ("no pixels", lambda: sup(Q[..., :0]), ValueError, ["features", "empty"]),
    ("no channels", lambda: match(Q[:, :0], K[:, :0]), ValueError, ["query", "empty"]),
    # query and key
    ("channels", lambda: nce(key=K[:, :5]), ValueError, ["key", "6 channels", "(2, 5, 3, 4)"]),
    ("batch", lambda: nce(key=K[:1]), ValueError, ["key", "as many images", "got 1"]),
    ("flat and dense", lambda: match(key=torch.randn(4, 6)), ValueError, ["key", "(4, 6)"]),
    ("dtypes", lambda: nce(key=K.double()), TypeError, ["float64", "float32", "key.to("]),
    ("devices", lambda: nce(key=K.to("meta")), ValueError, ["meta", "cpu", "key.to("]),
    ("identity", lambda: nce(key=K[..., :2]), ValueError, ["positives=None", "(2, 6, 3, 2)"]),
    # positives
    ("wrong grid", lambda: nce(positives=Y[:, :2]), ValueError, ["positives", "(2, 2, 4)"]),
    ("float index", lambda: nce(positives=Y.float()), TypeError, ["positives.long()"]),
    ("mask", lambda: nce(positives=Y.bool()), TypeError, ["positives", "mask"]),
    ("no positive", lambda: nce(positives=Y[..., None][..., :0]), ValueError, ["'R'"]),
    ("too large", lambda: nce(positives=Y + 12), ValueError, ["[0, 12)", "got 12", "own image"]),
    ("negative", lambda: nce(positives=Y - 2), ValueError, ["got -2", "ignore_index (-1)"]),
    (
        "another ignore_index",
        lambda: nce(positives=Y - 1, ignore_index=255),
        ValueError,
        ["got -1", "ignore_index (255)"],
    ),
    ("device of it", lambda: nce(positives=Y.to("meta")), ValueError, ["positives", "meta"]),
    ("one for both", lambda: nce(positives=Y, symmetric=True), ValueError, ["query_to_key"]),
    ("two for one", lambda: nce(positives=(Y, Y)), TypeError, ["symmetric=False", "tuple"]),
    ("a list of lists", lambda: nce(positives=([0], Y), symmetric=True), TypeError, ["list"]),
    # queue
    ("no queue", lambda: nce(pairs="queue"), ValueError, ["queue", "MemoryQueue.negatives()"]),
    ("queue shape", lambda: nce(queue=torch.randn(5, 7)), ValueError, ["(K, 6)", "(5, 7)"]),
    ("queue dtype", lambda: nce(queue=Q[0, :, 0].t().int()), TypeError, ["queue.float()"]),
    ("queue device", lambda: nce(queue=torch.randn(5, 6, device="meta")), ValueError, ["meta"]),
    (
        "queue and intra-view",
        lambda: nce(queue=torch.randn(5, 6), pairs="queue", intra_view=True),
        ValueError,
        ["contradicts", "pairs='image'"],
    ),
    # labels
    (
        "one-hot labels",
        lambda: sup(labels=torch.zeros(2, 5, 3, 4, dtype=torch.int64)),
        ValueError,
        ["(2, 5, 3, 4)", "one-hot", "labels.argmax(1)"],
    ),
    (
        "labels of another resolution",
        lambda: sup(labels=torch.zeros(2, 6, 8, dtype=torch.int64)),
        ValueError,
        ["(2, 3, 4)", "(2, 6, 8)", "interpolate", "nearest"],
    ),
    ("labels of another batch", lambda: sup(labels=Y[:1]), ValueError, ["(2, 3, 4)", "(1, 3, 4)"]),
    ("float labels", lambda: sup(labels=Y.float()), TypeError, ["labels.long()", "float32"]),
    ("device of labels", lambda: sup(labels=Y.to("meta")), ValueError, ["labels", "meta"]),
    ("no label map", lambda: sup(labels=[]), ValueError, ["at least one"]),
    ("no labels", lambda: sup(labels=None), TypeError, ["labels", "NoneType"]),
    ("one bad map", lambda: sup(labels=[Y, Y[:, :2]]), ValueError, ["labels[1]", "(2, 2, 4)"]),
    ("key alone", lambda: sup(key=K), ValueError, ["key_labels"]),
    ("key_labels alone", lambda: sup(key_labels=Y), ValueError, ["key=", "key_labels"]),
    (
        "fewer maps for the key",
        lambda: sup(labels=[Y, Y], key=K, key_labels=[Y]),
        ValueError,
        ["(2)", "got 1"],
    ),
    (
        "another batch inside images",
        lambda: sup(key=K[:1], key_labels=Y[:1], pairs="image"),
        ValueError,
        ["as many images"],
    ),
    # options
    ("zero temperature", lambda: nce(temperature=0), ValueError, ["temperature", "positive"]),
    ("negative temperature", lambda: sup(temperature=-0.1), ValueError, ["got -0.1"]),
    ("infinite temperature", lambda: sup(temperature=math.inf), ValueError, ["finite"]),
    ("NaN temperature", lambda: nce(temperature=math.nan), ValueError, ["got nan"]),
    ("temperature as text", lambda: nce(temperature="0.1"), TypeError, ["str"]),
    ("temperature as bool", lambda: nce(temperature=True), TypeError, ["bool"]),
    (
        "negative learnable temperature",
        lambda: nce(temperature=torch.tensor(-0.1)),
        ValueError,
        ["got -0.1", "log_temperature"],
    ),
    ("two temperatures", lambda: nce(temperature=torch.ones(2)), ValueError, ["one element"]),
    ("base", lambda: sup(base_temperature=0.0), ValueError, ["base_temperature", "positive"]),
    ("pairs", lambda: nce(pairs="all"), ValueError, ["'image', 'batch', 'queue'", "'all'"]),
    ("pairs of labels", lambda: sup(pairs="queue"), ValueError, ["'batch', 'image'", "'queue'"]),
    ("form", lambda: sup(form="sum"), ValueError, ["'out', 'in', 'pixel'", "'sum'"]),
    ("reduction", lambda: sup(reduction="avg"), ValueError, ["'none', 'mean', 'sum'", "'avg'"]),
    ("multi_positive", lambda: nce(multi_positive="x"), ValueError, ["'out', 'in'", "'x'"]),
    ("impl", lambda: match(impl="gpu"), ValueError, ["'auto', 'reference', 'cpu'", "'gpu'"]),
    ("impl of a loss", lambda: nce(impl="gpu"), ValueError, ["'triton', 'cuda'", "'gpu'"]),
    # the hinge
    ("margin", lambda: hinge(margin=-0.1), ValueError, ["margin", "got -0.1", "0.5"]),
    ("infinite margin", lambda: hinge(margin=math.inf), ValueError, ["finite"]),
    ("margin as text", lambda: hinge(margin="0.5"), TypeError, ["margin", "str"]),
    ("pairs of the hinge", lambda: hinge(pairs="all"), ValueError, ["'queue'", "'all'"]),
    ("queue of the hinge", lambda: hinge(pairs="queue"), ValueError, ["MemoryQueue.negatives()"]),
    ("index of the hinge", lambda: hinge(positives=Y + 12), ValueError, ["[0, 12)", "got 12"]),
    ("module margin", lambda: medcl.DenseHingeLoss(margin=-1), ValueError, ["margin", "got -1"]),
    ("module pairs", lambda: medcl.DenseHingeLoss(pairs="x"), ValueError, ["'queue'", "'x'"]),
    # Gradient Filter
    ("keep nothing", lambda: filtered(keep=0), ValueError, ["keep=0", "at least 1"]),
    ("keep no fraction", lambda: filtered(keep=0.0), ValueError, ["keep=0.0", "0.1"]),
    ("two empty quotas", lambda: filtered(keep=(0, 0)), ValueError, ["(0, 0)"]),
    ("keep too much", lambda: filtered(keep=1.5), ValueError, ["(0, 1]", "1.5", "count"]),
    ("negative keep", lambda: filtered(keep=-3), ValueError, ["negative", "-3"]),
    ("three quotas", lambda: filtered(keep=(1, 2, 3)), ValueError, ["(positives, negatives)"]),
    ("keep as text", lambda: filtered(keep="0.1"), TypeError, ["fraction", "str"]),
    ("scope", lambda: filtered(scope="pair"), ValueError, ["'image', 'global', 'anchor'"]),
    ("score", lambda: filtered(score="cam"), ValueError, ["'representation'", "'cam'"]),
    ("use", lambda: filtered(use="drop"), ValueError, ["'mask_grad', 'renorm'", "'drop'"]),
    (
        "pixel without a denominator",
        lambda: filtered(use="pos_full_den", form="pixel"),
        ValueError,
        ["form='out' or 'in'"],
    ),
    (
        "angles of raw rows",
        lambda: filtered(score="representation", normalize=False),
        ValueError,
        ["normalize=True", "score='pair'"],
    ),
    ("no positives at all", lambda: filtered(labels=None), ValueError, ["labels=", "positives="]),
    (
        "positives twice",
        lambda: filtered(key=K, positives=Y, key_labels=Y),
        ValueError,
        ["give one of them"],
    ),
    (
        "filter with labels of another resolution",
        lambda: filtered(labels=torch.zeros(2, 6, 8, dtype=torch.int64)),
        ValueError,
        ["interpolate"],
    ),
    (
        "positive out of range",
        lambda: filtered(labels=None, key=K, positives=Y + 99),
        ValueError,
        ["99"],
    ),
    ("selection of none", lambda: medcl.select_pairs(Q, labels=Y, keep=0), ValueError, ["keep=0"]),
    (
        "selection per anchor value",
        lambda: medcl.select_pairs(Q, labels=Y, reduction="none"),
        ValueError,
        ["'mean', 'sum'"],
    ),
    # Gradient Mitigator
    ("a list of gradients", lambda: mitigate([Q]), TypeError, ["torch.stack", "list"]),
    ("flat gradients", lambda: mitigate(torch.randn(3, 5)), ValueError, ["(M, N, D)", "(3, 5)"]),
    ("nine perspectives", lambda: mitigate(torch.randn(9, 5, 4)), ValueError, ["1 to 8", "got 9"]),
    ("integer gradients", lambda: mitigate(torch.ones(2, 3, 4).int()), TypeError, ["int32"]),
    ("method", lambda: mitigate(method="mgda"), ValueError, ["'pcgrad', 'consensus'", "'mgda'"]),
    ("unit", lambda: mitigate(unit="pixel"), ValueError, ["'row', 'flat'"]),
    ("order", lambda: mitigate(order="best"), ValueError, ["'random', 'fixed'"]),
    ("strength", lambda: mitigate(strength=-1.0), ValueError, ["strength", "-1.0"]),
    ("one map as perspectives", lambda: medcl.mitigated_contrastive(Q, Y), TypeError, ["sequence"]),
    (
        "learnable temperature of perspectives",
        lambda: medcl.mitigated_contrastive(Q, [Y], temperature=torch.tensor(0.1)),
        TypeError,
        ["number"],
    ),
    (
        "a loss per pixel",
        lambda: medcl.mitigate_parameters([W * 2], [W]),
        ValueError,
        ["losses[0]"],
    ),
    ("nothing shared", lambda: medcl.mitigate_parameters([W.sum()], []), ValueError, ["shared"]),
    ("no loss", lambda: medcl.mitigate_parameters([], [W]), ValueError, ["got 0"]),
    # modules
    ("module keep", lambda: medcl.FilteredContrastiveLoss(keep=0), ValueError, ["keep=0"]),
    ("module use", lambda: medcl.FilteredContrastiveLoss(use="x"), ValueError, ["'renorm'"]),
    ("module method", lambda: medcl.GradientMitigator(method="x"), ValueError, ["'cagrad'"]),
    ("module form", lambda: medcl.SupervisedContrastiveLoss(form="x"), ValueError, ["'pixel'"]),
    ("module pairs", lambda: medcl.InfoNCELoss(pairs="x"), ValueError, ["'queue'"]),
    ("module temperature", lambda: medcl.InfoNCELoss(temperature=0), ValueError, ["positive"]),
    ("head dims", lambda: medcl.DenseProjectionHead(3, spatial_dims=1), ValueError, ["2 or 3"]),
    ("head size", lambda: medcl.DenseProjectionHead(0), ValueError, ["in_channels", "got 0"]),
    (
        "norm without hidden layer",
        lambda: medcl.DenseProjectionHead(3, batch_norm=True),
        ValueError,
        ["hidden_channels"],
    ),
    ("queue size", lambda: medcl.MemoryQueue(0, 3), ValueError, ["size", "got 0"]),
    (
        "rows for another queue",
        lambda: medcl.MemoryQueue(4, 3).enqueue(torch.randn(2, 5)),
        ValueError,
        ["3 channels", "(2, 5)"],
    ),
    ("index to a queue", lambda: medcl.MemoryQueue(4, 3).enqueue(Y), TypeError, ["int64"]),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [pytest.param(*rest, id=name) for name, *rest in REFUSED]
)
def test_refused_with_what_arrived_and_the_way_out(call, error, words, monkeypatch):
    def too_late(*args):
        raise AssertionError("a kernel was chosen before the arguments were checked")

    for name in dispatch.OPERATIONS:
        module = importlib.import_module(f"medcl_kernels.ops.{name}")
        monkeypatch.setattr(module, "choose", too_late)
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_backend_that_cannot_run_here_raises_with_the_reason(impl):
    with pytest.raises(RuntimeError) as caught:
        nce(impl=impl)
    message = str(caught.value)
    assert f'impl="{impl}"' in message and 'impl="auto"' in message


POISONED = Q.clone()
POISONED[1, 2, 0, 3] = math.nan
CHECKED = [
    ("query", lambda: nce(POISONED)),
    ("key", lambda: nce(Q, POISONED)),
    ("queue", lambda: nce(queue=POISONED[1, :, 0].t())),
    ("features", lambda: sup(POISONED)),
    ("key", lambda: sup(key=POISONED, key_labels=Y)),
    ("query", lambda: match(POISONED)),
    ("query", lambda: nce(POISONED / 0)),
]


@pytest.mark.parametrize(("name", "call"), CHECKED)
def test_nan_and_inf_are_refused_when_asked_for(name, call, monkeypatch):
    call()  # off by default: the NaN goes through
    monkeypatch.setenv("MEDCL_CHECK_FINITE", "1")
    with pytest.raises(ValueError, match="finite") as caught:
        call()
    message = str(caught.value)
    assert message.startswith(name) and "MEDCL_CHECK_FINITE" in message
    assert "ignore_index" in message


def test_nan_in_ignored_pixels_is_no_error(monkeypatch):
    monkeypatch.setenv("MEDCL_CHECK_FINITE", "1")
    labels = Y.clone()
    labels[1, 0, 3] = -100
    assert sup(POISONED, labels).isfinite()
    positives = Y.clone()
    positives[1, 0, 3] = -1
    assert nce(POISONED, K, positives).isfinite()


def test_integer_and_bool_labels_of_any_width_are_taken():
    expected = sup(labels=(Y + torch.arange(4)) % 2)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(sup(labels=((Y + torch.arange(4)) % 2).to(dtype)), expected)
    with_channel = ((Y + torch.arange(4)) % 2).unsqueeze(1)
    assert torch.equal(sup(labels=with_channel), expected)


@pytest.mark.parametrize(
    ("impl", "words"),
    [
        ("reference", ["N x N matrices (up to 5.36e-07 GB each)", "impl='auto'"]),
        ("auto", ["Smaller batches or crops", "bfloat16"]),
    ],
)
def test_running_out_of_memory_says_how_large_it_was_and_what_helps(impl, words, monkeypatch):
    def too_much(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr("medcl_kernels.losses.supervised_contrastive.supervised_sum", too_much)
    for call in (lambda: sup(Q[:1], Y[:1], impl=impl), lambda: named(impl)):
        with pytest.raises(RuntimeError, match="you tried 9 bytes") as caught:
            call()
        for word in ["12 rows x 6 channels on cpu", *words]:
            assert word in str(caught.value)


def named(impl):
    return medcl.supervised_contrastive(features=Q[:1], labels=Y[:1], impl=impl)


# the C++ library's words, through torch's stable interface: no number, no "memory"
DISPATCHED = '"{}", stack.data(), ( ((0ULL + 2) << 56) | ((0ULL + 13) << 48)))'
FAILED_CALLS = [
    "aoti_torch_aten_new_empty( self.get(), size.data(), &ret0) API call failed at ops.h, line 143"
] + [
    f"torch_call_dispatcher({space}{name}, {DISPATCHED.format(overload)} API call failed at "
    "/usr/lib/torch/include/torch/csrc/stable/ops.h, line 939"
    for name, overload, space in (
        ('"aten::new_empty"', "", " "),
        ('"aten::empty_like"', "", " "),
        ('"aten::clone"', "", " "),
        ('"aten::sort"', "stable", ""),
    )
]
NO_MEMORY = [*FAILED_CALLS, "CUDA out of memory. Tried to allocate 2.00 GiB.", "std::bad_alloc"]
ON_ROWS = "medcl::pair_logsumexp on rows (1, 6, 12): "


@pytest.mark.parametrize("said", NO_MEMORY)
def test_every_way_to_say_that_memory_ran_out_is_understood(said, monkeypatch):
    def too_much(*args, **options):
        raise RuntimeError(ON_ROWS + said)

    monkeypatch.setattr("medcl_kernels.losses.supervised_contrastive.supervised_sum", too_much)
    with pytest.raises(RuntimeError) as caught:
        sup(Q[:1], Y[:1])
    assert str(caught.value).startswith(ON_ROWS + said)
    assert "12 rows x 6 channels on cpu" in str(caught.value)


@pytest.mark.parametrize("said", NO_MEMORY)
def test_an_operation_that_runs_out_of_memory_says_so_in_the_backward_too(said):
    """Operations and their gradients come by one kernel of the Autograd key."""
    name = "medcl::pair_logsumexp_backward"

    def fails(keyset, *inputs):
        raise RuntimeError(said)

    operation = SimpleNamespace(redispatch=fails, name=lambda: name)
    kernel = registration._autograd_kernel(operation, None, None)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError) as caught:
        kernel(keys, Q, None, Y, 0.1)
    assert said in str(caught.value)
    assert f"{name} on (2, 6, 3, 4), (2, 3, 4): out of memory; free" in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        '"aten::zero_", "") API call failed at ops.h, line 339',
        "too many resources requested for launch",
    ],
)
def test_an_operation_that_fails_otherwise_is_not_short_of_memory(said):
    def fails(keyset, *inputs):
        raise RuntimeError(said)

    kernel = registration._autograd_kernel(SimpleNamespace(redispatch=fails), None, None)
    with pytest.raises(RuntimeError) as caught:
        kernel(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), Q)
    assert str(caught.value) == said


def test_an_allocation_that_fails_on_a_lost_device_is_not_short_of_memory(monkeypatch):
    """It only meets the error of a kernel that ran before."""

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = SimpleNamespace(is_cuda=True, device="cuda:0")
    for said in NO_MEMORY:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        assert checks.memory_ran_out(RuntimeError(said), rows)
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        assert checks.memory_ran_out(RuntimeError(said), rows) == (said not in FAILED_CALLS)
    assert isinstance(checks.memory_error("", rows), torch.OutOfMemoryError)


def test_another_error_of_a_kernel_passes_unchanged(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("launch failed")

    monkeypatch.setattr("medcl_kernels.losses.supervised_contrastive.supervised_sum", broken)
    with pytest.raises(RuntimeError, match="^launch failed$"):
        sup()
