"""Profiles: what a run learns, the files, and runs that start with one."""

import dataclasses
import json
import logging
import math
import random
import struct
import sys
import time

import pytest
import torch

from comfyui_liteattention import budget, policy, profile_file
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.budget import PRIOR
from comfyui_liteattention.learning import PHASES, RATIOS, Audit, learn, phase
from comfyui_liteattention.profile import Fingerprint, Profile, join, learned_in, make
from comfyui_liteattention.profile_file import FORMAT, METADATA, load, parse_hub, save
from comfyui_liteattention.report import text_table
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings, describe
from comfyui_liteattention.tiles import TileShape

TILE = TileShape(16, 16)
BUDGET = 0.01
SHARPNESS = (2.0, 3.0, 4.0)  # one layer each
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Truth(ReferenceBackend):
    """Also measures what every call really loses, over all rows."""

    def __init__(self):
        super().__init__(TILE, torch.float32)
        self.lost = []

    def forward(self, q, k, v, scale, lists=None, criterion=None, order=None):
        result = super().forward(q, k, v, scale, lists, criterion, order)
        if lists is not None:
            full = super().forward(q, k, v, scale)
            self.lost.append(float(policy.lost_mass(result.lse, full.lse).mean()))
        return result


def sample(steps, profile=None, seed=0, layers=SHARPNESS, tokens=512, until=None):
    """A run over attention that drifts, broad and local heads mixed, or its first steps: its
    report, and the true lost mass of every call from the second step on."""
    backend = Truth()
    settings = Settings(budget=BUDGET, audit=16, min_tokens=0, profile=profile)
    run = Run(settings, backend, [1 - t / steps for t in range(steps + 1)])
    angle = torch.linspace(0, math.pi, tokens).unsqueeze(-1) * torch.arange(1, 17)
    place = torch.cat([angle.cos(), angle.sin()], -1) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(layers), 5, 1, 2, tokens, 32, generator=generator)
    for t in range(until or steps):
        turn = 2.0 * t / steps
        for i, sharpness in enumerate(layers):
            q, k, v, dq, dk = noise[i]
            q, k = (
                sharpness * place + math.cos(turn) * x + math.sin(turn) * d
                for x, d in ((q, dq), (k, dk))
            )
            run.attend(f"block-{i}", ["x"], run.locate(1 - t / steps), q, k, v, 32**-0.5)
    return run.finish(), backend.lost


@pytest.fixture(scope="module")
def learned() -> Profile:
    """Of a run of 20 steps."""
    return learned_in(sample(20)[0])


def example(**changed) -> Profile:
    about = {
        "layers": ("a", "b"),
        "ratios": ((0.25,) * PHASES, (0.5,) * PHASES),
        "model": Fingerprint(2, 12, 128, 64, 64),
        "budget": 0.01,
        "ramp": 1.0,
        "tokens": 4096,
        "steps": 20,
        "backend": "cpu",
        "computed_fraction": 0.5,
        "lost_mass": 0.008,
    }
    return Profile(**about | changed)


# What is learned


def test_the_parts_of_a_run_do_not_depend_on_the_number_of_steps():
    for steps in (5, 12, 20, 50):
        phases = [phase((step + 1) / steps) for step in range(steps)]
        assert phases == sorted(phases)
        assert set(phases) == set(range(PHASES))
        assert all(abs(phases.count(p) - steps / PHASES) < 1 for p in range(PHASES))
    assert phase(2.0**-10) == 0


def test_ratios_are_learned_by_layer_and_part():
    audits = [Audit("a", 0.1, 0.02, 0.1)] * 99 + [Audit("a", 0.5, 0.05, 0.1)] * 99
    audits += [Audit("b", 1.0, 1e-9, 0.1)] * 999 + [Audit("c", 1.0, 0.0, 0.0)]
    ratios = learn(audits)
    assert list(ratios) == ["a", "b"]  # nothing was skipped in c
    # The part between takes the next one's ratio, the last parts the one before.
    assert ratios["a"] == pytest.approx([0.2, 0.5, 0.5, 0.5, 0.5], rel=0.02)
    assert ratios["b"] == (RATIOS[0],) * PHASES
    # A single measurement counts as much as the prior.
    assert learn(audits[:1])["a"][0] == pytest.approx((0.2 + PRIOR) / 2)


def test_a_run_tells_what_it_learned(learned):
    assert learned.layers == ("block-0", "block-1", "block-2")
    assert learned.model == Fingerprint(3, 2, 32, 16, 16)
    assert (learned.steps, learned.tokens, learned.backend) == (20, 512, "reference")
    assert learned.budget == BUDGET
    assert 0 < learned.computed_fraction < 0.75
    assert 0 < learned.lost_mass < 1.5 * BUDGET
    assert all(0.05 < ratio < 1 for ratios in learned.ratios for ratio in ratios)


