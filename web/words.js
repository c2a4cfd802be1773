// Words for people who use ComfyUI in Chinese. What LiteAttention says is English, in the log and in
// the nodes' outputs; on the page it is put into the reader's language by the list in zh.json, where
// "..." stands for whatever is there.
import { app } from "../../scripts/app.js";

let patterns = []; // [regular expression, translation], those with the longest beginning first

const ONE = "((?:(?!, |; ).)+?)";

export function isChinese() {
  const setting = app.extensionManager?.setting ?? app.ui.settings;
  const locale = setting.get?.("Comfy.Locale") ?? setting.getSettingValue?.("Comfy.Locale");
  return locale === "zh";
}

let loading = null;

// Once, for whoever asks.
export function loadWords() {
  loading ??= load();
  return loading;
}

async function load() {
  const reply = await fetch(new URL("./zh.json", import.meta.url));
  if (!reply.ok) return;
  const words = Object.entries(await reply.json());
  const beginning = (english) => english.split("...")[0].length;
  words.sort(([a], [b]) => beginning(b) - beginning(a) || b.length - a.length);
  patterns = words.map(([english, chinese]) => [pattern(english), chinese]);
}

// Every line of a text, each in Chinese as far as it is known. What is "your own" to a Python program
// is ComfyUI's to who looks at a node.
export function say(text) {
  if (!isChinese()) return text.replaceAll("your own attention", "ComfyUI's attention");
  return text.split("\n").map(translated).join("\n");
}

function pattern(english) {
  const parts = english.split("...").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  // What begins with anything is one part of a list, not several.
  if (parts[0] === "" && parts.length > 1) return new RegExp(`^${ONE}${parts.slice(1).join("(.+?)")}$`);
  return new RegExp(`^${parts.join("(.+?)")}$`);
}

function translated(text) {
  const indent = text.match(/^\s*/)[0];
  const bare = text.trim();
  // A list whose parts are known is read part by part; else "..." might take several of them.
  const list = row(bare) ?? listed(bare);
  if (list !== null) return indent + list;
  return indent + (known(bare) ?? bare);
}

function known(text) {
  for (const [english, chinese] of patterns) {
    const found = text.match(english);
    if (!found) continue;
    const values = found.slice(1).map(translated);
    return chinese.replaceAll("...", () => values.shift());
  }
  return null;
}

// A row of a table, each cell ending where it did: those above and below stay where they are.
function row(text) {
  const cells = [...text.matchAll(/\S+(?: \S+)*/g)];
  const words = cells.map(([cell]) => known(cell));
  if (cells.length < 2 || words.every((word) => word === null)) return null;
  let line = words[0] ?? cells[0][0];
  cells.slice(1).forEach(({ 0: cell, index }, i) => {
    const word = words[i + 1] ?? cell;
    line += " ".repeat(Math.max(1, index + cell.length - columns(line) - columns(word))) + word;
  });
  return line;
}

// How many columns of a font of one width a text takes: Chinese letters take two.
function columns(text) {
  return [...text].reduce((sum, letter) => sum + (letter > "\u2e80" ? 2 : 1), 0);
}

function listed(text) {
  for (const [mark, comma] of [["; ", "；"], [", ", "，"]]) {
    const parts = text.split(mark);
    if (parts.length > 1 && known(text) === null) {
      const words = parts.map((part) => listed(part) ?? known(part));
      if (words.some((one) => one !== null)) {
        return words.map((one, i) => one ?? parts[i]).join(comma);
      }
    }
  }
  return null;
}
