"""The interpreter is asked for in ``tests/conftest.py``; here it is switched on for each test."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # the helpers beside the tests


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
