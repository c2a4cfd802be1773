"""Every workflow we ship, as a file and before a running ComfyUI. Nothing is sampled here."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from comfyui_liteattention.presets import preset
from demo.comfy_server import REPOSITORY, WEIGHTS, PromptRefusedError
from demo.compare import BUDGET, PATCH, REPORT, SAMPLER
from demo.workflow import NOT_EXECUTED, find, load_workflow, to_graph
from workflows.tools import make_workflows, thumbnails
from workflows.tools.record_nodes import brief
from workflows.tools.subgraphs import unfold

DEMO = REPOSITORY / "demo" / "workflows"
#: By pack: those of the demo need its nodes and weights.
PACKS = {
    "liteattention": sorted((REPOSITORY / "workflows").glob("*.json")),
    "liteattention_demo": sorted(DEMO.glob("*.json")),
}
FILES = [path for files in PACKS.values() for path in files]
MODEL_FILES = {"unet_name", "vae_name", "ckpt_name", "image"} | {
    *(f"clip_name{which}" for which in ("", "1", "2")),
    *("text_encoder", "lora_name", "model_name"),
}
SAMPLERS = {SAMPLER, "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"}

COMPARE = "LiteAttentionCompare"
ANY, DYNAMIC = "COMFY_MATCHTYPE_V3", "COMFY_DYNAMICCOMBO_V3"
NEWER_NODES = json.loads(Path(__file__).with_name("newer_nodes.json").read_text())["nodes"]


def flat(path):
    """The workflow without subgraphs, as it is executed."""
    return unfold(load_workflow(path))


every_workflow = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def overlap(a, b, title=30):
    """Whether two nodes cover each other on the canvas; ``pos`` is below the title bar."""
    (ax, ay), (aw, ah) = a["pos"], a["size"]
    (bx, by), (bw, bh) = b["pos"], b["size"]
    beside = ax + aw <= bx or bx + bw <= ax
    return not beside and ay - title < by + bh and by - title < ay + ah


@pytest.fixture(scope="session")
def nodes_of(object_info):
    """The nodes that a workflow finds: those here, or where some are missing, those recorded in a
    newer ComfyUI (workflows/tools/record_nodes.py)."""

    def nodes(workflow):
        return object_info | NEWER_NODES if absent(workflow, object_info) else object_info

    return nodes


def absent(workflow, object_info):
    """Types of nodes that the ComfyUI here does not have."""
    return {node["type"] for node in workflow["nodes"]} - NOT_EXECUTED - set(object_info)


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
        assert into["type"] == "*" or kind in into["type"].split(",")
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
def test_slots_are_those_of_the_nodes(path, nodes_of):
    workflow = flat(path)
    for node in workflow["nodes"]:
        if node["type"] in NOT_EXECUTED:
            continue
        info = nodes_of(workflow)[node["type"]]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for entry in node["inputs"]:
            name, _, grown = entry["name"].partition(".")  # of inputs that come as one needs them
            kind = declared[name][0]
            kind = "COMBO" if isinstance(kind, list) else kind
            if not grown and kind != ANY:
                assert kind == entry["type"], (node["type"], entry["name"])
            assert entry.get("widget", {"name": entry["name"]}) == {"name": entry["name"]}
        outputs = [(o["name"], o["type"]) for o in node["outputs"]]
        theirs = list(zip(info["output_name"], info["output"], strict=True))
        if ANY in info["output"]:
            continue
        assert outputs == theirs[: len(outputs)]  # a newer ComfyUI may have added some


@every_workflow
def test_values_can_be_chosen_and_nothing_is_missing(path, nodes_of):
    """What a server checks, by the declarations: also where this ComfyUI is too old for it."""
    workflow = flat(path)
    nodes = nodes_of(workflow)
    for node in to_graph(workflow, nodes).values():
        declared = brief(nodes[node["class_type"]])["input"]
        given = {name.partition(".")[0] for name in node["inputs"]}
        assert set(declared["required"]) <= given, node
        every = declared["required"] | declared.get("optional", {})
        if any(kind == DYNAMIC for kind, _ in every.values()):
            continue  # which widgets there are depends on the choice
        for name, value in node["inputs"].items():
            kind, more = every[name.partition(".")[0]]
            options = kind if isinstance(kind, list) else more.get("options")
            if options and name not in MODEL_FILES and not isinstance(value, list):
                assert value in options, (node["class_type"], name)


def test_recorded_nodes_are_those_of_a_newer_comfyui(object_info):
    here = {kind for kind in NEWER_NODES if kind in object_info}
    if here != set(NEWER_NODES):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(set(NEWER_NODES) - here))}")
    for kind in here:
        recorded, live = NEWER_NODES[kind], json.loads(json.dumps(brief(object_info[kind])))
        for section, entries in recorded["input"].items():
            for name, (declared, _) in entries.items():
                kind_here = live["input"][section][name][0]
                assert isinstance(declared, list) or kind_here == declared, (kind, name)
        assert live["output"][: len(recorded["output"])] == recorded["output"]


@every_workflow
def test_the_server_accepts_it_but_for_missing_models(path, server, object_info):
    lacking = absent(flat(path), object_info)
    if lacking:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}: see the recorded nodes")
    graph = to_graph(flat(path), object_info)
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
def test_liteattention_is_the_last_before_each_sampler(path, nodes_of):
    workflow = flat(path)
    graph = to_graph(workflow, nodes_of(workflow))
    patches = {i for i, node in graph.items() if node["class_type"] == PATCH}
    reports = [node["inputs"] for node in graph.values() if node["class_type"] == REPORT]
    by_model = []  # (model, sampler): two passes may share a model
    for sampler in (i for i, node in graph.items() if node["class_type"] in SAMPLERS):
        inputs = graph[sampler]["inputs"]
        if "guider" in inputs:
            inputs = graph[inputs["guider"][0]]["inputs"]
        by_model.append((inputs["model"][0], sampler))
    assert patches
    assert [graph[patch]["inputs"]["preset"] for patch in patches] == ["Balanced"] * len(patches)
    if COMPARE in {node["class_type"] for node in graph.values()}:
        dense = {model for model, _ in by_model} - patches
        assert dense == {graph[patch]["inputs"]["model"][0] for patch in patches}
        by_model = [one for one in by_model if one[0] in patches]
    assert {model for model, _ in by_model} == patches
    assert sorted((r["model"][0], *r["latent"]) for r in reports) == sorted(
        (patch, sampler, 0) for patch, sampler in by_model
    )


def test_the_demo_of_thresholds_stays_on(object_info):
    graph = to_graph(load_workflow(DEMO / "liteattention_threshold.json"), object_info)
    assert graph[find(graph, "LiteAttentionThreshold")]["inputs"]["never_slower"] is False


@pytest.mark.parametrize("name", ["liteattention_demo", "liteattention_demo_ab"])
def test_the_demo_is_balanced_and_stays_on(name, object_info):
    """There is something to see on any machine, and the figures are those of the preset."""
    graph = to_graph(load_workflow(DEMO / f"{name}.json"), object_info)
    budget = find(graph, BUDGET)
    assert graph[find(graph, PATCH)]["inputs"]["control"] == [budget, 0]
    wanted = replace(preset("Balanced"), never_slower=False)
    inputs = graph[budget]["inputs"]
    assert inputs.pop("dense_layers") == ""
    assert inputs.pop("budget") and inputs["closeness"]  # which takes the place of the budget
    assert inputs.pop("qk") == wanted.mode  # the widget's older id
    assert inputs == {name: getattr(wanted, name) for name in inputs}


@every_workflow
def test_runs_can_be_compared(path):
    """The seed stays: with another one nothing can be compared."""
    for node in flat(path)["nodes"]:
        assert "randomize" not in node.get("widgets_values", [])


@pytest.mark.skipif(
    version("comfyui-workflow-templates") not in {r.made_from for r in make_workflows.RECIPES},
    reason="other templates are installed",
)
def test_they_are_what_the_script_writes(monkeypatch):
    """Nobody mended a file by hand: the next run of the script would lose that."""
    monkeypatch.setattr(make_workflows, "save", lambda name, made: written.update({name: made}))
    written = {}
    make_workflows.main()
    assert len(written) > 1
    for name, made in written.items():
        assert made == load_workflow(REPOSITORY / f"{name}.json"), name


@every_workflow
def test_it_has_a_note_and_a_thumbnail(path):
    notes = [n for n in load_workflow(path)["nodes"] if n["type"] == "MarkdownNote"]
    assert len(notes) == 1
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as thumbnail:
        assert thumbnail.size == (400, 300)


@every_workflow
def test_the_thumbnail_is_what_would_be_drawn_now(path):
    """Neither the frames nor the title have changed since."""
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        recorded = json.loads(thumbnail.info["comment"])
    note = next(n for n in load_workflow(path)["nodes"] if n["type"] == "MarkdownNote")
    assert recorded == thumbnails.record(recorded["title"])
    demo = path.parent == DEMO
    assert demo or note["widgets_values"][0].startswith(f"## {recorded['title']}")


def test_frames_in_thumbnails_are_those_of_the_demos_workflow(object_info):
    graph = to_graph(load_workflow(DEMO / "liteattention_demo.json"), object_info)
    sampler, budget = (graph[find(graph, kind)]["inputs"] for kind in (SAMPLER, BUDGET))
    run = thumbnails.recorded_run()
    assert preset(run["preset"]).closeness == budget["closeness"]
    assert {name: run[name] for name in ("steps", "seed")} == {
        name: sampler[name] for name in ("steps", "seed")
    }


def test_the_template_browser_lists_and_serves_them(server):
    listed = server.get("/workflow_templates")
    for pack, files in PACKS.items():
        assert sorted(listed[pack]) == [path.stem for path in files]
        for path in files:
            served = server.get(f"/api/workflow_templates/{pack}/{path.name}")
            assert served == load_workflow(path)


def test_what_the_pack_lists_needs_no_nodes_but_its_own_and_comfyuis():
    """After an install of the pack alone: the demo's nodes are in its folder only."""
    workflows = map(flat, PACKS["liteattention"])
    kinds = {node["type"] for workflow in workflows for node in workflow["nodes"]}
    assert not any(kind.startswith("LiteAttentionDemo") for kind in kinds)


