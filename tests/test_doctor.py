"""What the doctor says about a card, with a stand-in for its backend."""

from __future__ import annotations

import pytest
import torch

from comfyui_liteattention import doctor
from comfyui_liteattention.backends.modes import KITCHEN, SAGE, SAGE_FP16


class Card:
    """A backend whose name is known only after its self-test."""

    name = "first choice"

    def __init__(self, reason):
        self.reason = reason

    def provide(self, device, head_dim, dtype):
        self.name = "second choice"
        return self.reason or self


@pytest.fixture
def card(monkeypatch):
    def examine(reason, capability=89):
        zeros = torch.zeros
        monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cuda", 0)])
        monkeypatch.setattr(doctor, "_device_name", lambda device: "a card")
        monkeypatch.setattr(doctor, "backend_for", lambda device: Card(reason))
        monkeypatch.setattr(doctor, "capability", lambda device: capability)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **_: zeros(*shape))
        findings = doctor.examine()
        return findings["devices"][0], doctor.render(findings)

    return examine


def test_a_card_is_tested_before_it_is_called_active(card):
    found, text = card(None)
    assert (found["backend"], found["self_test"], found["reason"]) == (
        "second choice",
        "passed",
        None,
    )
    assert "active: second choice backend, self-test passed" in text
    assert "no GPU has run them yet" in text


def test_what_auto_comes_to_on_this_card(card):
    found, text = card(None)
    assert found["auto"] == {SAGE: "fp8", SAGE_FP16: "int8", KITCHEN: "int8"}
    assert "Mode auto chooses native beside attention in 16 bits; fp8 beside SageAttention;" in text
    assert "Mode auto chooses native\n" in card(None, capability=103)[1]


def test_a_failed_self_test_is_the_reason(card):
    found, text = card("relative error nan")
    assert (found["backend"], found["self_test"]) == (None, None)
    assert "inactive, attention runs as before: relative error nan" in text


def test_the_cpu_needs_no_second_test():
    (found,) = (d for d in doctor.examine()["devices"] if d["device"] == "cpu")
    assert found["takes"].startswith("float32, bfloat16 and float16; head_dim multiples of 8")
    assert found["note"] is None and (found["backend"] == "cpu") == (found["reason"] is None)
