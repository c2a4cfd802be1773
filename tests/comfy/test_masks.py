"""Masks that hide text padding, as ComfyUI's models make them; no others are understood."""

import pytest
import torch
import torch.nn.functional as F

LOW = torch.finfo(torch.float32).min
BATCH, LENGTH = 2, 20


@pytest.fixture
def kept(comfy):
    """``kept(mask)`` for 4 text tokens, 12 of video, 4 of text; two conditionings."""
    from comfyui_liteattention.integrations.comfy.masks import kept_tokens
    from comfyui_liteattention.token_order import VideoTokens

    def look(mask, parts=2, batch=BATCH):
        return kept_tokens(mask, batch, LENGTH, VideoTokens((3, 2, 2), 4), parts)

    return look


def hiding(*tokens, rows=1):
    mask = torch.zeros(rows, 1, LENGTH)
    mask[..., list(tokens)] = LOW
    return mask


def listed(places):
    return torch.arange(LENGTH)[places].tolist()


@pytest.mark.parametrize(
    ("tokens", "start"), [((18, 19), 4), ((2, 3), 2), ((1, 3, 17), 2), ((), 4), ((0, 1, 2, 3), 0)]
)
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("form", ["added", "bool", "heads", "half"])
def test_hidden_text_is_found_wherever_it_lies(kept, tokens, start, rows, form):
    mask = hiding(*tokens, rows=rows)
    if form == "bool":
        mask = mask == 0
    elif form == "heads":
        mask = mask.unsqueeze(1)
    elif form == "half":
        mask = (mask != 0).half() * torch.finfo(torch.float16).min
    (found,) = kept(mask)
    assert listed(found.hidden) == list(tokens)
    assert listed(found.tokens) == [i for i in range(LENGTH) if i not in tokens]
    assert (found.video.start, found.video.grid) == (start, (3, 2, 2))


def test_ranges_need_no_copy(kept):
    (behind,) = kept(hiding(18, 19))
    assert behind.tokens == slice(0, 18)
    (before,) = kept(hiding(2, 3))
    assert before.hidden == slice(2, 4)


def test_conditionings_may_hide_different_text(kept):
    mask = torch.cat([hiding(19), hiding(2, 3)])
    assert [listed(k.hidden) for k in kept(mask)] == [[19], [2, 3]]
    assert kept(mask, parts=1) is None  # two videos of one conditioning


@pytest.mark.parametrize(
    "mask",
    [
        hiding(5),  # a token of the video
        hiding(19) * 0 - 0.5,  # a weight
        hiding(19).clamp(min=-1e4),  # low, but not as low as it gets
        hiding(19).expand(1, LENGTH, LENGTH),  # other queries might see it
        hiding(19)[0],
        hiding(19)[..., :-1],
        hiding(19).expand(1, 3, LENGTH).unsqueeze(2),  # per head
        hiding(19, rows=3),
        (hiding(19) == 0).long(),
        torch.full((1, 1, LENGTH), float("nan")),
    ],
)
def test_all_else_is_not_understood(kept, mask):
    assert kept(mask) is None


@pytest.mark.parametrize("tokens", [(18, 19), (2, 3), (1, 3, 17)])
def test_what_is_left_is_the_masked_attention(kept, tokens):
    q, k, v = torch.randn(3, BATCH, 2, LENGTH, 8)
    mask = hiding(*tokens)
    (found,) = kept(mask)
    keys = [t[:, :, found.tokens] for t in (k, v)]
    out, rest = (
        F.scaled_dot_product_attention(q[:, :, places], *keys)
        for places in (found.tokens, found.hidden)
    )
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    torch.testing.assert_close(found.join(out, rest), want)
