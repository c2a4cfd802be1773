"""The demo's stand-in for a text encoder: a frozen random table of word and slot embeddings.

A prompt is one or two clauses "COLOUR SHAPE moving DIRECTION" joined by "and". The content words go
to fixed slots, the rest are fillers:

    slot    0       1      2          3      4       5      6          7
    word    colour  shape  direction  "and"  colour  shape  direction  (always pad)

Every slot is filled (with "pad" where there is nothing), so all prompts, and the null text that
guidance needs, have the same length of 8 tokens and can share a batch. Cross-attention does not see
the order of text tokens; therefore a token is the sum of a word vector and a slot vector.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .videos import COLOURS, DIRECTIONS, SHAPES, Scene

TEXT_DIM = 4096
SLOTS = 8
SLOTS_PER_CLAUSE = 4
PAD = "pad"
JOIN = "and"
FILLERS = ("a", "an", "the", "moving", "going", "flying")
WORDS = (PAD, JOIN, *COLOURS, *SHAPES, *DIRECTIONS)
INDEX = {word: i for i, word in enumerate(WORDS)}
EXAMPLE = "red circle moving right and blue square moving up"
TABLE_SEED = 20251109


class PromptError(ValueError):
    """A prompt that the demo's small vocabulary cannot express."""


def describe_vocabulary() -> str:
    return (
        f"colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
        f"directions: {', '.join(DIRECTIONS)}; also: {JOIN}, {', '.join(FILLERS)}. "
        f'Example: "{EXAMPLE}". An empty prompt is the null text.'
    )


def parse_prompt(prompt: str) -> list[int]:
    """Prompt -> 8 word indices; the empty prompt gives all pads (the null text)."""
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    unknown = sorted({w for w in words if w not in INDEX and w not in FILLERS} | {PAD} & {*words})
    if unknown:
        raise PromptError(
            f"the demo model does not know: {', '.join(unknown)}. It knows {describe_vocabulary()}"
        )
    words = [w for w in words if w not in FILLERS]
    slots = [INDEX[PAD]] * SLOTS
    if not words:
        return slots
    clauses = " ".join(words).split(f" {JOIN} ")
    if len(clauses) > 2:
        raise PromptError(
            f"the demo model draws one or two shapes. It knows {describe_vocabulary()}"
        )
    for position, clause in enumerate(clauses):
        for offset, word in enumerate(parse_clause(clause)):
            slots[SLOTS_PER_CLAUSE * position + offset] = INDEX[word]
    if len(clauses) == 2:
        slots[SLOTS_PER_CLAUSE - 1] = INDEX[JOIN]
    return slots


def parse_clause(clause: str) -> tuple[str, str, str]:
    """ "red circle right" -> ("red", "circle", "right"); exactly one word of each kind."""
    words = clause.split()
    kinds = [[w for w in words if w in kind] for kind in (COLOURS, SHAPES, DIRECTIONS)]
    if any(len(found) != 1 for found in kinds) or len(words) != 3:
        raise PromptError(
            f'"{clause}" needs one colour, one shape and one direction. '
            f"The demo model knows {describe_vocabulary()}"
        )
    return kinds[0][0], kinds[1][0], kinds[2][0]


def caption(scene: Scene) -> torch.Tensor:
    """Scene of B videos -> word indices [B, 8], the inverse of what `parse_prompt` reads."""
    first_colour = INDEX[next(iter(COLOURS))]
    first_shape = first_colour + len(COLOURS)
    first_direction = first_shape + len(SHAPES)
    slots = torch.full((scene.count.shape[0], SLOTS), INDEX[PAD])
    two = scene.count == 2
    for i in range(2):
        drawn = two if i else torch.ones_like(two)
        clause = (
            first_colour + scene.colour[:, i],
            first_shape + scene.shape[:, i],
            first_direction + scene.direction[:, i],
        )
        for offset, words in enumerate(clause):
            column = SLOTS_PER_CLAUSE * i + offset
            slots[:, column] = torch.where(drawn, words, slots[:, column])
    slots[:, SLOTS_PER_CLAUSE - 1] = torch.where(two, INDEX[JOIN], INDEX[PAD])
    return slots


def make_table(seed: int = TABLE_SEED) -> dict[str, torch.Tensor]:
    """The frozen table: "words" [22, 4096] and "slots" [8, 4096], fp16, unit variance each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(len(WORDS), TEXT_DIM, generator=generator)
    slots = torch.randn(SLOTS, TEXT_DIM, generator=generator)
    return {"words": words.half(), "slots": slots.half()}


def embed(slots: torch.Tensor, table: dict[str, torch.Tensor]) -> torch.Tensor:
    """Word indices [B, 8] -> text tokens [B, 8, 4096] float32, unit variance."""
    words = table["words"].float()[slots]
    return (words + table["slots"].float()) * 2**-0.5


def embed_prompts(prompts: list[str], table: dict[str, torch.Tensor]) -> torch.Tensor:
    """B prompts -> text tokens [B, 8, 4096] float32."""
    return embed(torch.tensor([parse_prompt(prompt) for prompt in prompts]), table)


def load_table(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the table that `demo.train` wrote beside the weights."""
    from safetensors.torch import load_file

    return load_file(str(path))
