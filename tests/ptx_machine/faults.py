"""Does the machine notice a fault? Plants some in PTX text, one at a time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch

from comfyui_liteattention.backends.gpu.kernel_table import KERNELS, Variant
from comfyui_liteattention.tiles import pack

from .card import SHIPPED, Card, MachinePrebuilt
from .cases import Outcome
from .findings import HangError
from .problems import DTYPES, problem, random_mask, shuffled, with_sink
from .sections.attention import attend, listed
from .sections.companions import add_skipped, audit_skipped, means, quantise
from .sections.maps import map_problems

Edit = Callable[[str], str]
#: Kernels of each kind to plant faults in.
KINDS = (
    *("d64_fp16_dense_plain", "d96_fp16_lists_mass", "d128_bf16_int8_fp16_lists_mass"),
    *("d64_bf16_quantise_queries", "d128_fp16_quantise_keys"),
    *("d64_bf16_add_skipped", "d96_fp16_audit_skipped"),
    *("mark_tiles_1", "list_tiles_1", "count_scores_1"),
)


def exercise(card: Card, name: str) -> list[str]:
    """What is wrong with a small call of one kernel."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    if isinstance(kernel, Variant):
        call = problem((1, 2), (140, 400), kernel.head_dim, DTYPES[kernel.dtype], seed=1)
        if kernel.criterion and not kernel.method.int8:
            call = with_sink(call)
        lists = listed(random_mask(call, 0.8, 1) if kernel.lists else None)
        call = call._replace(order=shuffled(140))
        mode = card.mode_of(kernel)
        assert mode is not None
        return attend(card, mode, call, lists, kernel.criterion)
    if (part := re.fullmatch(r"d(\d+)_(\w+?)_(quantise|add_|audit_)\w+", name)) is None:
        random = torch.Generator().manual_seed(1)
        score = -(torch.rand(1, 1, 2, 2100, generator=random) * 45)
        live = pack(torch.rand(score.shape, generator=random) < 0.6)
        return map_problems(card, score, live, torch.rand(2, 2100, generator=random) < 0.1)
    d, dtype = int(part[1]), DTYPES[part[2]]
    if part[3] == "quantise":
        return quantise(card, problem((2, 2), (100, 130), d, dtype, seed=1))
    check = add_skipped if part[3] == "add_" else audit_skipped
    call = problem((1, 2), (270, 64 * 110 + 3), d, dtype)
    return check(card, means(call._replace(order=shuffled(270)), 2), 2)


def noticed(name: str, edit: Edit, capability: int = SHIPPED) -> Outcome:
    """What of a fault in one kernel is noticed."""
    card = Card(capability, {name: edit})
    with card.there():
        try:
            problems = exercise(card, name)
        except (HangError, ValueError, AssertionError, NotImplementedError, IndexError) as error:
            problems = [f"[{type(error).__name__}] {error}"]
        return Outcome(name, problems + card.take_findings())


def each(pattern: str, new: Callable[[re.Match[str]], str]) -> Callable[[str], Iterator[Edit]]:
    """One fault for each match."""

    def faults(text: str) -> Iterator[Edit]:
        for match in re.finditer(pattern, text):
            start, end, other = match.start(), match.end(), new(match)
            if other != match[0]:
                yield lambda t, start=start, end=end, other=other: t[:start] + other + t[end:]

    return faults


def _moved(by: int) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{m[1]}[{m[2]}+{int(m[3] or 0) + by}]"


FAULTS = {
    "barrier taken out": each(r"\n\tbar\.sync \t0;", lambda m: "\n"),
    "wait put off": each(r"(cp\.async\.wait_group \t)(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};"),
    "shared load 16 bytes on": each(
        r"((?:ld\.shared|ldmatrix)[^\n;]*, )\[(%r\d+)(?:\+(\d+))?\]", _moved(16)
    ),
    "shared store 16 bytes on": each(r"(st\.shared[.\w]* \t)\[(%r\d+)(?:\+(\d+))?\]", _moved(16)),
    "< becomes <=": each(r"setp\.lt\.s32", lambda m: "setp.le.s32"),
    "guard taken away": each(r"\n\t@%p\d+ (ld|st|cp|red)", lambda m: f"\n\t{m[1]}"),
    "next parameter read": each(
        r"(ld\.param\.\w+ \t%\w+, \[\w+_param_)(\d+)\]", lambda m: f"{m[1]}{int(m[2]) + 1}]"
    ),
    "copy forgotten": each(r"\n\t(@%p\d+ )?cp\.async\.c[ag][^\n]*", lambda m: "\n"),
    "global store forgotten": each(r"\n\t(@%p\d+ )?st\.global[^\n]*", lambda m: "\n"),
    "wgmma's fence taken out": each(r"\n\tfence\.proxy[^\n]*", lambda m: "\n"),
    "wgmma's wait put off": each(
        r"(wgmma\.wait_group\.sync\.aligned )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};"
    ),
    "another lane": each(
        r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+, )(\d+)", lambda m: f"{m[1]}{int(m[2]) ^ 3}"
    ),
}


def campaign(card: Card, most: int) -> None:
    """At most so many faults of a kind in a kernel, evenly spread. What is missed has to be looked
    at: a fault may change nothing, or nothing that this call reads."""
    known = {kernel.name: kernel for kernel in KERNELS}
    archive = "ptx" if card.capability == SHIPPED else f"sm_{card.capability}"
    for kind, plant in FAULTS.items():
        tally: Counter[str] = Counter()
        begun = time.monotonic()
        for name in (name for name in KINDS if name in known):
            text = MachinePrebuilt().read(archive, known[name]).image.decode()
            found = list(plant(text))
            for edit in found[:: max(1, len(found) // most)]:
                problems = noticed(name, edit, card.capability).problems
                by = "the machine" if any(p.startswith("[") for p in problems) else "numbers only"
                tally[f"by {by}" if problems else f"missed in {name}"] += 1
        print(f"{kind}: {dict(tally)}, {time.monotonic() - begun:.0f} s", flush=True)


def must_be_noticed(text: str) -> dict[str, Edit]:
    """Faults in ``d64_fp16_dense_plain``, whose text this is, that no kernel may hide."""
    offset = re.search(r"st\.shared\.v4\.b32 \t\[(%r\d+)\+2048\]", text)
    assert offset is not None

    def instead(old: str, new: str, t: str) -> str:
        return t.replace(old, new, 1)

    def swap(first: int, second: int, t: str) -> str:
        total = first + second
        pattern = rf"_param_({first}|{second})\]"
        return re.sub(pattern, lambda m: f"_param_{total - int(m[1])}]", t)

    def last_barrier(t: str) -> str:
        place = t.rfind("\tbar.sync")
        return t[:place] + t[place + len("\tbar.sync \t0;") :]

    return {
        "a shared offset off by a row": partial(
            instead, offset[0], offset[0].replace("2048", "2064")
        ),
        "a shared offset off by 4": partial(instead, offset[0], offset[0].replace("2048", "2052")),
        "the last barrier taken out": last_barrier,
        "k and v swapped": partial(swap, 1, 2),
        "out and lse swapped": partial(swap, 3, 4),
        "q and out swapped": partial(swap, 0, 3),
        "a parameter of another size": partial(
            instead, ".param .u32 attend_tiles_param_19", ".param .u64 attend_tiles_param_19"
        ),
    }
