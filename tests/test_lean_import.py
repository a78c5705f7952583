"""Importing the package costs next to nothing and needs nothing but torch; without the compiled
library everything still runs, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from medcl_kernels import dispatch


def python(code, repo, **settings):
    """Runs code in a fresh interpreter; returns its output, the standard error with it."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=repo,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_import_loads_no_library_and_neither_it_nor_a_loss_an_optional_package(repo):
    output = python(
        """
        import sys, torch, torch._dynamo  # which imports Triton where it is installed
        before = set(sys.modules)
        import medcl_kernels
        print("own", sorted(n for n in sys.modules if n.startswith("medcl_kernels")))
        maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
        print("library", "libmedcl_kernels" in maps, torch.cuda.is_initialized())
        print("names", sorted(medcl_kernels.__all__) == [n for n in dir(medcl_kernels)
                                                         if n in medcl_kernels.__all__])
        assert callable(medcl_kernels.info_nce) and medcl_kernels.InfoNCELoss
        assert medcl_kernels.functional.info_nce is medcl_kernels.info_nce
        assert medcl_kernels.nn.InfoNCELoss is medcl_kernels.InfoNCELoss
        print("version", medcl_kernels.__version__)
        try:
            medcl_kernels.infonce
        except AttributeError as error:
            print("error", error)
        x = torch.randn(6, 4, requires_grad=True)
        medcl_kernels.info_nce(x, x.flip(0)).backward()
        medcl_kernels.supervised_contrastive(x, torch.arange(6) % 2).backward()
        optional = {"triton", "monai", "nibabel", "scipy", "h5py", "matplotlib"}
        optional.add("medcl_kernels.triton")
        print("optional", sorted(optional & (set(sys.modules) - before)))
        """,
        repo,
    )
    lines = dict(line.split(" ", 1) for line in output.splitlines())
    assert lines["optional"] == "[]"
    assert lines["own"] == "['medcl_kernels']"
    assert lines["library"] == "False False"
    assert lines["names"] == "True"
    assert lines["version"][0].isdigit()
    assert "infonce" in lines["error"]


def test_import_takes_at_most_150_ms_over_torch(repo):
    """The minimum of a few fresh interpreters: the machine may be busy, the code is not slower."""
    code = """
        import time, torch
        start = time.perf_counter()
        import medcl_kernels
        print(time.perf_counter() - start)
    """
    best = min(float(python(code, repo)) for _ in range(2))
    assert best <= 0.15, f"import medcl_kernels took {best:.3f} s"


MISSING = {"MEDCL_LIBRARY": "/nowhere/libmedcl_kernels.so", "MEDCL_IMPL": ""}


def test_without_the_library_auto_runs_the_reference_and_warns_once(repo):
    output = python(
        """
        import warnings
        import torch, medcl_kernels as medcl
        x = torch.randn(6, 4, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = medcl.info_nce(x, x.flip(0))
            medcl.supervised_contrastive(x, torch.arange(6) % 2).backward()
            medcl.dense_correspondence(x, x)
        ours = [str(w.message) for w in caught if "medcl" in str(w.message)]
        print(len(ours))
        print(ours[0])
        assert torch.equal(loss, medcl.info_nce(x, x.flip(0), impl="reference"))
        """,
        repo,
        **MISSING,
    )
    count, message = output.splitlines()
    assert count == "1"
    assert "/nowhere/libmedcl_kernels.so" in message  # what is missing
    assert "make build" in message or "pip install" in message  # the way out


def test_without_the_library_an_explicit_backend_raises_with_the_build_command(repo):
    output = python(
        """
        import torch, medcl_kernels as medcl
        x, labels = torch.randn(6, 4), torch.arange(6) % 2
        calls = [
            lambda: medcl.info_nce(x, x, impl="cpu"),
            lambda: medcl.supervised_contrastive(x, labels, impl="cpu"),
            lambda: medcl.dense_correspondence(x, x, impl="cpu"),
        ]
        for call in calls:
            try:
                call()
                print("no error")
            except RuntimeError as error:
                print(error)
        """,
        repo,
        **MISSING,
    )
    messages = output.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert 'impl="cpu"' in message
        assert "make build" in message or "pip install" in message


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_environment_decides_what_auto_means(impl, monkeypatch):
    monkeypatch.setenv("MEDCL_IMPL", impl)
    assert dispatch.select("pair_logsumexp", "auto", "cpu", torch.float32) == impl
