"""Every workflow we ship, as a file and before a running ComfyUI. Nothing is sampled here."""

import json
from importlib.metadata import version

import pytest
from PIL import Image

from demo.comfy_server import REPOSITORY, WEIGHTS, PromptRefusedError
from demo.compare import PATCH, REPORT, SAMPLER
from demo.workflow import NOT_EXECUTED, load_workflow, to_graph
from workflows.tools import make_workflows

FILES = sorted((REPOSITORY / "workflows").glob("*.json"))
MODEL_FILES = {"unet_name", "vae_name", "ckpt_name", "image"} | {
    f"clip_name{which}" for which in ("", "1", "2")
}
SAMPLERS = {SAMPLER, "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"}

COMPARE = "LiteAttentionCompare"
TEMPLATES = "0.7.25"  # the version that the workflows were made from

every_workflow = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def overlap(a, b, title=30):
    """Whether two nodes cover each other on the canvas; ``pos`` is below the title bar."""
    (ax, ay), (aw, ah) = a["pos"], a["size"]
    (bx, by), (bw, bh) = b["pos"], b["size"]
    beside = ax + aw <= bx or bx + bw <= ax
    return not beside and ay - title < by + bh and by - title < ay + ah


def refusals(server, graph):
    """What the server says against a graph: ``[(error type, input name)]``. It is not kept."""
    try:
        accepted = server.post("/prompt", {"prompt": graph, "client_id": "test"})
    except PromptRefusedError as refused:
        reply = json.loads(str(refused))
        assert reply["error"]["type"] == "prompt_outputs_failed_validation", reply
        nodes = reply["node_errors"]
    else:
        nodes = accepted["node_errors"]
        server.post("/queue", {"delete": [accepted["prompt_id"]]})
        server.post("/interrupt", {"prompt_id": accepted["prompt_id"]})
    return [
        (error["type"], error["extra_info"].get("input_name"))
        for node in nodes.values()
        for error in node["errors"]
    ]


@every_workflow
def test_links_are_consistent(path):
    workflow = load_workflow(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert workflow["last_node_id"] >= max(nodes)
    ids = [link[0] for link in workflow["links"]]
    assert len(set(ids)) == len(ids)
    assert workflow["last_link_id"] >= max(ids)
    for link, origin, slot, target, entry, kind in workflow["links"]:
        out, into = nodes[origin]["outputs"][slot], nodes[target]["inputs"][entry]
        assert link in out["links"]
        assert into["link"] == link
        assert out["type"] == kind
        assert into["type"] in (kind, "*")
    ends = [link for node in nodes.values() for o in node["outputs"] for link in o["links"]]
    ends_in = [i["link"] for n in nodes.values() for i in n["inputs"] if i["link"] is not None]
    assert sorted(ends) == sorted(ends_in) == sorted(ids)


@every_workflow
def test_nodes_do_not_cover_each_other(path):
    nodes = load_workflow(path)["nodes"]
    covered = [
        (a["type"], b["type"]) for i, a in enumerate(nodes) for b in nodes[i + 1 :] if overlap(a, b)
    ]
    assert covered == []


@every_workflow
def test_slots_are_those_of_the_nodes(path, object_info):
    for node in load_workflow(path)["nodes"]:
        if node["type"] in NOT_EXECUTED:
            continue
        info = object_info[node["type"]]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for entry in node["inputs"]:
            assert declared[entry["name"]][0] == entry["type"], (node["type"], entry["name"])
        outputs = [(o["name"], o["type"]) for o in node["outputs"]]
        theirs = list(zip(info["output_name"], info["output"], strict=True))
        assert outputs == theirs[: len(outputs)]  # a newer ComfyUI may have added some


@every_workflow
def test_the_server_accepts_it_but_for_missing_models(path, server, object_info):
    graph = to_graph(load_workflow(path), object_info)
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 1
    wrong = refusals(server, graph)
    if any(node["inputs"].get("unet_name") == WEIGHTS for node in graph.values()):
        assert wrong == []
    else:
        assert {kind for kind, _ in wrong} <= {"value_not_in_list", "custom_validation_failed"}
        assert {name for _, name in wrong} <= MODEL_FILES


@every_workflow
def test_liteattention_is_the_last_before_each_sampler(path, object_info):
    graph = to_graph(load_workflow(path), object_info)
    patches = {i for i, node in graph.items() if node["class_type"] == PATCH}
    reports = [node["inputs"] for node in graph.values() if node["class_type"] == REPORT]
    by_model = {}
    for sampler in (i for i, node in graph.items() if node["class_type"] in SAMPLERS):
        inputs = graph[sampler]["inputs"]
        if "guider" in inputs:
            inputs = graph[inputs["guider"][0]]["inputs"]
        by_model[inputs["model"][0]] = sampler
    assert patches
    assert [graph[patch]["inputs"]["preset"] for patch in patches] == ["Balanced"] * len(patches)
    if COMPARE in {node["class_type"] for node in graph.values()}:
        dense = set(by_model) - patches
        assert dense == {graph[patch]["inputs"]["model"][0] for patch in patches}
        del by_model[dense.pop()]
    assert set(by_model) == patches
    assert {r["model"][0]: r["latent"] for r in reports} == {
        patch: [sampler, 0] for patch, sampler in by_model.items()
    }


@every_workflow
def test_runs_can_be_compared(path):
    """The seed stays: with another one nothing can be compared."""
    for node in load_workflow(path)["nodes"]:
        assert "randomize" not in node.get("widgets_values", [])


@pytest.mark.skipif(
    version("comfyui-workflow-templates") != TEMPLATES, reason="other templates are installed"
)
def test_they_are_what_the_script_writes(monkeypatch):
    """Nobody mended a file by hand: the next run of the script would lose that."""
    monkeypatch.setattr(make_workflows, "save", lambda name, made: written.update({name: made}))
    written = {}
    make_workflows.main()
    for name, made in written.items():
        assert made == load_workflow(REPOSITORY / "workflows" / f"{name}.json"), name


@every_workflow
def test_it_has_a_note_and_a_thumbnail(path):
    notes = [n for n in load_workflow(path)["nodes"] if n["type"] == "MarkdownNote"]
    assert len(notes) == 1
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as thumbnail:
        assert thumbnail.size == (400, 300)


def test_the_template_browser_lists_and_serves_them(server):
    listed = server.get("/workflow_templates")["liteattention"]
    assert sorted(listed) == [path.stem for path in FILES]
    for path in FILES:
        served = server.get(f"/api/workflow_templates/liteattention/{path.name}")
        assert served == load_workflow(path)
