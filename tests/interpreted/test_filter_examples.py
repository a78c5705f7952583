"""The worked example of the GCL specification through Triton's interpreter."""

from __future__ import annotations

import pytest
import test_gradient_filter_examples as examples
from test_gradient_filter_examples import *  # noqa: F403  its tests, with the fixture below


@pytest.fixture
def impl(monkeypatch):
    """The Triton kernels."""
    examples.in_float32(monkeypatch)
    return "triton"
