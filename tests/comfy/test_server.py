"""Our nodes in a running ComfyUI, over HTTP."""

import json
from argparse import Namespace

import pytest
import safetensors.torch
import torch
from PIL import Image

from comfyui_liteattention.report.animation import SIZE as ANIMATION_SIZE
from comfyui_liteattention.report.pictures import SIZE
from comfyui_liteattention.settings import SAFEST
from demo.comfy_server import PromptRefusedError
from demo.compare import BUDGET, PATCH, REPORT, SAMPLER, compare, summary
from demo.workflow import find, without

NODES = (
    "LiteAttentionPatch",
    "LiteAttentionThreshold",
    "LiteAttentionReport",
    "LiteAttentionBudget",
    "LiteAttentionCompare",
)


def small(workflow, seed=1, steps=4, prompt="red circle moving right", **control):
    """The workflow at 1024 tokens, with a threshold node, that saves its latent exactly."""
    graph = json.loads(json.dumps(workflow))
    sampler = find(graph, SAMPLER)
    graph[sampler]["inputs"].update(seed=seed, steps=steps)
    graph[find(graph, "LiteAttentionDemoLatent")]["inputs"].update(width=32, height=32)
    graph[graph[sampler]["inputs"]["positive"][0]]["inputs"]["prompt"] = prompt
    settings = {
        "threshold": -1.0,
        "criterion": "mass",
        "ramp": 1.0,
        "warmup": 0.0,
        "dense_layers": "",
        "audit": 64,
        "min_tokens": 0,
        "order": "compact",
        "never_slower": False,
    }
    del graph[find(graph, BUDGET)]
    graph["100"] = {"class_type": "LiteAttentionThreshold", "inputs": settings | control}
    graph[find(graph, PATCH)]["inputs"]["control"] = ["100", 0]
    graph["101"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [sampler, 0], "filename_prefix": "test"},
    }
    return graph


def latent_of(server, graph) -> torch.Tensor:
    finished = server.run(graph)
    assert finished.error is None
    saved = finished.outputs["101"]["latents"][0]
    return safetensors.torch.load_file(server.output_file(saved))["latent_tensor"]


def report_of(server, graph) -> dict:
    finished = server.run(graph)
    assert finished.error is None
    return finished.outputs[find(graph, REPORT)]["report"][0]


def dense(graph):
    """The same graph without any of our nodes in the sampler's way."""
    return without(without(graph, REPORT, "latent"), PATCH, "model")


def test_the_nodes_are_there_and_every_input_has_a_tooltip(object_info):
    for name in NODES:
        node = object_info[name]
        assert node["category"] == "model/LiteAttention"
        assert node["description"]
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        for declared in inputs.values():
            assert len(declared[1]["tooltip"]) > 20
        assert all(node["output_tooltips"])


def test_the_demo_skips_tiles_and_is_close_to_dense(server, tmp_path):
    options = {"seed": 7, "frames": 16, "steps": 5, "rounds": 1}
    options |= {"preset": "Balanced", "never_slower": False}
    figures = compare(server, Namespace(out=tmp_path, **options))
    assert options.items() <= figures.items()
    assert figures["tokens"] == 4096
    assert figures["backend"] == "cpu"
    assert figures["computed_fraction"] < 0.95
    assert 0 < figures["lost_mass_mean"] < 0.2
    assert 38 <= figures["psnr_db"] < 100
    assert f"{figures['lost_mass_mean']:.2%}" in summary(figures, tmp_path)
    assert "not measured" in summary(figures | {"lost_mass_mean": None}, tmp_path)


def test_the_safest_threshold_is_exactly_the_model_without_the_node(server, workflow):
    graph = small(workflow, threshold=SAFEST)
    assert torch.equal(latent_of(server, graph), latent_of(server, dense(graph)))
    assert "safest" in report_of(server, small(workflow, threshold=SAFEST, seed=2))["status"]


def test_all_tiles_live_is_exactly_dense_of_the_same_backend(server, workflow):
    live = latent_of(server, small(workflow, threshold=-39.5, criterion="gap", audit=8))
    assert torch.equal(live, latent_of(server, small(workflow, warmup=1.0)))


def test_the_same_seed_gives_the_same_bits_whatever_came_before(server, start, workflow):
    graph = small(workflow)
    first = latent_of(server, graph)
    other = latent_of(server, small(workflow, seed=5, prompt="blue square moving up"))
    again = latent_of(server, graph)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with start() as fresh:
        assert torch.equal(first, latent_of(fresh, graph))


def test_skipping_changes_something_and_says_so(server, workflow):
    graph = small(workflow, seed=9)
    assert not torch.equal(latent_of(server, graph), latent_of(server, dense(graph)))
    report = report_of(server, small(workflow, seed=10))
    assert report["active"]
    assert report["computed_fraction"] < 1
    assert list(report["per_layer"]) == ["0", "1", "2", "3"] or len(report["per_layer"]) == 4


def test_dense_layers_are_dense(server, workflow):
    report = report_of(server, small(workflow, dense_layers="0, 2-3"))
    (only,) = report["per_layer"].values()
    assert only["computed_fraction"] < 1
    dense_calls = [n for why, n in report["reasons"].items() if "dense_layers" in why]
    assert dense_calls == [3 * 4]  # layers x steps, both conditionings in one call


def test_a_short_sequence_stays_dense_and_says_why(server, workflow):
    graph = small(workflow, min_tokens=5000)
    assert torch.equal(latent_of(server, graph), latent_of(server, dense(graph)))
    report = report_of(server, small(workflow, min_tokens=5000, seed=3))
    assert not report["active"]
    assert "short sequence" in report["status"]


