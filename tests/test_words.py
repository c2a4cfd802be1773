"""What a Chinese page makes of what LiteAttention says: web/words.js itself, run by Node."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from comfyui_liteattention.report.compare import compare, text_table

WEB = Path(__file__).resolve().parents[1] / "web"
NODE = shutil.which("node")
#: In place of what a browser and ComfyUI's page have.
PAGE = """
import fs from "node:fs";
const app = { extensionManager: { setting: { get: () => "zh" } } };
globalThis.fetch = async () => ({ ok: true, json: async () => JSON.parse(process.argv[2]) });
"""


@pytest.fixture
def in_chinese(tmp_path):
    if NODE is None:
        pytest.skip("needs Node")
    script = re.sub(r"^import .*$", "", (WEB / "words.js").read_text(encoding="utf-8"), flags=re.M)
    end = 'await loadWords();\nprocess.stdout.write(say(fs.readFileSync(0, "utf-8")));\n'
    (tmp_path / "words.mjs").write_text(f"{PAGE}{script}\n{end}", encoding="utf-8")
    words = json.dumps(json.loads((WEB / "zh.json").read_text(encoding="utf-8")))

    def say(text):
        command = [NODE, str(tmp_path / "words.mjs"), words]
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
        assert not done.stderr
        return done.stdout

    return say


def test_rows_of_a_table_keep_their_columns(in_chinese):
    one = torch.rand(3, 16, 16, 3)
    other = one.clone()
    other[1] += 0.1
    *_, heads, first, second, third = in_chinese(text_table(compare(one, other))).split("\n")
    assert heads.split() == ["帧", "PSNR", "SSIM"]
    assert first.split() == ["0", "完全相同", "1.0000"]
    assert third.split() == ["2", "完全相同", "1.0000"]
    ends = {line.rindex(line.split()[-1]) + wide(line) for line in (first, second, third)}
    assert len(ends) == 1


def wide(line):
    """Chinese letters take two columns."""
    return sum(letter > "\u2e80" for letter in line)


def test_the_line_of_a_node(in_chinese):
    said = in_chinese("switched off: your own attention is faster here")
    assert said.startswith("已自动关闭")
    assert said.endswith("ComfyUI 自带的注意力在这里更快")
    assert in_chinese("waiting: your own attention is still faster").startswith("等待中")
    assert in_chinese("what nobody has translated") == "what nobody has translated"