def test_a_run_never_fails_for_what_it_learned(learned):
    report, _ = sample(4, layers=(2.0,))
    odd = [Audit("x" * 300, 0.5, 0.1, 0.2), Audit("nan", 0.5, math.nan, 0.2)]
    assert make(odd, report, learned.model, 0.01, 1) is None
    many = [Audit(str(i), 0.5, 0.1, 0.2) for i in range(1200)]
    odd_numbers = torch.tensor(0.01).numpy()[()], 1
    assert len(make(odd + many, report, learned.model, *odd_numbers).layers) == 1000


def test_a_run_without_a_budget_learns_nothing():
    run = Run(Settings(threshold=-2.0, min_tokens=0), ReferenceBackend(TILE), [1.0, 0.5, 0.0])
    q = torch.randn(1, 2, 64, 32)
    for sigma in (1.0, 0.5):
        run.attend("0", ["x"], run.locate(sigma), q, q, q, 0.2)
    report = run.finish()
    assert report.learned is None
    with pytest.raises(ValueError, match="run with a budget"):
        learned_in(report)
    with pytest.raises(ValueError, match="nothing to save yet"):
        learned_in(None)


def test_transformers_that_take_turns_make_one_profile(learned):
    report, _ = sample(4, layers=(2.0,))
    other = dataclasses.replace(learned, layers=("x", "y", "z"))
    both = join([learned, other], report)
    assert both.layers == (*learned.layers, "x", "y", "z")
    assert both.ratios == learned.ratios * 2
    assert both.model == learned.model
    assert both.computed_fraction == report.computed_fraction
    assert join([], report) is None


# Runs with a profile


def test_with_its_own_profile_the_first_marks_come_closer_to_their_aim(learned):
    aim = budget.target(BUDGET, Settings().ramp, 1 / 20)
    # What the second step loses is what the first one marked.
    without, informed = (
        sum(sample(20, profile, until=2)[1]) / len(SHARPNESS) for profile in (None, learned)
    )
    assert without < informed < aim / budget.MARGIN
    assert abs(aim - informed) < 0.6 * abs(aim - without)


@pytest.mark.parametrize("steps", [12, 30])
def test_the_loss_stays_within_the_budget_at_another_number_of_steps(learned, steps):
    report, lost = sample(steps, learned, seed=1)
    assert not report.notes
    assert 0.5 * BUDGET < sum(lost) / (steps * len(SHARPNESS)) <= BUDGET
    assert report.computed_fraction < 0.75


def test_the_settings_name_it_shortly(learned):
    settings = Settings(budget=BUDGET, profile=dataclasses.replace(learned, name="wan.safetensors"))
    assert describe(settings).endswith("profile=wan.safetensors")
    with pytest.raises(ValueError, match=r"profile=wan\.safetensors: is for a budget"):
        Settings(threshold=-2.0, profile=settings.profile)


def test_a_layer_that_it_does_not_know_starts_without(learned):
    fewer = dataclasses.replace(learned, layers=learned.layers[:1], ratios=learned.ratios[:1])
    report, _ = sample(3, fewer)
    assert not report.notes


def untimed(report):
    return [call._replace(seconds=0.0) for call in report.calls]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Fingerprint(3, 12, 32, 16, 16), SHARPNESS),
        (Fingerprint(3, 2, 64, 16, 16), SHARPNESS),
        (Fingerprint(3, 2, 32, 128, 64), SHARPNESS),
        (Fingerprint(2, 2, 32, 16, 16), SHARPNESS),
        (Fingerprint(3, 2, 32, 16, 16), SHARPNESS[:2]),
    ],
)
def test_the_profile_of_another_model_is_ignored_with_the_reason(learned, model, layers, caplog):
    other = dataclasses.replace(learned, model=model, name="other.safetensors")
    with caplog.at_level(logging.WARNING):
        report, _ = sample(3, other, layers=layers)
    (note,) = report.notes
    assert note.startswith(f"profile other.safetensors ignored: it was made for {model}; here are")
    assert [record.message for record in caplog.records] == [f"LiteAttention: {note}"]
    assert note in text_table(report)
    assert report.active
    if model[1:] != (2, 32, 16, 16):  # known from the first call on
        assert untimed(report) == untimed(sample(3, layers=layers)[0])


# Files


