"""What ``enable`` returns, and what is said when there is nothing to do."""

import contextlib
import logging

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, WanTransformer3DModel
from tiny_pipeline import BOLD, make_pipe, run
from tiny_wan import hooks_left, make_wan
from tqdm.auto import tqdm

import comfyui_liteattention as lite
from comfyui_liteattention.integrations.diffusers import session
from comfyui_liteattention.integrations.diffusers.families import FAMILIES
from comfyui_liteattention.report import record
from comfyui_liteattention.report.statistics import CallStats, RunReport, mean_lost
from comfyui_liteattention.report.table import chosen_layers, grouped, text_table

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe():
    return make_pipe()


def test_with_brings_back_what_was_enabled_before(pipe):
    plain = run(pipe)
    first = lite.enable(pipe, budget=0.25)
    with lite.enable(pipe.transformer, **BOLD) as second:
        assert "threshold=-1" in lite.summary(pipe)
        with contextlib.suppress(ZeroDivisionError), lite.enabled(pipe, budget=0.125):
            assert "budget=0.125" in lite.summary(pipe)
            lite.disable(pipe)
            raise ZeroDivisionError
        assert "threshold=-1" in lite.summary(pipe)
        assert not torch.equal(run(pipe), plain)
    assert first.status == lite.summary(pipe) and "budget=0.25" in first.status
    assert second.report().active and second.status.startswith("LiteAttention active")
    with first:
        pass
    assert lite.summary(pipe) == "LiteAttention is not enabled"
    assert hooks_left(pipe.transformer) == []


def test_a_handle_says_what_goes_on(pipe, tmp_path):
    handle = lite.enable(pipe, **BOLD)
    assert repr(handle) == f"<{handle.status}>" and "\n" not in handle.status
    run(pipe)
    assert handle.status.startswith("LiteAttention active: ")
    assert "<pre>LiteAttention active" in handle._repr_html_()
    report = handle.report()
    assert isinstance(report, lite.RunReport) and str(report) == handle.status
    assert report.to_dict()["active"] and report.to_dict()["steps"] == 4
    paths = report.save_pictures(tmp_path / "pictures")
    assert len(paths) >= 3 and all(path.stat().st_size > 1000 for path in paths)
    pandas = pytest.importorskip("pandas")
    assert isinstance(report.to_dataframe(), pandas.DataFrame)


def test_the_progress_bar_says_what_is_skipped(pipe, monkeypatch):
    said = []
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, **_: said.append(text))
    handle = lite.enable(pipe, **BOLD)
    pipe.set_progress_bar_config(disable=False)
    run(pipe, callback_on_step_end=handle.callback)
    assert len(said) == 4 and said[0] == "0 % skipped" and said[-1].endswith(" % skipped")


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_the_progress_bar_costs_no_maps(pipe, monkeypatch):
    """Nor does the status: a line of text must not copy maps from the device."""
    made, shown = [], []
    monkeypatch.setattr(record, "_maps", lambda states: made.append(states) or ())
    handle = lite.enable(pipe, **BOLD)

    def look(*given):
        shown.append((handle.status, len(made)))
        return handle.callback(*given)

    run(pipe, callback_on_step_end=look)
    assert "% of the tiles skipped" in shown[-2][0]
    assert [count for _, count in shown] == [0, 0, 0, 1]  # for the report, when the run ends
    assert len(made) == 1


def test_a_warning_where_nothing_can_be_done(pipe, caplog, monkeypatch):
    lite.enable(pipe)
    run(pipe, steps=2)
    run(pipe, steps=2)
    (text,) = warnings_of(caplog)
    assert "short sequence" in text
    caplog.clear()
    monkeypatch.setattr(session, "backend_for", lambda *_: "numba is not installed")
    lite.enable(pipe)
    run(pipe, steps=2)
    (text,) = warnings_of(caplog)
    assert "numba is not installed" in text


def test_what_has_no_transformer_is_said_and_left_alone(caplog):
    unet = UNet2DModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    other = DDPMPipeline(unet, DDPMScheduler())
    handle = lite.enable(other)
    assert "has no transformer" in warnings_of(caplog)[0] and "no transformer" in handle.status
    lite.disable(other)
    assert lite.summary(other) == "LiteAttention is not enabled"
    for wrong in (WanTransformer3DModel, type(other), "pipe", None):
        with pytest.raises(TypeError, match="neither a diffusers pipeline nor a transformer"):
            lite.enable(wrong)
        lite.disable(wrong)
        assert lite.summary(wrong) == "LiteAttention is not enabled"


class Renamed(WanTransformer3DModel):
    """Only the name is new."""


class Changed(WanTransformer3DModel):
    """A subclass that overrides forward, and so may place its tokens differently."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_subclasses(pipe):
    plain = run(pipe)
    pipe.transformer.__class__ = Renamed
    with lite.enabled(pipe, **BOLD):
        skipped = run(pipe)
    assert not torch.equal(skipped, plain)
    pipe.transformer.__class__ = Changed
    with lite.enabled(pipe, **BOLD) as handle:
        assert torch.equal(run(pipe), plain)
    assert "lite.register_family(Changed, like='WanTransformer3DModel')" in handle.status
    with pytest.raises(ValueError, match="no family 'Wan'"):
        lite.register_family(Changed, like="Wan")
    lite.register_family(Changed, like=FAMILIES["WanTransformer3DModel"])
    lite.register_family(Changed, like=WanTransformer3DModel)


def test_log_levels():
    logger = logging.getLogger("comfyui_liteattention")
    before = logger.level
    lite.logging.set_verbosity_info()
    assert lite.logging.get_verbosity() == lite.logging.INFO == logger.level
    lite.logging.set_verbosity_error()
    assert lite.logging.get_verbosity() == lite.logging.ERROR
    logger.setLevel(before)


def stats(step, layer, computed, lost):
    return CallStats(step, layer, "cond", 4096, computed, 100, lost)


def test_what_was_not_measured_is_not_zero():
    dense, unaudited, audited = (
        stats(0, "a", n, x) for n, x in ((100, None), (50, None), (50, 0.1))
    )
    assert mean_lost([dense, unaudited]) is None
    assert mean_lost([dense, dense]) == 0
    # Calls that skipped and were not audited lose as much as those that were.
    assert mean_lost([dense, unaudited, audited, audited]) == pytest.approx(0.075)
    everywhere = RunReport("", "cpu", 1, 1.0, {}, (stats(0, "a", 102, 0.1),), {}, ())
    assert everywhere.active and everywhere.computed_fraction == 1


def test_a_summary_stays_within_a_screen():
    calls = tuple(
        stats(step, f"blocks.{layer}", 90 - layer, 0.001 * layer)
        for step in range(50)
        for layer in range(40)
    )
    report = RunReport("", "cpu", 50, 9.0, dict.fromkeys(range(50), 0.1), calls, {"why": 3}, ())
    lines = text_table(report, everything=False).splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 100
    for label in ("layer 39", "layer 34", "layer 0", "layer 1", "46-50", "3 x why"):
        assert any(label in line for line in lines), label
    assert len(text_table(report).splitlines()) > 95
    assert grouped(range(4), 10) == [range(i, i + 1) for i in range(4)]
    assert chosen_layers({"a": [], "b": []}) == ["a", "b"]


def test_a_model_kept_by_its_report_alone_is_freed(pipe):
    import gc
    import weakref

    handle = lite.enable(pipe, **BOLD)
    run(pipe, steps=2)
    lite.disable(pipe)
    model = weakref.ref(pipe.transformer)
    pipe.register_modules(transformer=make_wan())
    gc.collect()
    assert model() is None and handle.report() is not None
