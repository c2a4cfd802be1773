// Shows the text of a LiteAttention Report or Compare on the node itself, after each run, and the
// Report's animation, which among the node's images would stand still.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { loadWords, say } from "./words.js";

// Our nodes, and their heights when there is something to show: text and pictures can be read.
const HEIGHTS = { LiteAttentionReport: 700, LiteAttentionCompare: 640 };
const NEW = [420, 350]; // width and height before that
const HEIGHT = 120; // pixels of the text, at least
const GAPS = 30; // pixels around text and animation, and between them
const EMPTY = "The result appears here after a run.";

const shows = new WeakMap(); // of each node: what shows an output on it

function makeText() {
  const text = document.createElement("textarea");
  text.className = "comfy-multiline-input";
  text.readOnly = true;
  text.placeholder = say(EMPTY);
  text.style.cssText =
    `width: 100%; min-height: ${HEIGHT}px; flex: 1; box-sizing: border-box; resize: none; ` +
    "font-family: monospace; white-space: pre-wrap;";
  return text;
}

// As wide as the node; hidden until it is loaded.
function makePicture() {
  const picture = document.createElement("img");
  picture.title = say("Click to open");
  picture.style.cssText = "display: none; width: 100%; cursor: pointer;";
  picture.onclick = () => window.open(picture.src);
  picture.onwheel = (event) => {
    event.stopPropagation();
    app.canvas.canvas.dispatchEvent(new WheelEvent("wheel", event)); // zooms, as elsewhere
  };
  return picture;
}

// Makes room for what is shown for the first time; what is below the node moves down with its end.
function grow(node, height) {
  const more = height - node.size[1];
  if (node.size[1] > NEW[1] || more <= 0) return;
  const [left, right] = [node.pos[0], node.pos[0] + node.size[0]];
  for (const other of node.graph?.nodes ?? []) {
    const beside = other.pos[0] >= right || other.pos[0] + other.size[0] <= left;
    if (beside || other.pos[1] <= node.pos[1]) continue;
    other.pos = [other.pos[0], other.pos[1] + more];
  }
  node.setSize([node.size[0], height]);
}

function addReport(node) {
  const text = makeText();
  const picture = makePicture();
  const showPicture = (shown) => {
    picture.style.display = shown ? "block" : "none";
    node.setDirtyCanvas(true, true);
  };
  picture.onload = () => showPicture(true);
  picture.onerror = () => showPicture(false); // ComfyUI deletes temporary files when it starts
  const shape = () => (picture.naturalWidth ? picture.naturalHeight / picture.naturalWidth : 0);

  const box = document.createElement("div");
  box.style.cssText = "width: 100%; height: 100%; display: flex; flex-direction: column; gap: 10px;";
  box.append(text, picture);
  const widget = node.addDOMWidget("report", "liteattention_report", box, {
    getValue: () => text.value,
    setValue: (value) => {
      text.value = value ?? "";
    },
    hideOnZoom: false, // the pictures are not hidden either
    getMinHeight: () => HEIGHT + GAPS + shape() * node.size[0],
    serialize: false, // not sent to the server
  });
  widget.serialize = false; // not saved with the workflow

  shows.set(node, (output) => {
    widget.value = say((output?.text ?? []).join("\n"));
    if (output?.images?.length) {
      grow(node, HEIGHTS[node.comfyClass]);
    } else {
      // Those of the run before; the front end leaves them where no new ones come.
      node.imgs = undefined;
      node.images = undefined;
    }
    const file = output?.liteattention_animation?.at(-1);
    if (file) {
      picture.src = api.apiURL(`/view?${new URLSearchParams(file)}`);
    } else {
      picture.removeAttribute("src");
      showPicture(false);
    }
  });
}

app.registerExtension({
  name: "LiteAttention.Report",
  setup: loadWords,
  nodeCreated(node) {
    if (!HEIGHTS[node.comfyClass]) return;
    addReport(node);
    node.setSize(NEW.map((side, i) => Math.max(side, node.size[i])));
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      shows.get(this)(output);
    };
  },
  // One comes back to a workflow that has run.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      shows.get(app.rootGraph.getNodeById(id))?.(output);
    }
  },
});
