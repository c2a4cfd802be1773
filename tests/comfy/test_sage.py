"""SageAttention, the real one, as the user's own attention: see real_sage.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("real_sage.py")
SELF, CROSS = [192, 192], [192, 12]  # queries and keys of the tiny Wan's two kinds of attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sageattention") is None, reason="sageattention is not installed"
)


@pytest.fixture(scope="module")
def seen():
    command = [sys.executable, "-O", str(SCRIPT)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Error running sage attention" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_gets_what_is_declined(seen):
    assert seen["differs_from_exact"]  # or it wasn't SageAttention
    assert seen["all_calls"] == [SELF, CROSS] * 9
    assert seen["declined_calls"] == seen["all_calls"]
    assert seen["declined_is_equal"]


def test_it_is_timed_and_keeps_what_is_not_ours(seen):
    assert seen["waiting"] == 3
    assert seen["skipping_calls"] == [SELF, CROSS] * 3 + [CROSS] * 6
    assert seen["computed"] < 1
    assert seen["error"] < 0.2
