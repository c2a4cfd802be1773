"""Run the project's GPU kernels on the machine, compared with its own references.

    python -m tests.ptx_machine                    what is shipped as PTX, all sections
    python -m tests.ptx_machine attention tail     some sections
    python -m tests.ptx_machine --arch 90          sm_90's kernels, compiled when first needed
    python -m tests.ptx_machine --faults 6         are planted faults noticed? 6 of a kind a kernel

A case fails if a number is off by more than rounding allows or if the machine finds anything. Exit
code 1 if one did.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from . import builds, faults
from .card import SHIPPED, Card
from .cases import outcomes
from .sections import attention, companions, edges, maps

SECTIONS = {
    section.__name__: section
    for section in (
        *(
            attention.attention,
            attention.audits,
            attention.shapes,
            attention.many_heads,
            attention.bases,
        ),
        *(companions.quantised, companions.scaled, companions.tail),
        *(maps.tile_maps, maps.choices, maps.selftests),
        *(edges.refused, edges.unaligned, edges.padding, edges.not_numbers, edges.far),
    )
}


def run(names: list[str], capability: int) -> bool:
    """Some sections on one card; prints what fails. Returns whether nothing did."""
    card, start, passed, failed = Card(capability), time.monotonic(), 0, 0
    with card.there():
        for name in names:
            begun, before = time.monotonic(), (passed, failed)
            for case, problems in outcomes(card, SECTIONS[name](card)):
                passed, failed = passed + (not problems), failed + bool(problems)
                if problems:
                    print(f"FAIL {name}: {case}", *problems[:6], sep="\n     ", flush=True)
            took = time.monotonic() - begun
            good, bad = passed - before[0], failed - before[1]
            print(f"{name}: {good} pass, {bad} fail, {took:.0f} s", flush=True)
    ran = card.library.ran
    print(f"{len(ran)} kernels ran {sum(ran.values())} times, {len(card.not_run())} not at all")
    print(f"{passed} cases pass, {failed} fail, {time.monotonic() - start:.0f} s")
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--arch", type=int, nargs="+", default=[SHIPPED], help="cards: 80, 86, ...")
    parser.add_argument("--faults", type=int, metavar="N", help="plant faults instead")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    fine = True
    for arch in options.arch:
        if arch != SHIPPED:
            builds.prepare_all(arch)
        if options.faults:
            faults.campaign(Card(arch), options.faults)
        else:
            torch.manual_seed(0)
            fine &= run(options.sections or list(SECTIONS), arch)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
