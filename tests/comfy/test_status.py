"""What the nodes say, and of which run."""

import copy
import json

import pytest
import torch
import websocket

from comfyui_liteattention.integrations.comfy.families import Form
from comfyui_liteattention.integrations.comfy.first_words import before_a_step
from comfyui_liteattention.integrations.comfy.sampler_nodes import nearest
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.token_order import VideoTokens
from demo.compare import BUDGET, PATCH, REPORT, SAMPLER
from demo.workflow import find


@pytest.fixture
def small(workflow):
    """1,024 tokens, 3 steps; the sizes of the second latent tell the runs apart."""
    graph = copy.deepcopy(workflow)
    graph[find(graph, SAMPLER)]["inputs"].update(seed=1, steps=3)
    graph[find(graph, "LiteAttentionDemoLatent")]["inputs"].update(width=32, height=32)
    graph[find(graph, BUDGET)]["inputs"].update(min_tokens=0)
    return graph


@pytest.fixture
def twice(small):
    """A second sampler of 4 steps behind the same LiteAttention, with a report of its own."""
    sampler, report = find(small, SAMPLER), find(small, REPORT)
    second = copy.deepcopy(small[sampler])
    second["inputs"]["steps"] = 4
    small["200"] = second
    small["201"] = copy.deepcopy(small[report])
    small["201"]["inputs"]["latent"] = ["200", 0]
    return small, report


def steps_of(finished, node):
    return finished.outputs[node]["report"][0]["steps"]


def test_each_report_tells_of_the_run_that_made_its_latent(server, twice):
    graph, first = twice
    finished = server.run(graph)
    assert finished.error is None
    assert (steps_of(finished, first), steps_of(finished, "201")) == (3, 4)
    # Drawn again, in another theme, nothing samples: it is still the report of its own latent.
    for node, steps in ((first, 3), ("201", 4)):
        graph[node]["inputs"]["theme"] = "light"
        again = server.run(graph)
        assert again.error is None
        assert steps_of(again, node) == steps


def test_the_report_behind_a_loop_tells_of_its_last_turn(server, small):
    """ComfyUI puts other nodes in a loop's place, which are nowhere in the graph."""
    sampler, report = find(small, SAMPLER), find(small, REPORT)
    given = small[sampler]["inputs"]
    loop = {name: given[name] for name in ("model", "positive", "negative")}
    loop |= {"latent": given["latent_image"], "turns": 3}
    small[sampler] = {"class_type": "TinyLoop", "inputs": loop}
    finished = server.run(small)
    assert finished.error is None
    assert steps_of(finished, report) == 5


def test_a_report_behind_a_bypassed_node_shows_nothing_of_the_run_before(server, small):
    report = find(small, REPORT)
    assert server.run(small).outputs[report]["images"]
    patch = find(small, PATCH)
    small[report]["inputs"]["model"] = small[patch]["inputs"]["model"]
    small[find(small, SAMPLER)]["inputs"]["model"] = small[patch]["inputs"]["model"]
    shown = server.run(small).outputs[report]
    assert "images" not in shown
    assert "has not been through a LiteAttention node" in shown["text"][0]


def test_the_node_speaks_before_the_first_step_has_ended(server, small):
    patch = find(small, PATCH)
    small[find(small, SAMPLER)]["inputs"]["seed"] = 77
    said = []
    channel = websocket.create_connection(f"ws://{server.address}/ws?clientId=listener", timeout=60)
    reply = server.post("/prompt", {"prompt": small, "client_id": "listener"})
    while True:
        message = channel.recv()
        if isinstance(message, bytes):
            continue
        event = json.loads(message)
        if event["type"] == "liteattention.status":
            assert event["data"]["node"] == patch
            said.append(event["data"]["text"])
        ended = event["type"] == "executing" and event["data"]["node"] is None
        if ended and event["data"]["prompt_id"] == reply["prompt_id"]:
            break
    channel.close()
    assert said[0] == "waiting for the model; then step 1/3 computes everything"
    assert said[1].startswith("step 1/3 computes everything (4 layers, 1,024 tokens); skipping")
    assert "% skipped, lost" in said[-1]


def blocks(count):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(count))
    return model


def test_first_words():
    form = Form(frozenset({4000}), VideoTokens((10, 20, 15)))
    settings = Settings(budget=0.03)
    text = before_a_step(form, blocks(40), 0, 20, settings)
    assert text.startswith("step 1/20 computes everything (40 layers, 3,000 tokens); skipping")
    assert "layers" not in before_a_step(form, torch.nn.Module(), 0, 20, settings)
    assert before_a_step(form, blocks(40), 1, 20, settings) is None
    assert before_a_step("why not", blocks(40), 0, 20, settings) == "inactive: why not"
    short = Form(frozenset({100}), None)
    assert before_a_step(short, blocks(1), 0, 20, settings).startswith("inactive: short sequence")


class Graph(dict):
    """As much of ComfyUI's ``DynamicPrompt`` as is asked for."""

    has_node = dict.__contains__

    def get_node(self, node):
        return {"inputs": self[node]}


def test_the_nearest_sampler_above_a_latent():
    graph = Graph(
        {
            "report": {"latent": ["cut", 0], "model": ["patch", 0]},
            "cut": {"av": ["second", 0], "size": 3},
            "second": {"latent": ["grow", 0], "pair": [1, 2, 3]},
            "grow": {"latent": ["first", 0]},
            "first": {"latent": ["first", 0]},
        }
    )
    assert nearest(graph, "report", "latent", ["first", "second"]) == "second"
    assert nearest(graph, "report", "latent", ["first"]) == "first"
    assert nearest(graph, "report", "latent", ["patch"]) is None
    assert nearest(graph, "elsewhere", "latent", ["first"]) is None
