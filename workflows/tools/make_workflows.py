"""Write the example workflows: ComfyUI's official templates with LiteAttention put into them.

    python -m workflows.tools.make_workflows

The templates are read from the installed ``comfyui-workflow-templates`` (MIT licence), the A/B
workflow from the demo's. The same input gives the same files: only the workflows
made from the installed version of the templates are written. Thumbnails are drawn apart
(thumbnails.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

from .canvas import Canvas, Link, Node, read, samplers
from .folding import fold
from .layout import to_file
from .nodes import GREEN, RED, colours, compare_node, note_node, patch_node, report_node
from .subgraphs import unfold

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "workflows"
DEMO = "demo/workflows/liteattention_demo"

BYPASSED = 4
SEED = 7
PREFIX = "video/liteattention"
SHORT = 100  # letters of advice that take two lines of a note
IMAGE = "example.png"  # is in ComfyUI's input folder

BOAT = (
    "A small paper boat drifts down a rain gutter along an old stone street. The camera is close "
    "to the water and follows the boat from behind. It rocks on small waves, turns slowly around "
    "a wet leaf and drifts on. Raindrops make rings on the water, reflections of warm windows "
    "tremble in it. Soft morning light, shallow depth of field, natural colours."
)
CLOSER = "The camera moves closer slowly and steadily, light moves over the scene, natural motion."


@dataclass(frozen=True)
class Recipe:
    """``widgets``: the first widget value of the nodes with this title or of this type.
    ``folded``: what is before and after LiteAttention, in a subgraph each. ``made_from``: the
    version of the templates."""

    name: str
    template: str
    title: str
    widgets: dict[str, str] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    compare: bool = False
    folded: bool = False
    made_from: str = "0.7.25"


NEWER = "0.11.97"
EXPERTS = (
    "**Two experts**: each has a LiteAttention of its own; give both the same preset, and bypass "
    "both to compare. *enable_turbo_mode* is the 4-step LoRA: two steps for each expert, and the "
    "first always computes everything, so there is little to gain."
)
TURBO = (
    "*turbo_mode* is the 8-step LoRA: fewer steps leave less to skip. Text, sound and reference "
    "pictures are never skipped."
)
STAGES = (
    "**Two passes** share one LiteAttention: 8 steps at half the size, 3 at full size. The first "
    "step of each computes everything, so the second has little to gain. Sound has an attention "
    "of its own, which stays as it is."
)
START_IMAGE = "**Start image**: choose yours in *Load Image*, and say in the prompt what moves."
BYPASS = (
    "the seed is fixed. Select LiteAttention, press **Ctrl+B** (bypass), run again: the same video "
    "without it."
)
T2V = {"Prompt": BOAT, "MiniMaxH3ImageToVideo": BOAT}
I2V = {"Prompt": CLOSER, "MiniMaxH3ImageToVideo": CLOSER, "LoadImage": IMAGE}

RECIPES = (
    Recipe(
        "minimax_h3_t2v",
        "video_minimax_h3_t2v",
        "MiniMax H3 text to video",
        T2V,
        (TURBO,),
        folded=True,
        made_from=NEWER,
    ),
    Recipe(
        "minimax_h3_i2v",
        "video_minimax_h3_i2v",
        "MiniMax H3 image to video",
        I2V,
        (START_IMAGE, TURBO),
        folded=True,
        made_from=NEWER,
    ),
    Recipe(
        "ltx2.3_t2v",
        "video_ltx2_3_t2v",
        "LTX-2.3 text to video with sound",
        T2V,
        (STAGES,),
        folded=True,
        made_from=NEWER,
    ),
    Recipe(
        "ltx2.5_t2v",
        "video_ltx2_5_t2v",
        "LTX-2.5 text to video with sound",
        T2V,
        (STAGES,),
        folded=True,
        made_from=NEWER,
    ),
    Recipe(
        "wan2.2_14b_t2v",
        "video_wan2_2_14B_t2v",
        "Wan 2.2 14B text to video",
        T2V,
        (EXPERTS,),
        folded=True,
        made_from=NEWER,
    ),
    Recipe(
        "wan2.2_14b_i2v",
        "video_wan2_2_14B_i2v",
        "Wan 2.2 14B image to video",
        I2V,
        (START_IMAGE, EXPERTS),
        folded=True,
        made_from=NEWER,
    ),
    Recipe("wan2.1_t2v", "text_to_video_wan", "Wan 2.1 text to video", T2V),
    Recipe(
        "wan2.1_t2v_ab",
        "text_to_video_wan",
        "Wan 2.1 text to video, with and without",
        T2V,
        compare=True,
    ),
    Recipe("wan2.1_i2v", "image_to_video_wan", "Wan 2.1 image to video", I2V, (START_IMAGE,)),
    Recipe(
        "wan2.2_5b_ti2v",
        "video_wan2_2_5B_ti2v",
        "Wan 2.2 5B text or image to video",
        T2V | {"LoadImage": IMAGE},
        (
            "**Start from an image**: select *Load Image*, press **Ctrl+B**, choose yours, and say "
            "in the prompt what moves.",
        ),
    ),
    Recipe(
        "hunyuan_video_1.5_t2v",
        "video_hunyuan_video_1.5_720p_t2v",
        "HunyuanVideo 1.5 text to video",
        T2V,
    ),
    Recipe(
        "kandinsky5_t2v",
        "video_kandinsky5_t2v",
        "Kandinsky 5 text to video",
        T2V,
        made_from=NEWER,
    ),
)


def main() -> None:
    installed = version("comfyui-workflow-templates")
    for recipe in RECIPES:
        if recipe.made_from == installed:
            save(f"workflows/liteattention_{recipe.name}", from_template(recipe))
    save(f"{DEMO}_ab", from_demo())


def from_template(recipe: Recipe) -> dict[str, Any]:
    canvas = simplest_branch(read(unfold(template(recipe.template))))
    canvas = with_liteattention(canvas, pass_on=not recipe.folded)
    canvas = replace(
        canvas, nodes={i: _dressed(node, i, canvas, recipe) for i, node in canvas.nodes.items()}
    )
    note = _note(recipe, canvas)
    if recipe.folded:
        folded = fold(canvas, recipe.name)
        return to_file(folded.canvas, recipe.name, note, folded.subgraphs)
    return to_file(with_comparison(canvas) if recipe.compare else canvas, recipe.name, note)


def template(name: str) -> dict[str, Any]:
    path = _newer_template(name)
    if path is None:
        import comfyui_workflow_templates as templates

        path = Path(templates.get_asset_path(name, f"{name}.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def _newer_template(name: str) -> Path | None:
    """In newer versions the files are a package of their own."""
    try:
        listed = files("comfyui-workflow-templates-json") or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(one.locate())) for one in listed if one.name == f"{name}.json"), None)


def simplest_branch(canvas: Canvas) -> Canvas:
    """What the saved video with the fewest nodes needs.

    Templates offer variants side by side, some bypassed: few-step LoRAs, upscaling, a cache.
    """
    videos = [i for i, node in canvas.nodes.items() if node["type"] == "SaveVideo"]
    last = min(videos, key=lambda i: len(canvas.ancestors(i)))
    if canvas.nodes[last].get("mode") == BYPASSED:  # the whole variant is, and we want it
        canvas = replace(canvas, nodes={i: n | {"mode": 0} for i, n in canvas.nodes.items()})
    canvas = _without_bypassed(canvas)
    kept = canvas.ancestors(last)
    nodes = {i: node for i, node in canvas.nodes.items() if i in kept}
    return Canvas(nodes, tuple(link for link in canvas.links if link.target in kept))


def _without_bypassed(canvas: Canvas) -> Canvas:
    """Nodes that only pass their first input on are left out; a bypassed image loader stays."""
    for i, node in canvas.nodes.items():
        before = next(canvas.into(i), None)
        if (node.get("mode") == BYPASSED or node["type"] == "Reroute") and before:
            links = (
                link._replace(origin=before.origin, output=before.output)
                if link.origin == i
                else link
                for link in canvas.links
                if link.target != i
            )
            canvas = replace(canvas, links=tuple(links))
    return canvas


def with_liteattention(canvas: Canvas, pass_on: bool = True) -> Canvas:
    """A LiteAttention last before every sampler, or for several that share a model, and a
    LiteAttention Report after each, which passes the latent on or stands aside."""
    patches: dict[tuple[int, int], int] = {}
    for sampler in samplers(canvas):
        guider = next(canvas.into(sampler, "guider"), None)
        (model,) = canvas.into(guider.origin if guider else sampler, "model")
        source = model.origin, model.output
        nodes, added = dict(canvas.nodes), []
        if source not in patches:
            patches[source] = max(nodes) + 1
            nodes[patches[source]] = patch_node(_expert(canvas, model.origin))
            added.append(Link(*source, patches[source], 0))
        patch, report = patches[source], max(nodes) + 1
        nodes[report] = report_node(_part(canvas, sampler, model.origin))
        moved = {model: model._replace(origin=patch, output=0)}
        if pass_on:
            moved |= {
                link: link._replace(origin=report)
                for link in canvas.links
                if (link.origin, link.output) == (sampler, 0)
            }
        added += [Link(patch, 0, report, 0), Link(sampler, 0, report, 1)]
        canvas = Canvas(nodes, (*(moved.get(link, link) for link in canvas.links), *added))
    return canvas


def _expert(canvas: Canvas, model: int) -> str:
    """Which one of two a model is, by the name of its file."""
    if len({link.origin for i in samplers(canvas) for link in canvas.into(i, "model")}) < 2:
        return ""
    files = " ".join(str(canvas.nodes[i].get("widgets_values")) for i in canvas.ancestors(model))
    found = [one for one in ("high_noise", "low_noise") if one in files]
    return found[0].replace("_", " ") if len(found) == 1 else ""


def _part(canvas: Canvas, sampler: int, model: int) -> str:
    """What tells a sampler from the others: the expert, or the pass."""
    order = samplers(canvas)
    if len(order) < 2:
        return ""
    return _expert(canvas, model) or ("first pass", "second pass")[order.index(sampler)]


def _dressed(node: Node, i: int, canvas: Canvas, recipe: Recipe) -> Node:
    """Titles and colours as in all our workflows; a fixed seed, so that runs can be compared."""
    node = dict(node)
    if node["type"] == "CLIPTextEncode":
        negative = "Negative" in node.get("title", "") or any(
            link.origin == i
            and canvas.nodes[link.target]["inputs"][link.entry]["name"] == "negative"
            for link in canvas.links
        )
        node |= {"title": "Negative prompt" if negative else "Prompt"}
        node |= colours(RED if negative else GREEN)
    elif (node["type"].startswith("Empty") or "ImageToVideo" in node["type"]) and not any(
        canvas.into(i, "width")
    ):
        node["title"] = "Video size"
    values = list(node.get("widgets_values") or [])
    for k, value in enumerate(values):
        if value == "randomize":
            values[k - 1 : k + 1] = SEED, "fixed"
        if isinstance(value, float):
            values[k] = round(value, 6)  # 5.000000000000001
    if node["type"] == "SaveVideo":
        values[0] = PREFIX
    for key in (node.get("title"), node["type"]):
        if key in recipe.widgets:
            values[0] = recipe.widgets[key]
    return node | {"widgets_values": values}


def _note(recipe: Recipe, canvas: Canvas) -> Node:
    models = [m for n in canvas.nodes.values() for m in n["properties"].get("models", ())]
    links = "\n".join(
        f"* `models/{model['directory']}`: [{model['name']}]({model['url']})"
        for model in sorted(models, key=lambda model: (model["directory"], model["name"]))
    )
    advice = sum(46 if len(words) < SHORT else 60 for words in recipe.advice)
    height = 285 + 24 * len(models) + advice + 60 * recipe.compare
    text = "\n\n".join(
        (
            f"## {recipe.title}" + ("" if recipe.compare else ", faster"),
            "**Change** the prompt, the size and the preset: *Safe* stays closest to the original, "
            "*Fast* skips most. More frames or pixels leave more to skip.",
            *recipe.advice,
            f"**Compare**: {AB.format('preset') if recipe.compare else BYPASS}",
            "**In your own workflow**: LiteAttention goes last before the sampler, after LoRAs and "
            "other patches.",
            CHINESE,
            f"**Download**, unless ComfyUI has offered them already:\n\n{links}",
            "Our own figures are those of a small model.",
        )
    )
    return note_node(text, height=height)


CHINESE = Path(__file__).with_name("note.zh.md").read_text(encoding="utf-8").strip()
AB = """*LiteAttention Compare* says how close the two videos are (PSNR, SSIM) and where they \
differ; the saved video shows both and the difference. The seed is the same. If you change the \
{} and run again, only the second sampler runs again."""
AB_NOTE = f"""## With and without, side by side