def folded():
    """A node before and one after a subgraph of two, which hands its input to the second, too."""

    def node(number, kind, inputs=(), outputs=(), widget="width"):
        return {
            "id": number,
            "type": kind,
            "inputs": [
                {"name": name, "link": None}
                | ({"widget": {"name": name}} if name == widget else {})
                for name in inputs
            ],
            "outputs": [{"name": name} for name in outputs],
            "widgets_values": [kind],
        }

    def link(number, origin, output, target, entry):
        ends = {"origin_id": origin, "origin_slot": output}
        return ends | {"id": number, "target_id": target, "target_slot": entry}

    inside = {
        "id": "folded",
        "name": "Folded",
        "inputs": [{"name": "width"}, {"name": "model"}],
        "nodes": [
            node(1, "A", ["model", "width"], ["x"]),
            node(2, "B", ["x", "model"], ["video"]),
        ],
        "links": [
            link(1, -10, 1, 1, 0),
            link(2, 1, 0, 2, 0),
            link(3, -10, 1, 2, 1),
            link(4, 2, 0, -20, 0),
            link(5, -10, 0, 1, 1),
        ],
    }
    outer = [
        node(1, "Load", (), ["model"]),
        node(2, "folded", ["model"], ["video"]) | {"widgets_values": ["outside"]},
        node(3, "Save", ["video"]),
    ]
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "VIDEO"]]
    return {"nodes": outer, "links": links, "definitions": {"subgraphs": [inside]}}


def test_a_subgraph_is_unfolded():
    flat = unfold(folded())
    names = {node["id"]: node["type"] for node in flat["nodes"]}
    (a,) = (node for node in flat["nodes"] if node["type"] == "A")
    assert a["widgets_values"] == ["outside"]  # that is the value that counts
    assert a["promoted"] == [(0, "width", "width")]
    assert sorted(names.values()) == ["A", "B", "Load", "Save"]
    links = {(names[o], slot, names[t], entry) for _, o, slot, t, entry, _ in flat["links"]}
    assert links == {
        ("Load", 0, "A", 0),
        ("A", 0, "B", 0),
        ("Load", 0, "B", 1),
        ("B", 0, "Save", 0),
    }


def test_a_value_that_is_only_outside_of_a_subgraph_is_refused():
    workflow = folded()
    workflow["nodes"][1]["widgets_values"] = ["one", "another"]
    with pytest.raises(ValueError, match="'another' is set outside"):
        unfold(workflow)
