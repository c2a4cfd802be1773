"""Every node has help and names in English and Chinese, where ComfyUI's browser page looks."""

import json
import re
import urllib.request

import pytest
import torch

from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.report.compare import text_table as compare_table
from comfyui_liteattention.report.statistics import CallStats, RunReport
from comfyui_liteattention.report.table import text_table as report_table
from demo.comfy_server import REPOSITORY

NODES = (
    "LiteAttentionBudget",
    "LiteAttentionCompare",
    "LiteAttentionPatch",
    "LiteAttentionReport",
    "LiteAttentionThreshold",
)
LANGUAGES = ("en", "zh")
WEB = REPOSITORY / "web"
SCRIPTS = ("liteattention", "status")
EVENT = "liteattention.status"

each_node = pytest.mark.parametrize("node", NODES)
each_language = pytest.mark.parametrize("language", LANGUAGES)


def page(node, language):
    return REPOSITORY / "web" / "docs" / node / f"{language}.md"


def inputs_of(info):
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def read(server, path):
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=30) as reply:
        return reply.read().decode()


@pytest.fixture(scope="module")
def translations(server):
    return server.get("/i18n")


def test_these_are_all_our_nodes(object_info):
    ours = [n for n, i in object_info.items() if i["python_module"] == "custom_nodes.liteattention"]
    assert sorted(ours) == sorted(NODES)


@each_language
@each_node
def test_the_page_is_served_and_names_every_input_and_output(node, language, server, object_info):
    # The path that the page asks for: /extensions/PACK/docs/NODE/LANGUAGE.md
    text = read(server, f"/extensions/liteattention/docs/{node}/{language}.md")
    assert text == page(node, language).read_text(encoding="utf-8")
    for name in inputs_of(object_info[node]):
        assert name in text
    for name in object_info[node]["output_name"]:
        assert name in text or name == "MODEL"


@each_language
@each_node
def test_both_languages_have_the_same_parts(node, language):
    lines, english = (
        page(node, x).read_text(encoding="utf-8").splitlines() for x in (language, "en")
    )
    for start in ("# ", "## ", "| ", "* "):
        count = [sum(line.startswith(start) for line in text) for text in (lines, english)]
        assert count[0] == count[1]
    for line in lines:
        assert not line.startswith("|") or line.endswith("|")


@each_node
def test_english_names_and_tooltips_are_those_of_the_node(node, translations, object_info):
    """The page prefers the locale file, so that a forgotten change there would hide the node's."""
    info, entry = object_info[node], translations["en"]["nodeDefs"][node]
    assert entry["display_name"] == info["display_name"]
    assert entry["description"] == info["description"]
    tooltips = {name: declared[1]["tooltip"] for name, declared in inputs_of(info).items()}
    assert {name: i["tooltip"] for name, i in entry["inputs"].items()} == tooltips
    assert [o["tooltip"] for o in entry["outputs"].values()] == info["output_tooltips"]


@each_node
def test_chinese_names_everything(node, translations):
    english, chinese = (translations[x]["nodeDefs"][node] for x in LANGUAGES)
    assert chinese["display_name"].startswith("LiteAttention")
    assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese["description"])
    for part in ("inputs", "outputs"):
        assert list(chinese[part]) == list(english[part])
        for entry in chinese[part].values():
            assert entry["name"]
            assert any("\u4e00" <= letter <= "\u9fff" for letter in entry["tooltip"])


@each_language
def test_the_files_are_the_ones_that_the_server_merged(language, translations):
    path = REPOSITORY / "locales" / language / "nodeDefs.json"
    ours = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(ours) == sorted(NODES)
    assert {node: translations[language]["nodeDefs"][node] for node in NODES} == ours


@pytest.mark.parametrize("script", ["liteattention.js", "status.js", "words.js"])
def test_the_page_loads_our_scripts(script, server):
    assert f"/extensions/liteattention/{script}" in server.get("/extensions")
    text = read(server, f"/extensions/liteattention/{script}")
    assert text == (REPOSITORY / "web" / script).read_text(encoding="utf-8")


def test_the_scripts_know_our_nodes_and_events():
    report, status = ((REPOSITORY / "web" / f"{n}.js").read_text() for n in SCRIPTS)
    for name in ("LiteAttentionReport", "LiteAttentionCompare", "liteattention_animation"):
        assert name in report
    for name in ("LiteAttentionPatch", EVENT, "liteattention_status"):
        assert name in status


def test_chinese_words_fill_in_what_the_english_ones_do(server):
    words = json.loads(read(server, "/extensions/liteattention/zh.json"))
    for english, chinese in words.items():
        assert english.count("...") == chinese.count("..."), english
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)


def test_what_a_node_says_is_known_in_chinese():
    """The lines of :mod:`report.statistics`, part by part."""
    words = json.loads((WEB / "zh.json").read_text(encoding="utf-8"))
    patterns = [re.escape(english).replace(r"\.\.\.", "(.+)") for english in words]
    for text in (
        "step 3/20: 36% skipped, 0.63% lost, saved about 3.1 s",
        "36% skipped, lost 2.1 of 3 %, attention 1.52x, cost about 2 s",
        "12% skipped, lost 2.1 %, nothing saved",
    ):
        for part in text.removeprefix("step 3/20: ").split(", "):
            assert any(re.fullmatch(pattern, part) for pattern in patterns), part


def test_tables_and_notes_are_known_in_chinese():
    """The heads of the columns, and the lines around them."""
    words = json.loads((WEB / "zh.json").read_text(encoding="utf-8"))
    patterns = [re.escape(english).replace(r"\.\.\.", "(.+)") for english in words]
    calls = tuple(CallStats(step, "0", "positive", 64, 5, 9, 0.1, 0.2, 0.5) for step in (0, 1))
    seconds = {0: 1.0, 1: 1.0}
    report = RunReport("balanced", "cpu", 2, 2.0, seconds, calls, {}, (), dense_rate=0.1)
    video = torch.rand(2, 16, 16, 3)
    for table in (report_table(report), compare_table(compare(video, video.flip(0)))):
        heads = [line for line in table.split("\n") if line[:1].isalpha() and "  " in line]
        assert heads
        cells = {cell for line in heads for cell in re.split(r" {2,}", line)}
        unknown = {c for c in cells if not any(re.fullmatch(p, c) for p in patterns)}
        assert {c for c in unknown if not c[0].isdigit()} <= {"PSNR", "SSIM", "LPIPS"}
