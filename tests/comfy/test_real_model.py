"""The benchmark for real weights in a real ComfyUI, with the demo's workflow."""

import json

from benchmarks.real_model import __main__ as real_model
from comfyui_liteattention.presets import PRESETS
from demo.compare import WORKFLOW


def test_a_workflow(server, tmp_path, capsys):
    workflow = json.loads(WORKFLOW.read_text())
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 2  # steps
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    where = ["--comfyui", server.address, "--workflow", str(tmp_path / "workflow.json")]
    real_model.main([*where, "--variants", "dense", "Fast", "--out", str(tmp_path / "out")])
    assert "| Fast | 1 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "real_model.json").read_text())
    dense, fast = found["runs"]
    assert (dense["variant"], fast["variant"]) == ("dense", "Fast") and "Fast" in PRESETS
    assert dense["prompt"] == fast["prompt"] and fast["psnr_db"] > 20 and fast["seconds"] > 0
