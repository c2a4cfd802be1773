"""What was found, as tables for people and as one line for an issue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Found = dict[str, dict[str, Any]]


def tables(found: Found) -> str:
    """All sections."""
    parts = [f"{title}\n{render(found[name])}" for name, title, render in _PARTS if name in found]
    return "\n\n".join(parts)


def line(found: Found) -> str:
    """One line that can be pasted into an issue."""
    about = found["installed"]
    parts = [about.get("card", "no card"), f"torch {about.get('torch')}", about.get("package", "")]
    parts.append(f"self-tests {_verdict(found.get('selftests', {}))}")
    rows = found.get("accuracy", {}).get("rows", [])
    for mode in _modes(rows):
        errors = [row["error"][mode] for row in rows if isinstance(row["error"].get(mode), float)]
        if errors:
            parts.append(f"{mode} error up to {max(errors):.2%}")
    parts += [
        f"{row['preset']} {row['psnr_db']:.1f} dB"
        for row in found.get("demo", {}).get("rows", [])
        if row.get("preset") and "psnr_db" in row
    ]
    parts += [_speed_in_short(*key, rows) for key, rows in _by_case(found.get("speed", {})).items()]
    parts += [f"{name} failed" for name, section in found.items() if "failed" in section]
    return " | ".join(filter(None, parts))


def _speed_in_short(mode: str, tokens: int, rows: dict[str, dict[str, Any]]) -> str:
    """Our dense and whole calls against the fastest rival."""
    rivals = rows["dense"]["ratio"]
    if not rivals:
        return f"{mode} {tokens}: dense {rows['dense']['ms']:.1f} ms"
    best = max(rivals, key=rivals.__getitem__)  # the one that our dense call is slowest against
    told = [f"{name} {rows[name]['ratio'][best]:.2f}" for name in rows if _of_a_user(name)]
    return f"{mode} {tokens}, of {best}: {', '.join(told)}"


def _of_a_user(call: str) -> bool:
    return call == "dense" or call.endswith("whole")


def _verdict(section: dict[str, Any]) -> str:
    results = section.get("results", {})
    failed = {name: reason for name, reason in results.items() if reason is not None}
    if not results:
        return "not run"
    return "pass" if not failed else f"fail: {'; '.join(f'{n}: {r}' for n, r in failed.items())}"


def _modes(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["error"]))


def _by_case(section: dict[str, Any]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """Rows of the speed section by mode and tokens, then by call."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in section.get("rows", []):
        cases.setdefault((row["mode"], row["tokens"]), {})[row["call"]] = row
    return cases


def _plain(section: dict[str, Any]) -> str:
    return "\n".join(f"  {key:<22} {_value(value)}" for key, value in section.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) or "none"
    return str(value)


def _selftests(section: dict[str, Any]) -> str:
    results = section.get("results", {})
    lines = [f"  {name:<34} {reason or 'pass'}" for name, reason in results.items()]
    return "\n".join(lines) or _plain(section)


def _accuracy(section: dict[str, Any]) -> str:
    rows = section.get("rows")
    if not rows:
        return _plain(section)
    names = _modes(rows)
    lines = [_cells("  relative error, %", 42, names)]
    for row in rows:
        errors = (row["error"].get(name) for name in names)
        shown = [f"{100 * e:.2f}" if isinstance(e, float) else "-" for e in errors]
        head = f"  {row['dtype']}, head_dim {row['head_dim']}, {row['inputs']}"
        lines.append(_cells(head, 42, shown))
    return "\n".join(lines)


def _demo(section: dict[str, Any]) -> str:
    if "rows" not in section:
        return _plain(section)
    lines = [f"  {section['host']}, {section['steps']} steps"]
    for row in section["rows"]:
        name = row["preset"] or "dense again"
        if "left_out" in row:
            lines.append(f"  {name:<14} {row['left_out']}")
            continue
        told = f"{row['psnr_db']:6.1f} dB  {row['seconds']:7.2f} s"
        if "computed" in row:
            told += f"  {row['computed']:.1%} of the tiles, {row['backend']}"
        lines.append(f"  {name:<14} {told}")
    return "\n".join(lines)


def _speed(section: dict[str, Any]) -> str:
    lines = []
    for (mode, tokens), rows in _by_case(section).items():
        lines.append(f"  {mode}, {tokens} tokens")
        for name, row in rows.items():
            against = ", ".join(f"{other} {x:.2f}" for other, x in row["ratio"].items())
            times = f"{row['ms']:9.2f} ms {row['tflops']:7.1f} TFLOPS"
            lines.append(f"    {name:<20} {times}  time / theirs: {against or '-'}")
    lines += [f"  left out: {what}: {why}" for what, why in section.get("left_out", {}).items()]
    return "\n".join(lines) or _plain(section)


def _cells(head: str, width: int, cells: Iterable[str]) -> str:
    return f"{head:<{width}}" + "".join(f"{cell:>20}" for cell in cells)


_PARTS = (
    ("installed", "Installed", _plain),
    ("selftests", "Self-tests", _selftests),
    ("accuracy", "Accuracy against float64", _accuracy),
    ("demo", "The demo, PSNR to its dense video", _demo),
    ("speed", "Speed", _speed),
)
