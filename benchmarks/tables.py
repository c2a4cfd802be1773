"""Write the tables of the docs from benchmarks/results: ``python -m benchmarks.tables``.

Each table stands between two comments that name it, so that no figure in it is typed by hand, and
none outlives the run that found it; a test compares the pages with the results.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from benchmarks import order_cost
from benchmarks.closeness import CALIBRATED, EXPERTS, WAYS
from benchmarks.sensitivity import noise_levels
from comfyui_liteattention.backends.gpu.archive import Prebuilt
from comfyui_liteattention.backends.gpu.kernel_table import METHODS, Variant
from comfyui_liteattention.budget.closeness import POWER, WITHIN, amplified, weights
from comfyui_liteattention.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

RIVALS = {
    "ours": "LiteAttention, budget",
    "upstream": "upstream's semantics (gap to the running maximum, fixed threshold)",
    "sol_attn": "Sol-Attn, chosen anew at every step",
    "sol_attn, 20 % dense start": "Sol-Attn with 20 % dense steps first",
}
CHANGES = {
    "ours": "as it is",
    "ours, no tail": "skipped tiles contribute nothing",
    "ours, raster order": "raster order in place of compact tiles",
    "ours, ramp 1": "ramp 1 in place of 2",
    "ours, no ramp": "no ramp",
    "ours, audit 16": "one tile in 16 audited",
    "ours, 20 % dense start": "20 % dense steps first",
}
PURPOSES = {
    "Safe": "final renders that must match",
    "Balanced": "everything else: start here",
    "Fast": "drafts, and picking a seed or a prompt",
}
ORDERS = {
    "compact": "compact (ours)",
    "Hilbert": "Hilbert curve",
    "blocks 4 x 4 x 4": "blocks of 4 x 4 x 4",
    "blocks 1 x 8 x 8": "blocks of 1 x 8 x 8",
    "raster": "raster, as models list them",
}


#: By compute capability; of PTX, which is for what has no machine code.
CARDS = {80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100", 100: "B200", 103: "B300"}
CARDS |= {120: "RTX 50", 121: "DGX Spark"}


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")


def filled(page: Path) -> str:
    """The text of a page, with every table written from the results."""
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=make(): m[1] + t + "\n" + m[2], text, flags=re.S)  # type: ignore[misc]
        if not found:
            raise SystemExit(f"{page.name} has no place for the table {name!r}")
    return text


def head_to_head() -> str:
    """Tiles to compute for a video of 35 and 40 dB, by seed."""
    found = _load("quality_cpu.json")["computed_fraction_at_goal_per_seed"]
    rows = [
        [title, *(" and ".join(map(_share, found[method][goal])) for goal in ("35.0", "40.0"))]
        for method, title in RIVALS.items()
    ]
    return _table(["method", "35 dB", "40 dB"], rows)


def at_35_db() -> str:
    """The head to head in a sentence."""
    found = _load("quality_cpu.json")["computed_fraction_at_goal_per_seed"]
    ours, upstream, sol = (
        " and ".join(map(_share, found[method]["35.0"]))
        for method in ("ours", "upstream", "sol_attn")
    )
    return (
        f"For a video at 35 dB, at 4,096 tokens and two held-out seeds, {ours} of the tiles are "
        f"computed; upstream's semantics need {upstream}, Sol-Attn {sol}."
    )


def changes() -> str:
    """What each part of ours is worth, at budgets of 3 and 10 %."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with (RESULTS / "quality_cpu.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["method"], row["setting"]
            found[key].append((float(row["computed_fraction"]), float(row["psnr_db"])))
    rows = []
    for method, title in CHANGES.items():
        means = [
            tuple(map(mean, zip(*found[method, f"budget {budget}"], strict=True)))
            for budget in ("3.0%", "10.0%")
        ]
        tiles = ", ".join(f"{computed:.1%}" for computed, _ in means)
        rows.append([title, tiles, ", ".join(f"{db:.1f}" for _, db in means) + " dB"])
    return _table(["", "tiles computed", "PSNR"], rows)