def test_a_file_holds_all_of_it(learned, tmp_path):
    path = tmp_path / "my.safetensors"
    save(learned, path)
    save(learned, path)
    assert [file.name for file in tmp_path.iterdir()] == ["my.safetensors"]
    again = load(path)
    assert again == learned
    assert again.name == "my.safetensors"
    save(example(lost_mass=None), path)
    assert load(str(path)) == example(lost_mass=None)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="choose a file name in a folder that exists"):
        save(example(), tmp_path / "nowhere" / "my.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="can't be written"):
        save(example(), tmp_path / "folder")
    assert not list(tmp_path.glob("*.part"))


def write(path, about=None, dtype="F32", shape=(2, PHASES), data=None, metadata=None):
    """A safetensors file by hand."""
    good = {"format": FORMAT, **dataclasses.asdict(example())}
    good = {k: v for k, v in good.items() if k not in ("ratios", "name")}
    metadata = {METADATA: json.dumps(good | (about or {}))} if metadata is None else metadata
    data = struct.pack("<f", 0.25) * math.prod(shape) if data is None else data
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "ratios": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"metadata": {}}, "not a profile"),
        ({"metadata": {METADATA: "[" * 100_000}}, "metadata is damaged"),
        ({"metadata": {METADATA: "no JSON"}}, "metadata is damaged"),
        ({"metadata": {METADATA: "[1]"}}, "format"),
        ({"about": {"format": FORMAT + 1}}, "format is another than 1"),
        ({"about": {"extra": 1}}, "impossible values"),
        ({"about": {"layers": "ab"}}, "impossible values"),
        ({"about": {"layers": ["a", "a"]}}, "impossible values"),
        ({"about": {"layers": ["a"]}}, "impossible values"),
        ({"about": {"layers": ["a", ["b"]]}}, "impossible values"),
        ({"about": {"layers": ["a", "\ud800"]}}, "impossible values"),
        ({"about": {"layers": ["a", "x" * 300]}}, "impossible values"),
        ({"about": {"model": [2, 12, 128]}}, "impossible values"),
        ({"about": {"model": [2, 12, 128, 64, 0]}}, "impossible values"),
        ({"about": {"budget": 2.0}}, "impossible values"),
        ({"about": {"budget": True}}, "impossible values"),
        ({"about": {"ramp": math.nan}}, "impossible values"),
        ({"about": {"lost_mass": math.inf}}, "impossible values"),
        ({"about": {"steps": 2.5}}, "impossible values"),
        ({"about": {"tokens": -1}}, "impossible values"),
        ({"about": {"backend": None}}, "impossible values"),
        ({"dtype": "I32"}, "another type or shape"),
        ({"shape": (2, PHASES, 1)}, "another type or shape"),
        ({"shape": (2 * PHASES,)}, "another type or shape"),
        ({"shape": ()}, "another type or shape"),
        ({"shape": (2000, PHASES)}, "another type or shape"),
        ({"data": struct.pack("<f", math.nan) * 2 * PHASES}, "impossible values"),
        ({"data": struct.pack("<f", 1e-9) * 2 * PHASES}, "impossible values"),
        ({"data": b""}, "damaged"),
    ],
)
def test_whatever_is_wrong_with_a_file_is_one_sentence(tmp_path, wrong, says):
    path = write(tmp_path / "my.safetensors", **wrong)
    with pytest.raises(ValueError, match=says) as error:
        load(path)
    text = str(error.value)
    assert text.startswith("LiteAttention: the profile ")
    assert text.endswith(".") and "\n" not in text and len(text) < 400
    assert not isinstance(error.value, UnicodeError)


def test_what_is_not_a_file_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "none", "a\0b", "x" * 5000, "", "owner/repo"):
        with pytest.raises(ValueError, match="is not there; give a file"):
            load(source)
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(profile_file.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        load(large)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A damaged copy: cut off, bytes changed, a piece left out, doubled or overwritten."""
    kind = rng.choice(["cut", "bytes", "out", "double", "digits", "length", "noise"])
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 40))
    if kind == "cut":
        return data[:start]
    if kind == "out":
        return data[:start] + data[stop:]
    if kind == "double":
        return data[:stop] + data[start:]
    if kind == "length":
        length = rng.choice([rng.getrandbits(64), rng.randrange(2000)])
        return length.to_bytes(8, "little") + data[8:]
    if kind == "noise":
        return rng.randbytes(rng.randrange(200))
    damaged = bytearray(data)
    letters = b'0123456789-.eE+"[]{},:' if kind == "digits" else bytes(range(256))
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] = rng.choice(letters)
    return bytes(damaged)


def test_damaged_files_never_do_more_than_to_be_refused(tmp_path):
    path = tmp_path / "my.safetensors"
    save(example(), path)
    good = path.read_bytes()
    rng = random.Random(0)
    refused, slowest = 0, 0.0
    for _ in range(1000):
        path.write_bytes(mutated(good, rng))
        started = time.perf_counter()
        try:
            assert isinstance(load(path), Profile)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("LiteAttention: the profile ")
        slowest = max(slowest, time.perf_counter() - started)
    assert refused > 500
    assert slowest < 5  # milliseconds, but for other work on the machine


# The hub; what it is asked for: test_profile_hub.py


def test_references_to_the_hub():
    assert parse_hub(f"me/wan@{COMMIT}") == ("me/wan", COMMIT, "profile.safetensors")
    assert parse_hub("me/wan@main:a/b.safetensors") == ("me/wan", "main", "a/b.safetensors")
    for text in ("me/wan", "me@x", "C:\\me\\wan@x", "/me/wan@x", "a/b/c@x", "https://hub/a@b"):
        assert parse_hub(text) is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("me/wan@main", "no pinned revision"),
        (f"me/wan@{COMMIT}:x.pkl", "not a safetensors file"),
        (f"me/wan@{COMMIT}:../x.safetensors", "not a safetensors file"),
    ],
)
def test_what_the_hub_is_never_asked_for(source, says):
    with pytest.raises(ValueError, match=says):
        load(source)


def test_without_huggingface_hub_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        load(f"me/wan@{COMMIT}")
