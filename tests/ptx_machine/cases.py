"""A case is one call of the project's backend: is its result right, and was anything found?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .card import Card


class Case(NamedTuple):
    """``run`` returns what is wrong with the numbers: nothing, if all is well."""

    name: str
    run: Callable[[], list[str]]


class Outcome(NamedTuple):
    """Of one case: it has failed if there are problems."""

    name: str
    problems: list[str]


def outcomes(card: Card, cases: Iterable[Case]) -> Iterator[Outcome]:
    """Runs cases on the card, which has to be there."""
    for name, run in cases:
        card.take_findings()
        problems = run()
        yield Outcome(name, problems + card.take_findings())