def ablation() -> str:
    """What parts are worth that no setting switches, at budgets of 3 and 10 %."""
    found = _by(_load("ablation_cpu.json")["rows"], "variant", "budget")
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in found):
        runs = [found[variant, budget] for budget in (0.03, 0.1)]
        tiles = ", ".join(f"{mean(r['computed_fraction'] for r in own):.1%}" for own in runs)
        psnr = ", ".join(f"{mean(r['psnr_db'] for r in own):.1f}" for own in runs)
        rows.append([variant, tiles, f"{psnr} dB"])
    return _table(["", "tiles computed", "PSNR"], rows)


def budget() -> str:
    """True loss over the budget, lowest and highest of the runs."""
    groups = _by(_load("budget_cpu.json")["rows"], "budget")
    rows = []
    for (allowed,), runs in sorted(groups.items()):
        ratios = [
            _range(run[key] / allowed for run in runs)
            for key in ("true_lost", "audited_lost", "worst_layer_lost")
        ]
        within = mean(run["cells_within_interval"] for run in runs)
        rows.append([f"{allowed:.1%}".replace(".0%", "%"), *ratios, f"{within:.0%}"])
    heads = ["budget", "true lost mass", "what the audit said", "the worst layer"]
    return _table([*heads, "truth within its 95 % interval"], rows)


def orders() -> str:
    """Token orders on a grid whose sides are no powers of two."""
    found = _load("orders_cpu.json")
    radius = found["radius"]["Wan 480p, 81 frames"]
    rows = []
    for order, title in ORDERS.items():
        means = [
            [
                mean(row[key] for row in found["rows"] if (row["order"], row["budget"]) == at)
                for key in ("computed_fraction", "psnr_db")
            ]
            for at in ((order, 0.03), (order, 0.1))
        ]
        tiles = ", ".join(f"{computed:.1%}" for computed, _ in means)
        closeness = ", ".join(f"{db:.1f}" for _, db in means) + " dB"
        rows.append([title, f"{radius[order]:.1f}", tiles, closeness])
    return _table(["order", "radius", "tiles computed", "PSNR"], rows)


def speed() -> str:
    """Our time over SDPA's by share of skipped tiles."""
    cases: dict[tuple[Any, ...], dict[tuple[str, float], float]] = defaultdict(dict)
    for row in _load("speed_cpu.json")["cpu"]:
        case = f"{row['tokens']:,}", str(row["head_dim"]), row["dtype"]
        cases[case][row["pattern"], row["skipped"]] = row["ratio"]["median"]
    shares = (0.0, 0.25, 0.5, 0.75, 0.9)
    rows = [
        [*case, *(f"{found['random', s]:.2f}" for s in shares), f"{found['band', 0.75]:.2f}"]
        for case, found in cases.items()
    ]
    heads = ["tokens", "head_dim", "dtype", *(f"{share:.0%}" for share in shares)]
    return _table([*heads, "band, 75 %"], rows)


def closeness() -> str:
    """The closeness of the presets at each number of steps, and how often the report was right."""
    groups = _by(_sampled(CALIBRATED), "preset", "steps")
    rows = [
        [f"*{preset}*", str(steps), *_came_out(videos)]
        for (preset, steps), videos in sorted(groups.items())
    ]
    return _table(["preset", "steps", *CAME_OUT], rows)


def other_ways() -> str:
    """The same for other schedules, guidance and samplers."""
    sampled = [row for row in _load("closeness_cpu.json")["rows"] if row["way"] != EXPERTS]
    groups = _by(sampled, "way", "preset", "steps")
    compared = {(preset, steps) for way, preset, steps in groups if way != CALIBRATED}
    rows = [
        [way, f"*{preset}*", str(steps), *_came_out(videos)]
        for (way, preset, steps), videos in groups.items()
        if (preset, steps) in compared
    ]
    rows.sort(key=lambda row: row[1])
    return _table(["sampled with", "preset", "steps", *CAME_OUT], rows)


def experts() -> str:
    """The same for two transformers that share the steps, and what the second one computes."""
    rows = [
        [
            f"*{preset}*",
            f"{steps // 2} + {steps // 2}",
            f"{mean(video['computed_by_second_expert'] for video in videos):.0%}",
            *_came_out(videos),
        ]
        for (preset, steps), videos in _by(_sampled(EXPERTS), "preset", "steps").items()
    ]
    return _table(["preset", "steps", "tiles of the second", *CAME_OUT], rows)


