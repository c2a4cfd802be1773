"""What a newcomer sees: the demo in a real browser, with pictures for the docs.

    pip install playwright; apt install chromium
    .dev/venv/bin/python tests/environment/browser.py OUT [--chromium /usr/bin/chromium]
        [--front-end FOLDER] [--only open | --only use | --picture docs/images/workflow.png]
        [--steps 20]

Searches the node by "faster video", opens every workflow and checks that all of it can be read in a
window of a usual size, with "Nodes 2.0" as well; runs the demo's two, prints what the nodes say and
checks that the report's animation moves. Not among the tests: it needs a browser. ``--front-end``:
the ``static`` folder of another comfyui-frontend-package. Writes into OUT ``search.png``, every
workflow as it opens, and the canvas of the demo's after a run.
"""

from __future__ import annotations

import argparse
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
LARGE = {"width": 2000, "height": 1500}  # for a picture of the whole after a run
USUAL = {"width": 1440, "height": 900}
SMALLEST = 0.6  # of a workflow, at fit view: below that its texts can't be read
RESULTS = "[role=listbox], [role=dialog]"
RUN = (DEMO, AB)  # in this order: the second finds results of the first
ANIMATION = "img[src*=liteattention_maps]"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    from playwright.sync_api import sync_playwright

    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    extra = ("--front-end-root", str(options.front_end)) if options.front_end else ()
    with (
        tempfile.TemporaryDirectory() as scratch,
        ComfyServer(_plain(make_base(Path(scratch))), options.out / "comfyui.log", extra) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        if options.picture:
            take_picture(fresh_page(browser, server, size=LARGE), server, options.picture)
            return
        if options.only != "use":
            open_all(browser, server, options.out)
        if options.only != "open":
            use(browser, server, options.out, options.steps)
        browser.close()


def open_all(browser: Any, server: ComfyServer, out: Path) -> None:
    """Every workflow, as it is seen first."""
    wrong = []
    for nodes2 in (False, True):
        page = fresh_page(browser, server, nodes2, USUAL)
        for name in WORKFLOWS:
            wrong += check_workflow(page, name, out, nodes2)
    if wrong:
        raise SystemExit("\n".join(wrong))


def use(browser: Any, server: ComfyServer, out: Path, steps: int) -> None:
    """Search the node, run the demo's workflows, bypass, interrupt, run again."""
    search(fresh_page(browser, server), out / "search.png")
    for name, nodes2 in ((DEMO, False), (AB, False), (DEMO, True)):
        page = fresh_page(browser, server, nodes2)
        open_workflow(page, name)
        set_widget(page, "KSampler", "steps", steps)
        run(page, server)
        page.screenshot(path=out / f"{name}{'_nodes2' * nodes2}.png")
        print(*says(page), sep="\n")
        assert "skipped" in status(page), status(page)  # of a run from the cache, too
        check_animation(page)
    for nodes2 in (False, True):
        page = fresh_page(browser, server, nodes2)
        change_ones_mind(page, server)
        page.screenshot(path=out / f"interrupted{'_nodes2' * nodes2}.png")


def change_ones_mind(page: Any, server: ComfyServer) -> None:
    """A run, one with the node bypassed, one that is interrupted, and the first again: the node
    tells of each what it was."""
    open_workflow(page, DEMO)
    set_widget(page, "KSampler", "steps", 6)
    set_widget(page, "LiteAttentionDemoLatent", "frames", 8)

    def expect(words: str) -> None:
        text = status(page)
        assert words in text, f"{words!r} is not in {text!r}"
        print(f"the node says: {text}")

    run(page, server)
    expect("skipped")
    bypass(page)
    run(page, server)
    expect("bypassed")
    bypass(page)
    set_widget(page, "KSampler", "seed", 8)
    before = len(server.get("/history"))
    press_run(page)
    page.wait_for_function(f"({STATUS})().startsWith('step 2/')", timeout=120_000)
    expect("step 2/6")
    server.post("/interrupt", {})
    wait_for_end(server, "error", before)  # so the history calls it
    page.wait_for_timeout(2000)
    expect("interrupted")
    run(page, server)
    expect("skipped")


STATUS = """() => {
    const node = app.graph.nodes.find(node => node.type === "LiteAttentionPatch");
    return String(node.widgets.find(widget => widget.name === "status").value);
}"""


def status(page: Any) -> str:
    return page.evaluate(STATUS)


def bypass(page: Any) -> None:
    """The LiteAttention node, or back."""
    page.mouse.click(*free(page))
    page.evaluate(
        "app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'LiteAttentionPatch'))"
    )
    page.keyboard.press("Control+b")
    page.wait_for_timeout(1000)


def set_widget(page: Any, kind: str, name: str, value: float) -> None:
    page.evaluate(
        """([kind, name, value]) => {
            for (const node of app.graph.nodes.filter(node => node.type === kind)) {
                node.widgets.find(widget => widget.name === name).value = value;
            }
        }""",
        [kind, name, value],
    )


def take_picture(page: Any, server: ComfyServer, path: Path) -> None:
    """The demo's nodes after a run."""
    open_workflow(page, DEMO)
    run(page, server)
    page.keyboard.press(".")  # fit view
    page.wait_for_timeout(2000)
    box = page.evaluate(
        """margin => {
            const { scale, offset } = app.canvas.ds;
            const canvas = app.canvas.canvas.getBoundingClientRect();
            const edges = app.graph.nodes.map(node => node.getBounding());
            const left = Math.min(...edges.map(([x]) => x)) - margin;
            const top = Math.min(...edges.map(([, y]) => y)) - 2 * margin;
            const right = Math.max(...edges.map(([x, , width]) => x + width)) + margin;
            const bottom = Math.max(...edges.map(([, y, , height]) => y + height)) + margin;
            return {
                x: canvas.left + (left + offset[0]) * scale,
                y: canvas.top + (top + offset[1]) * scale,
                width: (right - left) * scale,
                height: (bottom - top) * scale,
            };
        }""",
        12,
    )
    page.screenshot(path=path, clip=box)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def check_workflow(page: Any, name: str, out: Path, nodes2: bool) -> list[str]:
    """Open it; what is wrong with what one sees then."""
    missing = open_workflow(page, name)
    scale = page.evaluate("app.canvas.ds.scale")
    page.screenshot(path=out / f"{name}_opened{'_nodes2' * nodes2}.png")
    print(f"{name}: {scale:.0%}" + (f", missing: {missing}" if missing else ""))
    wrong = [] if scale >= SMALLEST else [f"{name}: only {scale:.0%} at fit view"]
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".comfy-markdown, .markdown, .lg-node-markdown")]
            .some(e => e.offsetParent && e.scrollHeight > e.clientHeight + 40)"""
    )
    return [*wrong, *([f"{name}: its note is cut"] if cut else [])]


def _plain(base: Path) -> Path:
    """No map in the corner of the canvas."""
    settings = base / "user" / "default" / "comfy.settings.json"
    chosen = json.loads(settings.read_text()) | {"Comfy.Minimap.Visible": False}
    settings.write_text(json.dumps(chosen))
    return base


def fresh_page(
    browser: Any, server: ComfyServer, nodes2: bool = False, size: dict[str, int] = SIZE
) -> Any:
    page = browser.new_page(viewport=size)
    for again in (False, True):  # settings count from the next start on
        page.goto(f"http://{server.address}")
        page.wait_for_function("window.app?.graph && window.LiteGraph", timeout=120_000)
        page.wait_for_timeout(4000)
        if again:
            break
        choice = "true" if nodes2 else "false"
        page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {choice})")
        page.wait_for_timeout(1000)
    return page


def free(page: Any) -> tuple[float, float]:
    """A point without nodes, where a view shows the whole."""
    return page.viewport_size["width"] / 2, page.viewport_size["height"] - 60


def open_workflow(page: Any, name: str) -> list[str]:
    """Load it and fit it to the window; returns the types of nodes that the page does not know."""
    graph = json.loads(WORKFLOWS[name].read_text())
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    page.mouse.click(*free(page))
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
    press_run(page)
    wait_for_end(server, "success", before)
    page.wait_for_timeout(3000)
    page.mouse.move(*free(page))  # the canvas is drawn anew: only then ComfyUI places a new preview
    page.wait_for_timeout(2000)


def press_run(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).first.click()


def wait_for_end(server: ComfyServer, outcome: str, before: int) -> None:
    """Until the history has more entries than before; the last one ended so."""
    for _ in range(600):
        history = server.get("/history")
        if len(history) > before:
            ended = list(history.values())[-1]["status"]
            assert ended["status_str"] == outcome, ended
            return
        time.sleep(1)
    raise TimeoutError("the run did not end")


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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--front-end", type=Path, help="static folder of another front end")
    parser.add_argument("--steps", type=int, default=20, help="of the demo's runs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only", choices=("open", "use"), help="open all, or use the demo's")
    only.add_argument("--picture", type=Path, help="only this: the demo's nodes after a run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
