"""Triton decides once, when it is first imported, whether this process interprets its kernels."""

import importlib.util
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # the helpers beside the tests

SWITCH = "TRITON_INTERPRET"

if "triton" not in sys.modules and importlib.util.find_spec("triton"):
    os.environ[SWITCH] = "1"
    from comfyui_liteattention.backends import triton_kernel  # noqa: F401

    del os.environ[SWITCH]  # the rest of the suite, and processes that it starts, don't want it


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