@pytest.mark.parametrize("samplers", ["heun", "dpm_2", "uni_pc"])
def test_samplers_with_more_than_one_evaluation_a_step(server, workflow, samplers):
    graph = small(workflow)
    graph[find(graph, SAMPLER)]["inputs"]["sampler_name"] = samplers
    report = report_of(server, graph)
    assert report["active"]
    assert [row["step"] for row in report["per_step"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 3.0}, "threshold"),
        ({"threshold": "often"}, "threshold"),
        ({"dense_layers": "first"}, "0, 1, 38-39"),
        ({"warmup": 7.0}, "warmup"),
    ],
)
def test_a_wrong_value_gives_one_clear_message_and_the_queue_goes_on(server, workflow, wrong, says):
    with pytest.raises(PromptRefusedError) as refused:
        server.run(small(workflow, **wrong))
    errors = json.loads(str(refused.value))["node_errors"]
    assert list(errors) == ["100"]
    assert len(errors["100"]["errors"]) == 1
    assert says in json.dumps(errors["100"]["errors"][0])
    assert server.run(small(workflow, steps=1, seed=77)).error is None


def test_a_choice_that_is_not_there_is_named_with_the_others(server, workflow):
    """0.3.75 does not check the choices of V3 nodes before it runs them; later versions do."""

    def message(graph):
        try:
            return server.run(graph).error
        except PromptRefusedError as refused:
            return str(refused)

    criterion = small(workflow, criterion="magic")
    assert "mass" in message(criterion)
    preset = small(workflow)
    del preset[find(preset, PATCH)]["inputs"]["control"]
    preset[find(preset, PATCH)]["inputs"]["preset"] = "Reckless"
    assert "Balanced" in message(preset)
    assert server.run(small(workflow, steps=1, seed=78)).error is None


def test_the_report_without_a_patch_says_so(server, workflow):
    graph = small(workflow)
    report = find(graph, REPORT)
    patched = graph[report]["inputs"]["model"][0]
    graph[report]["inputs"]["model"] = graph[patched]["inputs"]["model"]
    text = server.run(graph).outputs[report]["text"][0]
    assert "has not been through a LiteAttention node" in text


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_report_shows_its_pictures_and_gives_them(server, workflow, theme):
    graph = small(workflow, seed=12)
    report = find(graph, REPORT)
    graph[report]["inputs"]["theme"] = theme
    for node, slot in (("102", 1), ("103", 3)):
        graph[node] = {"class_type": "PreviewImage", "inputs": {"images": [report, slot]}}
    finished = server.run(graph)
    assert finished.error is None
    maps, charts = (finished.outputs[node]["images"] for node in ("102", "103"))
    assert (len(maps), len(charts)) == (1, 2)
    shown = [server.output_file(image) for image in finished.outputs[report]["images"]]
    (moving,) = finished.outputs[report]["liteattention_animation"]
    with Image.open(server.output_file(moving)) as animation:
        assert (animation.format, animation.n_frames) == ("WEBP", 4)
        assert animation.size == ANIMATION_SIZE
    given = [server.output_file(image) for image in (*charts, *maps)]
    for one, other in zip(shown, given, strict=True):
        with Image.open(one) as a, Image.open(other) as b:
            assert a.size == SIZE
            assert a.tobytes() == b.tobytes()
            assert (sum(a.getpixel((0, 0))) > 384) == (theme == "light")


def test_a_run_from_the_cache_tells_the_node_what_it_did(server, workflow):
    graph = small(workflow, seed=13)
    report, sampler = find(graph, REPORT), find(graph, "KSampler")
    sampled, cached = server.run(graph), server.run(graph)
    assert sampler in sampled.seconds and sampler not in cached.seconds
    for finished in (sampled, cached):
        (status,) = finished.outputs[report]["liteattention_status"]
        assert "% skipped, lost" in status


def comparing(frames=3, **changed):
    """Two grey videos before LiteAttentionCompare; ``changed`` is the candidate's."""
    plain = {"width": 300, "height": 64, "batch_size": frames, "color": 0x808080}
    source = {"class_type": "EmptyImage"}
    inputs = {"reference": ["1", 0], "candidate": ["2", 0], "amplify": 4.0}
    return {
        "1": source | {"inputs": plain},
        "2": source | {"inputs": plain | changed},
        "3": {"class_type": "LiteAttentionCompare", "inputs": inputs},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }


def test_compare_measures_and_shows(server):
    finished = server.run(comparing(color=0x8A8A8A))  # ten levels brighter
    assert finished.error is None
    shown = finished.outputs["3"]
    assert shown["compare"][0]["psnr_db"] == pytest.approx(28.13, abs=0.01)
    assert "PSNR 28.13 dB" in shown["text"][0]
    assert len(shown["images"]) == 1
    frames = finished.outputs["4"]["images"]
    assert len(frames) == 3
    with Image.open(server.output_file(frames[0])) as picture:
        levels = [picture.getpixel((x, 80))[0] for x in (10, 310, 610)]
    assert levels == pytest.approx([128, 138, 40], abs=1)


def test_compare_calls_equal_videos_identical(server):
    shown = server.run(comparing()).outputs["3"]
    assert shown["text"][0].startswith("PSNR identical, SSIM 1.0000 over 3 frames")
    assert shown["compare"][0]["psnr_db"] is None


def test_compare_names_both_sizes_when_they_differ(server):
    error = server.run(comparing(width=64)).error
    assert "3 frames of 300 x 64" in error
    assert "3 frames of 64 x 64" in error
