"""Every wrong setting is one clear ValueError, before anything runs."""

import pytest
import torch

from comfyui_liteattention.settings import Settings

WRONG = {
    "budget": ("0.01", True, 0, 1, 10, -0.1, float("nan"), [0.1], torch.tensor([0.1, 0.2])),
    "threshold": ("-1", None, 0, 3, float("nan"), -float("inf"), False),
    "ramp": (None, "2", -1, 9, float("inf"), True),
    "warmup": ("x", None, -0.1, 1.1, True),
    "audit": (None, 2.0, 1.5, "64", -1, 10**9, True),
    "min_tokens": ("2048", None, 2048.0, -1, float("inf")),
    "dense_layers": (3, "0, 1", (0.0,), (-1,), (True,), None, ((0, 1),)),
    "dense_keys": ((1, 2), 5, ((5, 0),), ((0, 0),), ((0, 5, 6),), (("0", "5"),), ((-1, 4),), None),
    "dense_queries": ((1, 2), ((0.0, 5.0),)),
    "criterion": ("Mass", None, 1),
    "order": ("hilbert", None, []),
    "mode": ("int4", 8),
    "tail": ("no", 1, None),
    "never_slower": ("no", 0, None),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"^LiteAttention: {name}="):
        Settings(**{name: value})


def test_the_message_says_what_to_write():
    with pytest.raises(ValueError, match=r"dense_layers=\(0, 1\)"):
        Settings(dense_layers=3)
    with pytest.raises(ValueError, match="needs the audit"):
        Settings(budget=0.1, audit=0)


def test_lists_are_as_good_as_tuples():
    settings = Settings(dense_layers=[0, 1], dense_keys=[(0, 5)], dense_queries=[[0, 5]])
    assert settings.dense_layers == (0, 1)
    assert settings.dense_keys == settings.dense_queries == ((0, 5),)
    assert Settings(dense_layers=range(2)).dense_layers == (0, 1)