def _sampled(way: str) -> list[dict[str, Any]]:
    """Held-out videos that were sampled that way."""
    return [row for row in _load("closeness_cpu.json")["rows"] if row["way"] == way]


CAME_OUT = ("tiles computed", "PSNR", f"foreseen to {WITHIN:.0f} dB")


def _came_out(videos: list[dict[str, Any]]) -> list[str]:
    """The cells of ``CAME_OUT`` for some videos."""
    tiles = mean(video["computed_fraction"] for video in videos)
    psnr = sorted(video["psnr_db"] for video in videos)
    near = sum(abs(off) <= WITHIN for off in _deviations(videos))
    return [
        f"{tiles:.0%}",
        f"{psnr[0]:.1f} to {psnr[-1]:.1f} dB",
        f"{near} of {len(videos)}",
    ]


def within() -> str:
    """How many held-out videos came out as their reports had expected."""
    off = _deviations(_sampled(CALIBRATED))
    closer, farther = sum(x > WITHIN for x in off), sum(x < -WITHIN for x in off)
    return (
        f"Of the {len(off)} videos of the first table {len(off) - closer - farther} lie within "
        f"that range, {closer} came closer to the dense ones, and {farther or 'none'} less close."
    )


def guidance() -> str:
    """How far the estimate is off without and with guidance's factor, and on held-out videos."""
    groups = _by(_load("guidance_cpu.json")["rows"], "way")
    rows = []
    for (way,), videos in sorted(groups.items(), key=lambda group: WAYS[group[0][0]].guidance):
        off, strength = mean(_deviations(videos)), WAYS[way].guidance
        like = {(row["preset"], row["steps"]) for row in videos}
        held_out = [row for row in _sampled(way) if (row["preset"], row["steps"]) in like]
        without = off - 20 * math.log10(amplified(strength))
        cells = without, off, mean(_deviations(held_out))
        rows.append([f"{strength:.0f}", *(f"{x:+.1f} dB" for x in cells)])
    return _table(["guidance", "without the factor", "with it", "held-out videos, with it"], rows)


def _deviations(videos: list[dict[str, Any]]) -> list[float]:
    """True less estimated closeness of every video, dB."""
    return [video["psnr_db"] - video["predicted_db"] for video in videos]


def sensitivity() -> str:
    """The effect of an error at one step alone, beside the weight that the formula gives it."""
    levels = noise_levels(20)
    found: dict[int, list[float]] = defaultdict(list)
    for row in _load("sensitivity_cpu.json")["rows"]:
        step = row["step"]
        length = levels[step] - levels[step + 1]
        found[step].append(math.sqrt(row["mean_square_error"]) / row["lost_mass"] ** POWER / length)
    steps = sorted(found)
    weight = {step: weights(levels)[step] / (levels[step] - levels[step + 1]) for step in steps}
    means = {step: geometric_mean(found[step]) for step in steps}
    # Only proportions can be compared, so the means are scaled to the weights' level.
    unit = geometric_mean(means[step] / weight[step] for step in steps)
    rows = [
        [
            f"{levels[step + 1]:.2f}",
            _digits(means[step] / unit),
            f"{_digits(min(found[step]) / unit)} to {_digits(max(found[step]) / unit)}",
            _digits(weight[step]),
        ]
        for step in steps
    ]
    return _table(["noise level after it", "measured", "by seed", "1 / (1.05 - level)^2"], rows)


def presets() -> str:
    """What to expect of each preset, over all numbers of steps that were measured."""
    groups = _by(_sampled(CALIBRATED), "preset")
    rows = []
    for name, purpose in PURPOSES.items():
        videos = groups[name,]
        psnr = sorted(video["psnr_db"] for video in videos)
        tiles = [
            mean(video["computed_fraction"] for video in alike)
            for alike in _by(videos, "steps").values()
        ]
        found = [f"{psnr[0]:.0f} to {psnr[-1]:.0f} dB", f"{min(tiles):.0%} to {max(tiles):.0%}"]
        rows.append([f"**{name}**", f"{PRESETS[name].closeness:.0f} dB", *found, purpose])
    heads = [
        "preset",
        "PSNR asked for",
        "PSNR of the demo's videos",
        "tiles computed",
        "take it for",
    ]
    return _table(heads, rows)


