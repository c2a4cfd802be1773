// Shows the text of a LiteAttention Report or Compare on the node itself, after each run.
import { app } from "../../scripts/app.js";

const NODES = ["LiteAttentionReport", "LiteAttentionCompare"];
const HEIGHT = 200; // pixels, at least
const SIZE = [420, 640]; // of a new node: text and pictures can be read
const EMPTY = "The result appears here after a run.";

function addText(node) {
  const box = document.createElement("textarea");
  box.className = "comfy-multiline-input";
  box.readOnly = true;
  box.placeholder = EMPTY;
  box.style.cssText =
    `width: 100%; height: 100%; min-height: ${HEIGHT}px; box-sizing: border-box; resize: none; ` +
    "font-family: monospace; white-space: pre-wrap;";
  const widget = node.addDOMWidget("report", "liteattention_report", box, {
    getValue: () => box.value,
    setValue: (text) => {
      box.value = text ?? "";
    },
    getMinHeight: () => HEIGHT,
    serialize: false, // not sent to the server
  });
  widget.serialize = false; // not saved with the workflow
  return widget;
}

app.registerExtension({
  name: "LiteAttention.Report",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const widget = addText(node);
    node.setSize(SIZE.map((side, i) => Math.max(side, node.size[i])));
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      widget.value = (output?.text ?? []).join("\n");
    };
  },
});
