"""The README says what is there: its examples run, its tables agree with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import medcl_kernels
from medcl_kernels import dispatch, report
from medcl_kernels.registry import SPECS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run_and_the_swap_changes_nothing() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, scope)
    plain = scope["similarity"].argmax(dim=2).reshape(scope["positives"].shape)
    assert torch.equal(scope["positives"], plain)
    assert scope["after"].item() == pytest.approx(scope["before"].item(), rel=1e-5)
    exec(blocks[2], scope)
    assert 0 < scope["loss"].item() < 20


def cells(name: str) -> list[str]:
    """The cells of the one table row that begins with this name."""
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", README, flags=re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tables_name_every_operation_and_loss_with_its_backends(spec: Any) -> None:
    served = {backend.name for backend in dispatch.BACKENDS if report.serves(backend, spec)}
    assert set(cells(spec.name)[-1].split(", ")) == served


def test_losses_table_names_existing_modules() -> None:
    names = re.findall(r"`(\w+Loss)`|`(DenseProjectionHead)`|`(MemoryQueue)`", README)
    for name in {part for match in names for part in match if part}:
        assert isinstance(getattr(medcl_kernels, name), type)


def test_linked_files_exist() -> None:
    missing = [
        link
        for link in re.findall(r"\]\(([^)]+)\)", README)
        if not link.startswith("https://") and not (ROOT / link).exists()
    ]
    assert missing == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)) | {"demo", "test"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
