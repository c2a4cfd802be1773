"""Every workflow we ship, as a file and before a running ComfyUI. Nothing is sampled here."""

import json

import pytest
from PIL import Image

from demo.comfy_server import REPOSITORY, WEIGHTS, PromptRefusedError
from demo.compare import PATCH, REPORT, SAMPLER
from demo.workflow import NOT_EXECUTED, find, load_workflow, to_graph

FILES = sorted((REPOSITORY / "workflows").glob("*.json"))
MODEL_FILES = {"unet_name", "clip_name", "vae_name"}

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
    graph[find(graph, SAMPLER)]["inputs"]["steps"] = 1
    wrong = refusals(server, graph)
    loader = graph[find(graph, "UNETLoader")]["inputs"]
    if loader["unet_name"] == WEIGHTS:
        assert wrong == []
    else:
        assert {kind for kind, _ in wrong} <= {"value_not_in_list"}
        assert {name for _, name in wrong} <= MODEL_FILES


@every_workflow
def test_liteattention_is_the_last_before_the_sampler(path, object_info):
    graph = to_graph(load_workflow(path), object_info)
    patch = find(graph, PATCH)
    assert graph[find(graph, SAMPLER)]["inputs"]["model"] == [patch, 0]
    assert graph[find(graph, REPORT)]["inputs"]["model"] == [patch, 0]


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
