"""Write the example workflows: ComfyUI's official templates with LiteAttention put into them.

    python workflows/tools/make_workflows.py

The templates are read from the installed ``comfyui-workflow-templates`` (MIT licence), the A/B
workflow from ``liteattention_demo.json``. The same input gives the same files: a new version of the
templates is taken by running this again. Thumbnails are screenshots, made apart.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent.parent

Node = dict[str, Any]

BYPASSED, MUTED = 4, 2
SEED = 7
PREFIX = "video/liteattention"
IMAGE = "example.png"  # is in ComfyUI's input folder
BROWN, GREEN, RED = ("#432", "#653"), ("#232", "#353"), ("#322", "#533")
LEFT, TOP, GAP, TITLE = 40, 80, 40, 30
ROOM = 980  # the note stays below the loaders as long as this height holds both

BOAT = (
    "A small paper boat drifts down a rain gutter along an old stone street. The camera is close "
    "to the water and follows the boat from behind. It rocks on small waves, turns slowly around "
    "a wet leaf and drifts on. Raindrops make rings on the water, reflections of warm windows "
    "tremble in it. Soft morning light, shallow depth of field, natural colours."
)
CLOSER = "The camera moves closer slowly and steadily, light moves over the scene, natural motion."


class Link(NamedTuple):
    """From an output slot of a node to an input slot of another."""

    origin: int
    output: int
    target: int
    entry: int


@dataclass(frozen=True)
class Canvas:
    """A workflow without its places on the screen."""

    nodes: dict[int, Node]
    links: tuple[Link, ...]

    def into(self, node: int, name: str | None = None) -> Iterator[Link]:
        """Links into a node, or into its input of this name."""
        for link in self.links:
            entry = self.nodes[link.target]["inputs"][link.entry]["name"]
            if link.target == node and name in (None, entry):
                yield link

    def ancestors(self, node: int) -> set[int]:
        """The node and everything that it needs."""
        found = {node}
        for link in self.into(node):
            found |= self.ancestors(link.origin)
        return found


@dataclass(frozen=True)
class Recipe:
    """``widgets``: the first widget value of the nodes with this title or of this type."""

    name: str
    template: str
    title: str
    widgets: dict[str, str] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    compare: bool = False


FEW_STEPS = (
    "**Two experts**: each has a LiteAttention of its own; give both the same preset, and "
    "bypass both to compare. With a 4-step LoRA each of them has two steps, and the first step "
    "always computes everything: there is little to gain."
)
START_IMAGE = "**Start image**: choose yours in *Load Image*, and say in the prompt what moves."
BYPASS = (
    "the seed is fixed. Select LiteAttention, press **Ctrl+B** (bypass), run again: the same video "
    "without it."
)
T2V = {"Prompt": BOAT}
I2V = {"Prompt": CLOSER, "LoadImage": IMAGE}

RECIPES = (
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
        "wan2.2_14b_t2v", "video_wan2_2_14B_t2v", "Wan 2.2 14B text to video", T2V, (FEW_STEPS,)
    ),
    Recipe(
        "wan2.2_14b_i2v",
        "video_wan2_2_14B_i2v",
        "Wan 2.2 14B image to video",
        I2V,
        (START_IMAGE, FEW_STEPS),
    ),
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
    Recipe("hunyuan_video_t2v", "hunyuan_video_text_to_video", "HunyuanVideo text to video", T2V),
    Recipe(
        "hunyuan_video_1.5_t2v",
        "video_hunyuan_video_1.5_720p_t2v",
        "HunyuanVideo 1.5 text to video",
        T2V,
    ),
    Recipe(
        "ltxv_t2v",
        "ltxv_text_to_video",
        "LTX-Video text to video",
        T2V,
        ("**Prompts** for this model should be long and detailed.",),
    ),
    Recipe("mochi_t2v", "mochi_text_to_video_example", "Mochi text to video", T2V),
)


def main() -> None:
    for recipe in RECIPES:
        save(f"liteattention_{recipe.name}", from_template(recipe))
    save("liteattention_demo_ab", from_demo())


def from_template(recipe: Recipe) -> dict[str, Any]:
    canvas = with_liteattention(simplest_branch(read(template(recipe.template))))
    canvas = replace(
        canvas, nodes={i: _dressed(node, i, canvas, recipe) for i, node in canvas.nodes.items()}
    )
    note = _note(recipe, canvas)
    return to_file(with_comparison(canvas) if recipe.compare else canvas, recipe.name, note)


def template(name: str) -> dict[str, Any]:
    import comfyui_workflow_templates as templates

    path = Path(templates.get_asset_path(name, f"{name}.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def read(workflow: dict[str, Any]) -> Canvas:
    nodes = {n["id"]: n for n in workflow["nodes"] if "Note" not in n["type"]}
    links = (Link(*link[1:5]) for link in workflow["links"])
    kept = (link for link in links if link.origin in nodes and link.target in nodes)
    return Canvas(nodes, tuple(kept))


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
        if node.get("mode") == BYPASSED and before:
            links = (
                link._replace(origin=before.origin, output=before.output)
                if link.origin == i
                else link
                for link in canvas.links
                if link.target != i
            )
            canvas = replace(canvas, links=tuple(links))
    return canvas


def samplers(canvas: Canvas) -> list[int]:
    """In the order in which they run."""
    found = [i for i, node in canvas.nodes.items() if _is_sampler(node)]
    return sorted(found, key=lambda i: len(canvas.ancestors(i)))


def _is_sampler(node: Node) -> bool:
    names = {entry["name"] for entry in node["inputs"]}
    return "latent_image" in names and bool(names & {"model", "guider"})


def with_liteattention(canvas: Canvas) -> Canvas:
    """A LiteAttention last before every sampler, a LiteAttention Report after it."""
    for sampler in samplers(canvas):
        guider = next(canvas.into(sampler, "guider"), None)
        (model,) = canvas.into(guider.origin if guider else sampler, "model")
        patch = max(canvas.nodes) + 1
        report = patch + 1
        of = _expert(canvas, model.origin) if len(samplers(canvas)) > 1 else ""
        nodes = {patch: patch_node(of), report: report_node(of)}
        moved = {model: model._replace(origin=patch, output=0)}
        moved |= {
            link: link._replace(origin=report)
            for link in canvas.links
            if (link.origin, link.output) == (sampler, 0)
        }
        added = (
            Link(model.origin, model.output, patch, 0),
            Link(patch, 0, report, 0),
            Link(sampler, 0, report, 1),
        )
        links = tuple(moved.get(link, link) for link in canvas.links) + added
        canvas = Canvas(canvas.nodes | nodes, links)
    return canvas


def _expert(canvas: Canvas, model: int) -> str:
    """``high noise`` or ``low noise``, from the name of the file."""
    files = " ".join(str(canvas.nodes[i].get("widgets_values")) for i in canvas.ancestors(model))
    return "high noise" if "high_noise" in files else "low noise"


def patch_node(of: str = "") -> Node:
    return _our_node(
        "LiteAttentionPatch",
        f"LiteAttention ({of})" if of else "",
        inputs=(("model", "MODEL"), ("control", "LITEATTENTION_CONTROL")),
        outputs=(("MODEL", "MODEL"),),
        widgets=["Balanced"],
        height=82,
    )


def report_node(of: str = "") -> Node:
    return _our_node(
        "LiteAttentionReport",
        f"LiteAttention Report ({of})" if of else "",
        inputs=(("model", "MODEL"), ("latent", "LATENT")),
        outputs=(("latent", "LATENT"), ("map", "IMAGE"), ("text", "STRING"), ("charts", "IMAGE")),
        widgets=["dark"],
        height=420 if of else 640,
    )


def compare_node() -> Node:
    return _our_node(
        "LiteAttentionCompare",
        "",
        inputs=(("reference", "IMAGE"), ("candidate", "IMAGE")),
        outputs=(("comparison", "IMAGE"), ("text", "STRING")),
        widgets=[8.0],
        height=640,
    )


def _our_node(
    kind: str,
    title: str,
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[tuple[str, str], ...],
    widgets: list[Any],
    height: int,
) -> Node:
    return {
        "type": kind,
        "size": [0, height],
        "inputs": [{"name": name, "type": of} for name, of in inputs],
        "outputs": [{"name": name, "type": of} for name, of in outputs],
        "properties": {},
        "widgets_values": widgets,
        **({"title": title} if title else {}),
        **_colours(BROWN),
    }


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
        node |= _colours(RED if negative else GREEN)
    elif node["type"].startswith("Empty") or "ImageToVideo" in node["type"]:
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
    files = "\n".join(
        f"* `models/{model['directory']}`: [{model['name']}]({model['url']})"
        for model in sorted(models, key=lambda model: (model["directory"], model["name"]))
    )
    height = 210 + 24 * len(models) + 55 * (len(recipe.advice) + recipe.compare)
    text = "\n\n".join(
        (
            f"## {recipe.title}" + ("" if recipe.compare else ", faster"),
            f"**Download**, unless ComfyUI has offered them already:\n\n{files}",
            "**Change** the prompt, the size and the preset: *Safe* stays closest to the original, "
            "*Fast* skips most. More frames or pixels leave more to skip.",
            *recipe.advice,
            f"**Compare**: {AB if recipe.compare else BYPASS}",
            "**In your own workflow**: LiteAttention goes last before the sampler, after LoRAs and "
            "other patches.",
            "Our figures come from a small model. Judge by your own comparison.",
        )
    )
    return note_node(text, height=height)


def note_node(text: str, height: int) -> Node:
    return {
        "type": "MarkdownNote",
        "title": "Read me",
        "size": [0, height],
        "inputs": [],
        "outputs": [],
        "widgets_values": [text],
        **_colours(BROWN),
    }


AB = """*LiteAttention Compare* says how close the two videos are (PSNR, SSIM) and where they \
differ; the saved video shows both and the difference. The seed is the same. If you change the \
preset and run again, only the second sampler runs again."""
AB_NOTE = f"""## With and without, side by side

