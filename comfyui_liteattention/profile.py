"""Profiles: what runs learned, so that later runs don't have to learn it again.

A profile holds the ratio of loss to bound (budget.py) of every layer in every part of the run, and
tells for which model it was made and how. Files of them: profile_file.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .learning import PHASES, RATIOS, Audit, learn
from .tiles import TileShape

if TYPE_CHECKING:
    from .report import RunReport

MAX_LAYERS = 1000
MAX_NAME = 200


class Fingerprint(NamedTuple):
    """What a model and its kernel must have in common with those of the profile.

    ``layers``: number of self-attention layers of one transformer; ``heads``, ``head_dim``: those
    of its first layer; ``tile_q``, ``tile_k``: rows and columns of a tile, on whose size the bound
    depends.
    """

    layers: int
    heads: int
    head_dim: int
    tile_q: int
    tile_k: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads of {self.head_dim}, "
            f"tiles of {self.tile_q} x {self.tile_k}"
        )


@dataclass(frozen=True, repr=False)
class Profile:
    """``ratios[i][phase]``, float32: loss over bound of the layer ``layers[i]``. The rest tells how
    it was made; ``name`` is for people, and not saved."""

    layers: tuple[str, ...]
    ratios: tuple[tuple[float, ...], ...]
    model: Fingerprint
    budget: float
    ramp: float
    tokens: int
    steps: int
    backend: str
    computed_fraction: float
    lost_mass: float | None
    name: str = field(default="of a run", compare=False)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(f"LiteAttention: the profile's {problem}.")

    def __repr__(self) -> str:
        return self.name

    def ratios_of(self, layer: str) -> tuple[float, ...] | None:
        """What it knows of a layer, ``[PHASES]``."""
        return self.ratios[self.layers.index(layer)] if layer in self.layers else None

    def misfit(self, found: Fingerprint, complete: bool) -> str | None:
        """Why it is of no use for a model, or None. ``complete``: all layers have been seen."""
        more, fewer = found.layers > self.model.layers, found.layers < self.model.layers
        if found[1:] == self.model[1:] and not more and not (fewer and complete):
            return None
        here = str(found) if complete else f"at least {found}"
        return f"profile {self.name} ignored: it was made for {self.model}; here are {here}"


def fingerprint(layers: int, heads: int, head_dim: int, tile: TileShape) -> Fingerprint:
    return Fingerprint(layers, heads, head_dim, tile.q, tile.k)


def make(
    audits: Iterable[Audit], report: RunReport, model: Fingerprint, budget: float, ramp: float
) -> Profile | None:
    """The profile of a run, from its audits and its report; None if it learned nothing."""
    # A run never fails for what it learned: leave out what no file could hold.
    sound = (a for a in audits if math.isfinite(a.lost) and _is_name(a.layer))
    learned = dict(islice(learn(sound).items(), MAX_LAYERS))
    if not learned:
        return None
    # As float32, as in the file.
    ratios = torch.tensor(list(learned.values()), dtype=torch.float32, device="cpu")
    rows = tuple(map(tuple, ratios.tolist()))
    return Profile(tuple(learned), rows, model, float(budget), float(ramp), **_achieved(report))


def join(profiles: Sequence[Profile], report: RunReport) -> Profile | None:
    """One profile of transformers that took turns in one run, whose layers have other names."""
    if not profiles:
        return None
    return replace(
        profiles[0],
        layers=tuple(name for profile in profiles for name in profile.layers),
        ratios=tuple(ratios for profile in profiles for ratios in profile.ratios),
        **_achieved(report),
    )


def learned_in(report: RunReport | None) -> Profile:
    """What a run learned; ValueError says why there is nothing."""
    if report is None or report.learned is None:
        raise ValueError(
            "LiteAttention: there is nothing to save yet. A profile comes from a run with a budget "
            "(or a preset) in which tiles were skipped."
        )
    return report.learned


def _achieved(report: RunReport) -> dict[str, Any]:
    lost = report.lost_mass_mean
    return {
        "tokens": report.tokens,
        "steps": int(report.steps),
        "backend": report.backend,
        # Audits can bring it above 1.
        "computed_fraction": min(report.computed_fraction, 1.0),
        "lost_mass": lost if lost is None or math.isfinite(lost) else None,
    }


def _problems(p: Profile) -> Iterator[str]:
    if not 0 < len(p.layers) <= MAX_LAYERS or not all(map(_is_name, p.layers)):
        yield f"layers must be 1 to {MAX_LAYERS} names"
    if len(set(p.layers)) < len(p.layers):
        yield "layers must have different names"
    if len(p.ratios) != len(p.layers) or any(len(row) != PHASES for row in p.ratios):
        yield f"ratios must be {PHASES} for each layer"
    if not all(RATIOS[0] <= ratio <= RATIOS[1] for row in p.ratios for ratio in row):
        yield f"ratios must lie between {RATIOS[0]} and {RATIOS[1]}"
    if not all(_whole(number, 1, 1 << 16) for number in p.model):
        yield "model must be positive whole numbers"
    if not all(_whole(number, 0, 1 << 40) for number in (p.tokens, p.steps)):
        yield "tokens and steps must be whole numbers"
    lost = 0.0 if p.lost_mass is None else p.lost_mass
    if not all(_between(number, 0, 1) for number in (p.budget, p.computed_fraction, lost)):
        yield "budget, computed_fraction and lost_mass must lie between 0 and 1"
    if not _between(p.ramp, 0, 8):
        yield "ramp must lie between 0 and 8"
    if not _is_name(p.backend):
        yield "backend must be a name"


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()


def _whole(number: Any, least: int, most: int) -> bool:
    return type(number) is int and least <= number <= most


def _between(number: Any, least: float, most: float) -> bool:
    return type(number) in (int, float) and least <= number <= most
