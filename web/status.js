// What a LiteAttention node does, on the node itself: from the start of a run on, and afterwards.
// Around a subgraph it is seen outside, too. (ComfyUI's own progress text vanishes at the end of a
// run in newer front ends, and is seen in the graph alone that is open.)
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { loadWords, say } from "./words.js";

const KIND = "LiteAttentionPatch";
const EMPTY = "What it does appears here while it samples.";
const BYPASSED = "bypassed: the last run was made without LiteAttention";
const HEIGHT = 56; // pixels: three lines
const OFF = [2, 4]; // modes of a node: muted, bypassed

const shows = new WeakMap(); // of each node of ours: what shows a text on it
const texts = new Map(); // of "workflow/node": the last text; nodes are made anew when one comes back

function root() {
  return app.rootGraph ?? app.graph;
}

// The nodes on the way to an execution id such as "140:12:3", from the outermost to the one meant.
function path(id) {
  const nodes = [];
  let graph = root();
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    if (!node) return [];
    nodes.push(node);
    graph = node.subgraph;
  }
  return nodes;
}

function show(id, text) {
  const nodes = path(id);
  const node = nodes.pop();
  if (node?.comfyClass !== KIND) return;
  texts.set(`${root().id}/${id}`, text);
  shows.get(node)?.(say(text));
  for (const outer of nodes) badge(outer, say(`in this subgraph: ${text}`));
  app.canvas?.setDirty(true, true);
}

// A line above a subgraph. Nodes 2.0 doesn't show it: there the status is inside alone.
function badge(node, text) {
  const mark = () => new window.LGraphBadge({ text, fgColor: "#fff", bgColor: "#653" });
  mark.liteattention = true;
  node.badges ??= [];
  const place = node.badges.findIndex((one) => one.liteattention);
  // In place: front ends watch the list that is there.
  node.badges.splice(place < 0 ? node.badges.length : place, place < 0 ? 0 : 1, mark);
}

// Calls visit(execution id, node, whether it or what is around it is off) for all nodes.
function each(graph, visit, before = "", off = false) {
  for (const node of graph?.nodes ?? []) {
    const id = before + node.id;
    const isOff = off || OFF.includes(node.mode);
    visit(id, node, isOff);
    if (node.subgraph) each(node.subgraph, visit, `${id}:`, isOff);
  }
}

// The execution id of the LiteAttention node whose model a node is given, or null.
function upstream(id) {
  let node = path(id).at(-1);
  while (node && node.comfyClass !== KIND) {
    const place = node.inputs?.findIndex((input) => input.name === "model" || input.name === "");
    node = place >= 0 ? node.getInputNode(place) : null;
  }
  return node ? [...String(id).split(":").slice(0, -1), node.id].join(":") : null;
}

function addStatus(node) {
  const box = document.createElement("div");
  box.className = "liteattention-status";
  box.style.cssText =
    `min-height: ${HEIGHT}px; box-sizing: border-box; padding: 4px 8px; overflow: hidden; ` +
    "font: 12px/1.35 sans-serif; color: var(--input-text); border-radius: 6px; " +
    "background: var(--comfy-input-bg);";
  const set = (text) => {
    // Lines break between the parts, never inside "2.1 of 3 %".
    const parts = text.split(/(?<=[,;:，；：]) ?/);
    box.replaceChildren(
      ...parts.flatMap((part) => {
        const span = document.createElement("span");
        span.style.whiteSpace = part.length < 40 ? "nowrap" : "normal";
        span.textContent = part;
        return [span, " "];
      }),
    );
  };
  const widget = node.addDOMWidget("status", "liteattention_status", box, {
    getValue: () => box.textContent.trim(),
    setValue: (text) => set(String(text ?? "")),
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => 3 * HEIGHT,
    hideOnZoom: false,
    serialize: false, // not sent to the server
  });
  widget.serialize = false; // not saved with the workflow
  shows.set(node, set);
  set(say(EMPTY));
}

app.registerExtension({
  name: "LiteAttention.Status",
  async setup() {
    await loadWords();
    api.addEventListener("liteattention.status", ({ detail }) => show(detail.node, detail.text));
    // A run that comes from ComfyUI's cache is told by the Report.
    api.addEventListener("executed", ({ detail }) => {
      const text = detail.output?.liteattention_status?.at(-1);
      const id = text && upstream(detail.display_node ?? detail.node);
      if (id) show(id, text);
    });
    // What a node said of an earlier run must not stand beside a run without it.
    api.addEventListener("execution_start", () =>
      each(root(), (id, node, off) => node.comfyClass === KIND && off && show(id, BYPASSED)),
    );
  },
  nodeCreated(node) {
    if (node.comfyClass === KIND) addStatus(node);
  },
  afterConfigureGraph() {
    each(root(), (id, node) => {
      const text = texts.get(`${root().id}/${id}`);
      if (text !== undefined && shows.has(node)) show(id, text);
    });
  },
});
