"""Plans against the public record's figures and logs."""

import pytest

from configs.presets import PRESETS
from scripts.lab.costs import measure_sizes, newton_schulz_flops, predict, seconds_of
from scripts.lab.machines import MACHINES, Efficiency
from scripts.plan import Arguments, plan, tables


@pytest.fixture(scope="module")
def track3():
    return measure_sizes(PRESETS["track3"]())


@pytest.fixture(scope="module")
def speedrun():
    return measure_sizes(PRESETS["speedrun"]())


def test_track3s_work_is_what_the_public_log_implies(track3):
    """.418 PFLOP a step."""
    sizes, (stage,) = track3
    assert sizes.parameters == 162_354_816
    assert stage.flops == pytest.approx(0.418e15, rel=0.002)


@pytest.mark.parametrize(("device", "gpus", "logged_ms", "band"), [("h200", 1, 1070, 0.05), ("h100", 8, 154, 0.15)])
def test_predictions_against_public_logs(track3, device, gpus, logged_ms, band):
    """At 40 % of peak: the reference script's own step times, which include what ours does otherwise."""
    sizes, (stage,) = track3
    found = predict(stage, sizes, MACHINES[device], gpus=gpus, share=Efficiency())
    assert found.step_ms == pytest.approx(logged_ms, rel=band)


def test_orthogonalization_is_one_percent_of_track3s_step(track3):
    """3.9 of 418 TFLOP (72 matrices, 12 steps)."""
    sizes, (stage,) = track3
    assert sizes.newton_schulz_flops == pytest.approx(3.9e12, rel=0.05)
    assert newton_schulz_flops(768, 3072, 1) == newton_schulz_flops(3072, 768, 1) == 4 * 768**2 * 3072 + 2 * 768**3


def test_the_speedruns_stages(speedrun):
    sizes, stages = speedrun
    assert [(s.first, s.steps) for s in stages] == [(0, 423), (423, 424), (847, 423), (1270, 15)]
    assert sum(s.steps * s.values.batch_tokens for s in stages) == 338_821_120


def test_more_accelerators_share_the_work_and_one_sends_nothing(speedrun):
    sizes, stages = speedrun
    one, eight = (predict(stages[0], sizes, MACHINES["h100"], gpus=gpus, share=Efficiency()) for gpus in (1, 8))
    assert one.network_bytes == 0 and one.compute_ms == pytest.approx(8 * eight.compute_ms)
    assert eight.network_bytes == pytest.approx(2 * 4 * 7 / 8 * sizes.sent_elements)
    assert sizes.sent_elements < 0.6 * sizes.parameters  # Adam's groups travel at every second step


def test_twice_the_efficiency_halves_the_compute(speedrun):
    sizes, stages = speedrun
    slow, fast = (predict(stages[1], sizes, MACHINES["a100"], gpus=8, share=Efficiency(flops=share)) for share in (0.2, 0.4))
    assert slow.compute_ms == pytest.approx(2 * fast.compute_ms) and slow.network_ms == fast.network_ms
    assert seconds_of(stages, sizes, MACHINES["a100"], gpus=8, share=Efficiency(0.2)) > seconds_of(
        stages, sizes, MACHINES["a100"], gpus=8, share=Efficiency(0.4))


def test_the_printed_plan_names_every_machine_and_stage():
    text = tables(plan(Arguments(preset="speedrun"), []))
    assert all(machine.name in text for machine in MACHINES.values())
    assert all(f"{window:>7}" in text for window in (128, 384, 640, 768)) and "338,821,120 tokens" in text


def test_flags_change_the_run():
    found = plan(Arguments(preset="bytes", gpus=1), ["--train.steps", "7", "--model.layers", "2"])
    assert found["steps"] == 7 and found["tokens"] == 7 * 768


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "h10"}, "unknown device 'h10'; did you mean 'h100'"), ({"gpus": 0}, "--gpus must be at least 1, got 0")])
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(Arguments(preset="bytes", **arguments), [])