A small video model (5 M parameters, trained for this demo) draws the same shapes twice: without \
and with **LiteAttention**. {AB}

1. Press **Run**.
2. Try another preset: *Safe*, *Balanced*, *Fast*.

**Your own model**: open the template *liteattention_wan2.1_t2v_ab*."""


def from_demo() -> dict[str, Any]:
    demo = json.loads((FOLDER / "liteattention_demo.json").read_text(encoding="utf-8"))
    return to_file(with_comparison(read(demo)), "demo_ab", note_node(AB_NOTE, height=300))


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


def to_file(canvas: Canvas, name: str, note: Node) -> dict[str, Any]:
    """The file that ComfyUI opens: nodes with their places, links numbered from 1."""
    number = max(canvas.nodes) + 1
    canvas = replace(canvas, nodes=canvas.nodes | {number: note})
    links = sorted(canvas.links)
    placed = place(canvas, number)
    order = sorted(canvas.nodes, key=lambda i: (len(canvas.ancestors(i)), i))
    nodes = [_file_node(i, canvas.nodes[i], links, placed[i], order.index(i)) for i in placed]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"liteattention/{name}")),
        "revision": 0,
        "last_node_id": number,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": [
            [n, *link, canvas.nodes[link.origin]["outputs"][link.output]["type"]]
            for n, link in enumerate(links, 1)
        ],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _file_node(
    i: int, node: Node, links: list[Link], box: tuple[int, int, int, int], order: int
) -> Node:
    ends_in = {link.entry: n for n, link in enumerate(links, 1) if link.target == i}
    ends: dict[int, list[int]] = {}
    for n, link in enumerate(links, 1):
        if link.origin == i:
            ends.setdefault(link.output, []).append(n)
    properties = node.get("properties", {})
    kept = {k: properties[k] for k in ("models",) if k in properties}
    if "Note" not in node["type"]:
        kept["Node name for S&R"] = node["type"]
    return {
        "id": i,
        "type": node["type"],
        "pos": list(box[:2]),
        "size": list(box[2:]),
        "flags": {},
        "order": order,
        "mode": node.get("mode", 0),
        "inputs": [
            {"name": entry["name"], "type": entry["type"], "link": ends_in.get(k)}
            for k, entry in enumerate(node["inputs"])
        ],
        "outputs": [
            {"name": o["name"], "type": o["type"], "links": ends.get(k, []), "slot_index": k}
            for k, o in enumerate(node["outputs"])
        ],
        **{key: node[key] for key in ("title", "color", "bgcolor") if node.get(key)},
        "properties": kept,
        "widgets_values": list(node["widgets_values"]),
    }


def place(canvas: Canvas, note: int) -> dict[int, tuple[int, int, int, int]]:
    """``x, y, width, height`` of every node: columns of stacked nodes, from left to right."""
    boxes, x = {}, LEFT
    for width, column in _columns(canvas, note):
        y = TOP
        for i in column:
            height = _height(canvas.nodes[i])
            boxes[i] = (x, y, width, height)
            y += height + GAP + TITLE
        x += width + GAP
    return boxes


def _columns(canvas: Canvas, note: int) -> list[tuple[int, list[int]]]:
    """Files, prompts and size, each sampler with its model, reports, the video."""
    nodes = canvas.nodes
    order = sorted(nodes, key=lambda i: (len(canvas.ancestors(i)), nodes[i].get("pos", [0, 0])[1]))
    files = [i for i in order if not any(canvas.into(i)) and _has(nodes[i], FILES)]
    reports = [i for i in order if nodes[i]["type"] == "LiteAttentionReport"]
    compared = [i for i in order if nodes[i]["type"] == "LiteAttentionCompare"]
    used = {note, *files, *reports, *compared}
    runs = []
    for sampler in samplers(canvas):
        needs = canvas.ancestors(sampler) - used
        run = [i for i in order if i in needs and not _has(nodes[i], CONDITIONS)]
        run.sort(key=lambda i: (_is_sampler(nodes[i]), not _has(nodes[i], {"MODEL", "GUIDER"})))
        runs.append(run)
        used |= set(runs[-1])
    conditions = [i for i in order if _has(nodes[i], CONDITIONS) and i not in used]
    conditions.sort(key=lambda i: nodes[i].get("title") == "Video size")
    rest = [i for i in order if i not in used and i not in conditions]
    frames = [i for i in rest if compared and i in canvas.ancestors(compared[0])]
    rest = [i for i in rest if i not in frames]
    short = sum(_height(nodes[i]) + GAP + TITLE for i in [*files, note]) <= ROOM
    columns = [(400, [*files, note])] if short else [(400, [note]), (400, files)]
    columns += [(400, conditions), *((320, run) for run in runs), (420, reports + frames)]
    columns.append((420, compared + rest) if compared else (460, rest))
    return columns


#: Outputs of nodes that read files, and of those that say what is drawn.
FILES = {"MODEL", "CLIP", "VAE", "CLIP_VISION", "IMAGE"}
CONDITIONS = {"CONDITIONING", "CLIP_VISION_OUTPUT", "LATENT"}


def _has(node: Node, kinds: set[str]) -> bool:
    """Whether an output of the node is one of these; a sampler is none of them."""
    return not _is_sampler(node) and any(o["type"] in kinds for o in node["outputs"])


#: Pixels, where the templates leave much room.
HEIGHTS = {"SaveVideo": 450, "KSamplerAdvanced": 334, "SamplerCustomAdvanced": 126}


def _height(node: Node) -> int:
    if node["type"] in HEIGHTS:
        return HEIGHTS[node["type"]]
    size = node["size"]
    return round(max(size[1] if isinstance(size, list) else size["1"], 46))


def _colours(pair: tuple[str, str]) -> dict[str, str]:
    return {"color": pair[0], "bgcolor": pair[1]}


def save(name: str, workflow: dict[str, Any]) -> None:
    text = json.dumps(workflow, indent=2, ensure_ascii=False)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    print(name, len(workflow["nodes"]), "nodes")


if __name__ == "__main__":
    main()
