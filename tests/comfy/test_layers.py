"""Layers are found by their modules, whatever is left out, replaced or asked in parts."""

from types import MethodType

import torch
from torch import nn

from comfyui_liteattention.integrations.comfy.layers import LayerCalls, Names


class Attention(nn.Module):
    def forward(self, ask):
        return ask()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, ask):
        return self.attn1(ask), self.attn2(ask)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(Block() for _ in range(2))
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(2))


def asked(calls, options=None):
    """What a layer's forward calls."""
    return lambda: calls.enter(calls.module(), options or {})


def names(model, blocks, found):
    calls = LayerCalls(found, model)
    return [layer and layer.name for block in blocks for layer in block(asked(calls))]


def test_names_are_short_and_each_layers_own():
    model, found = Model(), Names()
    everything = [*model.double_blocks, *model.transformer_blocks]
    want = ["double-0", "double-0.attn2", "double-1", "double-1.attn2"]
    want += ["0", "0.attn2", "1", "1.attn2"]
    assert names(model, everything, found) == want
    # A pass that leaves out blocks: nothing moves up.
    assert names(model, everything[1:3], found) == want[2:6]


def test_parts_of_a_layer_are_counted_within_one_call_of_the_model():
    """KJNodes asks for a few heads at a time, through a forward of its own."""
    model = Model()
    attention = model.transformer_blocks[1].attn1

    def in_slices(attn, ask):
        return [ask() for _ in range(4)]

    attention.forward = MethodType(in_slices, attention)
    for _ in range(2):
        layers = attention(asked(LayerCalls(Names(), model)))
        assert [(layer.name, layer.part) for layer in layers] == [("1", i) for i in range(4)]


def test_a_controlnet_is_no_layer_of_the_model():
    """Even with the base model's own index, as MiniMax H3's has it."""
    model = Model()
    calls = LayerCalls(Names(), model)
    assert Attention()(asked(calls, dict(block_index=0))) is None


def test_without_modules_the_index_and_the_order_tell():
    calls = LayerCalls(Names(), Model())
    assert [calls.enter(None, {}).name for _ in range(2)] == ["0", "1"]
    again = dict(block_index=7, block_type="single")
    assert [calls.enter(None, again).name for _ in range(2)] == ["single-7.0", "single-7.1"]


def test_a_compiled_block_has_the_name_of_the_block():
    model = Model()
    compiled = torch.compile(model.transformer_blocks[0], backend="eager", disable=False)
    calls = LayerCalls(Names(), model)
    assert calls._names.paths(model)[id(compiled._orig_mod)] == "transformer_blocks.0"


def test_numbers_without_a_layer_are_found():
    model, found = Model(), Names()
    assert found.beyond([7]) == []  # before any layer has a name
    names(model, model.double_blocks, found)
    assert found.beyond([0, 3, 4, 9]) == [4, 9]
