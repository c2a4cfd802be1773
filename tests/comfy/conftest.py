"""A real ComfyUI, as a server and in this process.

``COMFYUI_PATH`` names another tree than the one that ``dev.py`` sets up.
"""

import sys
from pathlib import Path

import pytest

from demo.comfy_server import ComfyServer, comfyui_path, make_base
from demo.compare import WORKFLOW
from demo.workflow import load_workflow, to_graph


@pytest.fixture(scope="session")
def new_base(tmp_path_factory):
    """Make a base directory with our node packs and that of the tests."""

    def make() -> Path:
        base = make_base(tmp_path_factory.mktemp("comfyui"))
        (base / "custom_nodes" / "tiny_nodes").symlink_to(Path(__file__).parent / "tiny_nodes")
        return base

    return make


@pytest.fixture(scope="session")
def start(new_base):
    """Start a server of its own: ``with start() as server``."""

    def start_one() -> ComfyServer:
        base = new_base()
        return ComfyServer(base, base / "comfyui.log")

    return start_one


@pytest.fixture(scope="session")
def server(start):
    with start() as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture
def workflow(object_info):
    """The shipped workflow as a graph, at full size."""
    return to_graph(load_workflow(WORKFLOW), object_info)


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules in this process, on the CPU."""
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    return comfy
