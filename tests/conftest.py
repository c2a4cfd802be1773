"""Triton decides once, when it is first imported, whether this process interprets its kernels.

Without a GPU it should, so our kernels are imported here, before anything else imports triton.
"""

import importlib.util
import os

import pytest
import torch

SWITCH = "TRITON_INTERPRET"

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ[SWITCH] = "1"
    from comfyui_liteattention.backends.gpu.kernels import attend, quantise, tile_map  # noqa: F401

    del os.environ[SWITCH]  # the rest of the suite, and processes that it starts, don't want it


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
