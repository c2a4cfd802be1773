"""What a newcomer sees: the demo in a real browser, with pictures for the docs.

    pip install playwright; apt install chromium
    .dev/venv/bin/python tests/environment/browser.py OUT [--chromium /usr/bin/chromium]

Searches the node by "faster video", opens every workflow, runs the demo's two, prints what the
nodes say and checks that the report's animation moves, with "Nodes 2.0" as well. Not among the
tests: it needs a browser. Writes into OUT ``search.png`` and, of the demo's workflows, the canvas
after a run and the thumbnail.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from comfyui_liteattention.report.animation import SIZE as ANIMATION_SIZE  # noqa: E402
from demo.comfy_server import ComfyServer, make_base  # noqa: E402

WORKFLOWS = {
    path.stem: path
    for folder in ("workflows", "demo/workflows")
    for path in sorted((REPOSITORY / folder).glob("*.json"))
}
DEMO, AB = "liteattention_demo", "liteattention_demo_ab"
SIZE = {"width": 1760, "height": 900}
FREE = (SIZE["width"] / 2, SIZE["height"] - 60)  # of nodes, where a view shows the whole
THUMBNAIL = (400, 300)
CLIP = {"x": 400, "y": 110, "width": 1000, "height": 750}  # beside the menus
RESULTS = "[role=listbox], [role=dialog]"
#: What the thumbnail of a workflow shows. In this order: the second finds results of the first, and
#: what is not run again says nothing on its node.
SHOWN = {DEMO: ("LiteAttentionReport", "SaveAnimatedWEBP"), AB: ("LiteAttentionCompare",)}
ANIMATION = "img[src*=liteattention_maps]"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()


def main() -> None:
    from playwright.sync_api import sync_playwright

    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ComfyServer(_plain(make_base(Path(scratch))), options.out / "comfyui.log") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        page = fresh_page(browser, server)
        for name in WORKFLOWS:
            missing = open_workflow(page, name)
            print(f"{name}: {'all nodes known' if not missing else f'missing: {missing}'}")
        search(page, options.out / "search.png")
        for name, kinds in SHOWN.items():
            page = fresh_page(browser, server)
            open_workflow(page, name)
            run(page, server)
            page.screenshot(path=options.out / f"{name}.png")
            print(*says(page), sep="\n")
            check_animation(page)
            thumbnail(page, options.out / f"{name}.jpg", kinds)
        page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
        page = fresh_page(browser, server)
        open_workflow(page, DEMO)
        run(page, server)
        page.screenshot(path=options.out / f"{DEMO}_nodes2.png")
        check_animation(page)
        browser.close()


def _plain(base: Path) -> Path:
    """No map in the corner of the canvas."""
    settings = base / "user" / "default" / "comfy.settings.json"
    chosen = json.loads(settings.read_text()) | {"Comfy.Minimap.Visible": False}
    settings.write_text(json.dumps(chosen))
    return base


def fresh_page(browser: Any, server: ComfyServer) -> Any:
    page = browser.new_page(viewport=SIZE)
    page.goto(f"http://{server.address}")
    page.wait_for_function("window.app?.graph && window.LiteGraph", timeout=120_000)
    page.wait_for_timeout(4000)
    return page


def open_workflow(page: Any, name: str) -> list[str]:
    """Load it and fit it to the window; returns the types of nodes that the page does not know."""
    graph = json.loads(WORKFLOWS[name].read_text())
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    page.mouse.click(*FREE)
    page.keyboard.press(".")  # fit view
    page.wait_for_timeout(1500)
    return page.evaluate(
        "app.graph.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])"
    )


def search(page: Any, path: Path) -> None:
    """Double-click on the canvas and type what one hopes for, then the name: older front ends (that
    of 0.3.75 among them) look at names only."""
    page.evaluate("app.graph.clear()")
    for words in ("faster video", "LiteAttention"):
        page.mouse.dblclick(SIZE["width"] / 2, SIZE["height"] / 2)
        page.wait_for_timeout(1000)
        page.keyboard.type(words)
        page.wait_for_timeout(2000)
        found = any("LiteAttention" in text for text in page.locator(RESULTS).all_inner_texts())
        print(f"searched by {words!r}: {'found' if found else 'not found'}")
        page.screenshot(path=path)
        for _ in range(2):  # the list of results, the dialog
            page.keyboard.press("Escape")
            page.wait_for_timeout(1000)
        if found:
            return
    raise SystemExit("the node was not found")


def run(page: Any, server: ComfyServer) -> None:
    """Press Run and wait for the end."""
    before = len(server.get("/history"))
    page.get_by_role("button", name="Run", exact=True).first.click()
    for _ in range(600):
        history = server.get("/history")
        if len(history) > before:
            status = list(history.values())[-1]["status"]
            assert status["status_str"] == "success", status
            break
        time.sleep(1)
    else:
        raise TimeoutError("the run did not end")
    page.wait_for_timeout(3000)
    page.mouse.move(*FREE)  # the canvas is drawn anew: only then ComfyUI places a new preview
    page.wait_for_timeout(2000)


def says(page: Any) -> list[str]:
    """The texts on our nodes."""
    texts = page.evaluate(
        "app.graph.nodes.flatMap(n => (n.widgets || []).map(w => [n.type, String(w.value)]))"
    )
    return [f"{kind}: {text}" for kind, text in texts if kind.startswith("LiteAttention") and text]


def check_animation(page: Any) -> None:
    """It is there, once, and looks different after a while."""
    animation = page.locator(ANIMATION)
    size = animation.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert tuple(size) == ANIMATION_SIZE, size
    seen = set()
    for _ in range(5):
        seen.add(animation.screenshot())
        page.wait_for_timeout(700)
    assert len(seen) > 1, "the animation stands still"
    print(f"the animation moves: {len(seen)} different pictures of 5")


def thumbnail(page: Any, path: Path, kinds: tuple[str, ...]) -> None:
    """A picture of the nodes of these kinds."""
    left, top, width, height = CLIP.values()
    page.evaluate(
        """([kinds, left, top, width, height]) => {
            const shown = app.graph.nodes.filter(n => kinds.includes(n.type));
            const boxes = shown.map(n => n.boundingRect);
            const x0 = Math.min(...boxes.map(b => b[0])), y0 = Math.min(...boxes.map(b => b[1]));
            const x1 = Math.max(...boxes.map(b => b[0] + b[2]));
            const y1 = Math.max(...boxes.map(b => b[1] + b[3]));
            const view = app.canvas.ds;
            view.scale = Math.min(width / (x1 - x0), height / (y1 - y0));
            view.offset[0] = (left + width / 2) / view.scale - (x0 + x1) / 2;
            view.offset[1] = (top + height / 2) / view.scale - (y0 + y1) / 2;
            app.canvas.setDirty(true, true);
        }""",
        [list(kinds), left, top, width, height],
    )
    page.wait_for_timeout(1500)
    picture = Image.open(io.BytesIO(page.screenshot(clip=CLIP))).convert("RGB")
    picture.resize(THUMBNAIL, Image.Resampling.LANCZOS).save(path, quality=85)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    return parser.parse_args()


if __name__ == "__main__":
    main()