A small video model (5 M parameters, trained for this demo) draws the same shapes twice: without \
and with **LiteAttention**. {AB.format("closeness")}

1. Press **Run**.
2. Change **closeness**, how close the video stays in dB of PSNR: 50 stays closest to the \
original, 35 skips most.

**LiteAttention Budget** replaces the preset. Its *never_slower* is off, so that there is \
something to see on any machine. In your own workflows leave it on, or take a preset: there it is \
on.

**Your own model**: open the template *liteattention_wan2.1_t2v_ab*."""


def from_demo() -> dict[str, Any]:
    demo = json.loads((REPOSITORY / f"{DEMO}.json").read_text(encoding="utf-8"))
    return to_file(with_comparison(read(demo)), "demo_ab", note_node(AB_NOTE, height=320))


def with_comparison(canvas: Canvas) -> Canvas:
    """A second sampler that runs without LiteAttention; the video shows both."""
    (sampler,) = samplers(canvas)
    (report,) = (i for i, n in canvas.nodes.items() if n["type"] == "LiteAttentionReport")
    (patched,) = canvas.into(sampler, "model")
    (model,) = canvas.into(patched.origin, "model")
    (samples,) = (link for link in canvas.links if link[:2] == (report, 0))
    decode = samples.target
    (frames,) = (link for link in canvas.links if link.origin == decode)
    dense, dense_decode, compare = (max(canvas.nodes) + n for n in (1, 2, 3))
    nodes = canvas.nodes | {
        dense: canvas.nodes[sampler] | {"title": "Without LiteAttention"},
        sampler: canvas.nodes[sampler] | {"title": "With LiteAttention"},
        dense_decode: canvas.nodes[decode] | {"title": "Decode: without"},
        decode: canvas.nodes[decode] | {"title": "Decode: with"},
        report: report_node(),
        compare: compare_node(),
        frames.target: canvas.nodes[frames.target] | {"title": "Without, with, difference"},
    }
    again = {
        patched: model._replace(target=dense, entry=patched.entry),
        samples: samples._replace(origin=dense, target=dense_decode),
    }
    links = [link for link in canvas.links if link != frames]
    links += [again.get(link, link._replace(target=dense)) for link in canvas.into(sampler)]
    links += [again.get(link, link._replace(target=dense_decode)) for link in canvas.into(decode)]
    links += [
        Link(dense_decode, frames.output, compare, 0),
        Link(decode, frames.output, compare, 1),
        frames._replace(origin=compare, output=0),
    ]
    return Canvas(nodes, tuple(links))


def save(name: str, workflow: dict[str, Any]) -> None:
    text = json.dumps(workflow, indent=2, ensure_ascii=False)
    (REPOSITORY / f"{name}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    print(name, len(workflow["nodes"]), "nodes")


if __name__ == "__main__":
    main()