def long_videos() -> str:
    """Seconds of whole videos, dense and with the presets."""
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in _load("long_cpu.json")["rows"]:
        found[row["tokens"], row["steps"]][row["way"]] = row
    names = [name for name in PURPOSES if all(name in ways for ways in found.values())]
    rows = []
    for (tokens, steps), ways in sorted(found.items()):
        dense = ways["dense"]["seconds"]
        taken = [
            f"{way['seconds']:.0f} s, {dense / way['seconds']:.2f}x, {way['psnr_db']:.0f} dB"
            for way in map(ways.__getitem__, names)
        ]
        rows.append([f"{tokens:,}", str(steps), f"{dense:.0f} s", *taken])
    return _table(["tokens", "steps", "dense", *(f"*{name}*" for name in names)], rows)


def archives() -> str:
    """What is prebuilt for which card, and the driver that takes it."""
    found = Prebuilt().manifest["archives"]
    without = [CARDS[arch] for arch in CARDS if arch not in {a["arch"] for a in found.values()}]
    rows = [
        [
            f"`{name}`",
            ", ".join([*without, "newer ones"]) if name == "ptx" else CARDS[archive["arch"]],
            str(len(archive["kernels"])),
            " and ".join(sorted({entry["ptxas"] for entry in archive["kernels"].values()})),
            str(archive["driver"]),
        ]
        for name, archive in found.items()
    ]
    return _table(["archive", "cards", "kernels", "assembler", "driver"], rows)


def modes() -> str:
    """What the assembler made of each mode, by card: head_dim 128, bf16, a list, the mass score."""
    found = _load("kernels.json")
    rows = []
    for mode, (name, archive) in product(METHODS, Prebuilt().manifest["archives"].items()):
        method = METHODS[mode].get(archive["arch"])
        if name == "ptx" or method is None:
            continue
        kernel = found[f"{name}/{Variant(128, 'bf16', True, 'mass', method).name}"]
        loop = [str(kernel["loop"]), f"{kernel['over_dense']:+.1%}"]
        memory = f"{kernel['shared'] / 1024:.0f} KiB"
        rows.append([f"`{mode}`", f"`{name}`", str(kernel["registers"]), *loop, memory])
    heads = ["mode", "archive", "registers", "loop", "over dense", "shared memory"]
    return _table(heads, rows)


def accuracy() -> str:
    """Error of the modes by kind of input."""
    rows = _load("low_precision.json")["rows"]
    lines = [
        [row["inputs"], str(row["head_dim"]), *(f"{e:.2%}" for e in row["error"].values())]
        for row in rows
    ]
    return _table(["inputs", "head_dim", *rows[0]["error"]], lines)


def before_attention() -> str:
    """What a card does before the attention, by data sheet, with half of the tiles computed."""
    heads = ["card", "mode"]
    for tokens in order_cost.TOKENS:
        heads += [f"{tokens:,} tokens: as built", "passes apart"]
    rows = order_cost.rows(0.5)
    lines = [[card, f"`{mode}`", *(f"{s:.1%}" for s in shares)] for card, mode, shares in rows]
    return _table(heads, lines)


#: The pages, the places in them by name, and what fills them.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    DOCS / "measured.md": {
        "head to head": head_to_head,
        "changes": changes,
        "ablation": ablation,
        "budget": budget,
        "orders": orders,
        "speed": speed,
    },
    DOCS / "closeness.md": {
        "closeness": closeness,
        "guidance": guidance,
        "experts": experts,
        "within": within,
        "other ways": other_ways,
        "sensitivity": sensitivity,
    },
    ROOT / "README.md": {"long videos": long_videos, "at 35 dB": at_35_db, "presets": presets},
    ROOT / "kernels" / "README.md": {
        "archives": archives,
        "modes": modes,
        "accuracy": accuracy,
        "before": before_attention,
    },
}


def _by(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that have the same values under these keys, together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
