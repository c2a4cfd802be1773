"""Which run a call belongs to, and where in it, found out from the calls alone."""

from dataclasses import replace

import torch

from comfyui_liteattention.integrations.diffusers.families import less_noisy
from comfyui_liteattention.integrations.diffusers.trajectory import Moment, Trajectory, name_stream
from comfyui_liteattention.report.experts import merged
from comfyui_liteattention.report.map_history import StepMap
from comfyui_liteattention.report.statistics import CallStats, RunReport


def follow(moments):
    """Which of these calls start a new run, and the progress of each."""
    trajectory, starts, progress = None, [], []
    for index, now in enumerate(moments):
        if trajectory is None or not trajectory.continues("transformer", now):
            trajectory = Trajectory(now)
            starts.append(index)
        progress.append(trajectory.advance("transformer", now).progress)
    return starts, progress


def test_a_second_order_sampler_stays_in_its_run():
    heun = torch.tensor([1000.0, 700, 700, 300, 300])
    starts, progress = follow(
        [Moment("cond", None, None, t, heun, tuple(heun.tolist())) for t in heun.tolist()]
    )
    assert starts == [0] and progress[-1].position == 1
    assert [p.position for p in progress] == sorted(p.position for p in progress)


def test_a_new_schedule_is_a_new_run():
    """Even if the second run starts at less noise than that at which the first one failed."""
    first, second = torch.tensor([1000.0, 500]), torch.tensor([400.0, 200])
    moments = [Moment("cond", None, None, 1000.0, first), Moment("cond", None, None, 400.0, second)]
    assert follow(moments)[0] == [0, 1]


def test_positions_from_noise_levels_alone_are_never_ahead():
    for shift in (1, 3, 8):
        u = [1 - step / 10 for step in range(10)]
        levels = [1000 * shift * x / (1 + (shift - 1) * x) for x in u]
        starts, progress = follow([Moment("cond", None, None, t, None) for t in levels])
        assert starts == [0]
        assert all(p.step == i and 0 < p.position <= (i + 1) / 10 for i, p in enumerate(progress))


def test_repeats_and_steps_backwards_start_a_run():
    def at(step, stream="cond"):
        return Moment(stream, step, 4, 0.0, None)

    assert follow([at(0), at(0, "uncond"), at(1), at(1, "uncond")])[0] == [0]
    assert follow([at(0), at(0)])[0] == [0, 1]
    assert follow([at(2), at(1)])[0] == [0, 1]


def test_less_noisy_tokens():
    assert less_noisy(torch.full((2, 4), 5.0)) == ()
    assert less_noisy(torch.tensor([[0.0, 0, 5, 5, 1, 5]])) == ((0, 2), (4, 5))


def test_texts_name_streams():
    a, b = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(5))
    assert name_stream(a) == name_stream(a.clone()) != name_stream(b)


def test_frames_that_lag_behind_stay_in_one_run():
    """Asynchronous diffusion forcing: later frames wait while the first ones are denoised."""
    schedule = torch.tensor([1000.0, 600, 200])
    levels = tuple(schedule.tolist())
    frames = [(1000, 1000), (600, 1000), (200, 1000), (0, 600), (0, 200)]
    moments = [
        Moment("cond", None, None, float(max(f)), schedule, levels, sum(f) / 2, (), torch.tensor(f))
        for f in frames
    ]
    starts, progress = follow(moments)
    assert starts == [0] and [p.step for p in progress] == [0, 0, 0, 1, 2]
    again = moments[0]._replace(latent=torch.tensor([7.0, 7.0]))
    assert follow([*moments[:3], again])[0] == [0, 3]


def test_a_report_of_two_experts_holds_what_both_did():
    calls = [CallStats(step, "a", "cond", 9, 1, 2, None, seconds=1.0) for step in range(4)]
    allowed = (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)
    first = RunReport("", "cpu", 4, 9.0, {0: 1.0}, (*calls[:2],), {"x": 1}, (), allowed[0])
    second = RunReport("", "cpu", 4, 5.0, {2: 1.0}, (*calls[2:],), {"x": 2}, (), allowed[1])
    first = replace(first, dense_rate=1.0)
    second = replace(second, stopped="it was slower", dense_rate=3.0)
    second = replace(second, history=(StepMap(2, "a", torch.zeros(1, 1)),))
    both = merged([first, second])
    assert both.stopped == "it was slower" and both.allowed == (0.1, 0.2, 0.7, 0.8)
    assert both.calls == tuple(calls) and both.reasons == {"x": 3} and len(both.history) == 1
    assert both.saved_seconds == first.saved_seconds + second.saved_seconds


def test_a_run_that_begins_late_counts_its_own_steps():
    """As video to video at a strength below 1, which asks about the last timesteps alone."""
    timesteps = torch.tensor([1000.0, 900, 700, 400])
    levels, noise = tuple(timesteps.tolist()), (1.0, 0.9, 0.7, 0.4)
    moments = [
        Moment("cond", None, None, t, timesteps, levels, fractions=noise) for t in levels[2:]
    ]
    trajectory = Trajectory(moments[0])
    progress = [trajectory.advance("transformer", now).progress for now in moments]
    assert progress == [(0, 0.5), (1, 1.0)]
    assert trajectory.countdown() == range(2, -1, -1)
    assert trajectory.levels() == (0.7, 0.4, 0.0)


def test_a_noise_level_visited_twice_is_one_step():
    heun = torch.tensor([1000.0, 700, 700, 300, 300])
    levels, noise = tuple(heun.tolist()), (1.0, 0.7, 0.7, 0.3, 0.3)
    moments = [Moment("cond", None, None, t, heun, levels, fractions=noise) for t in levels]
    trajectory = Trajectory(moments[0])
    steps = [trajectory.advance("transformer", now).progress.step for now in moments]
    assert steps == [0, 1, 1, 2, 2]
    assert trajectory.countdown() == range(3, -1, -1)
    assert trajectory.levels() == (1.0, 0.7, 0.3, 0.0)
