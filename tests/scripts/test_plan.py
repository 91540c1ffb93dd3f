"""scripts.plan against the figures and logs of the public record."""

import pytest
import torch

from configs.cli import parse_row
from configs.presets import PRESETS
from model import GPT
from optim.comm import Comm
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.sharded import ShardedOptimizer
from scripts.lab.costs import LOGS, MACHINES, Efficiency, measure_sizes, newton_schulz_flops, predict, predict_seconds
from scripts.plan import Arguments, make_plan, plan_lines


def plan_text(args, flags):
    return "\n".join(plan_lines(make_plan(args, flags)))


@pytest.fixture(scope="module")
def track3():
    return measure_sizes(PRESETS["track3"]())


@pytest.fixture(scope="module")
def speedrun():
    return measure_sizes(PRESETS["speedrun"]())


def test_flops_of_track3_are_those_that_the_public_log_implies(track3):
    """0.418 PFLOP per step."""
    sizes, (stage,) = track3
    assert sizes.parameters == 162_354_816
    assert stage.flops == pytest.approx(0.418e15, rel=0.002)


@pytest.mark.parametrize(("log", "band"), list(zip(LOGS, [0.05, 0.15, 0.25, 0.25, 0.25], strict=True)), ids=str)
def test_predictions_against_public_logs(track3, speedrun, log, band):
    """At 40 % of peak; the logs are of other code, so the tolerance is wide."""
    sizes, stages = {"track3": track3, "speedrun": speedrun}[log.preset]
    stage = next(stage for stage in stages if stage.first == log.first)
    prediction = predict(stage, sizes, MACHINES[log.machine], gpus=log.gpus, share=Efficiency())
    assert prediction.step_ms == pytest.approx(log.step_ms, rel=band)


def test_shares_of_the_peak_that_public_logs_imply():
    """0.418 PFLOP in 1070 ms on one GPU of 989 TFLOP/s, and in 154 ms on eight."""
    one, eight = make_plan(Arguments(preset="track3"), [])["logs"]
    assert one["reached"] == pytest.approx(0.4184 / (1.070 * 0.989), rel=1e-3)
    assert eight["reached"] == pytest.approx(0.4184 / (8 * 0.154 * 0.989), rel=1e-3)
    assert "1 x H200 SXM from step 0: 1,070.0 ms per step, 40% of peak" in plan_text(Arguments(preset="track3"), [])
    assert make_plan(Arguments(preset="track3"), ["--model.layers", "6"])["logs"] == []  # not the run of the logs


def test_orthogonalization_is_one_percent_of_a_step_of_track3(track3):
    """3.9 of 418 TFLOP: 72 matrices, 12 Newton-Schulz steps."""
    sizes, (stage,) = track3
    assert sizes.newton_schulz_flops == pytest.approx(3.9e12, rel=0.05)
    assert newton_schulz_flops(768, 3072, 1) == newton_schulz_flops(3072, 768, 1) == 4 * 768**2 * 3072 + 2 * 768**3


def test_the_speedruns_stages(speedrun):
    sizes, stages = speedrun
    assert [(s.first, s.steps) for s in stages] == [(0, 423), (423, 424), (847, 423), (1270, 15)]
    assert sum(s.steps * s.values.batch_tokens for s in stages) == 338_821_120


def test_accelerators_divide_the_compute_and_one_alone_sends_nothing(speedrun):
    sizes, stages = speedrun
    one, eight = (predict(stages[0], sizes, MACHINES["h100"], gpus=gpus, share=Efficiency()) for gpus in (1, 8))
    assert one.network_bytes == 0 and one.compute_ms == pytest.approx(8 * eight.compute_ms)
    weights = sum(bank.stored(8) * bank.weight_bytes / bank.update_every_steps for bank in sizes.banks)
    assert eight.network_bytes == pytest.approx(2 * 7 / 8 * weights)
    assert weights < 0.65 * 4 * sizes.parameters  # Adam's groups are sent at every second step only


def test_a_sequence_is_not_divided_between_ranks(speedrun):
    """The first stage has 8 sequences of 16,384 tokens: 64 ranks are no faster than 8."""
    sizes, stages = speedrun
    times = {gpus: predict(stages[0], sizes, MACHINES["h100"], gpus=gpus, share=Efficiency()).compute_ms
             for gpus in (4, 8, 64)}
    assert times[4] == pytest.approx(2 * times[8]) and times[64] == times[8]
    assert [stages[2].portion(gpus) for gpus in (1, 8, 16, 64)] == [(24, 24, 1), (24, 3, 1), (24, 2, 1), (24, 1, 1)]
    assert "keeps no more than 8 of 64 ranks busy" in plan_text(Arguments(preset="speedrun", gpus=64), [])


class EightRanks(Comm):
    """Rank 0 of eight ranks, without communication."""

    def __init__(self) -> None:
        self.device, self.world_size, self.rank = torch.device("cpu"), 8, 0

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Do nothing."""


@pytest.mark.parametrize("words", ["bytes", "bytes --optim.matrix.rule soap", "bytes --train.weight_average 0.9",
                                   "bytes --optim.matrix.update_every 2", "ngpt_bytes"])
def test_memory_is_that_of_the_optimizer(words):
    """Weights and gradients with their padding, and the state of the first rank, in bytes."""
    preset, *flags = words.split()
    run = parse_row(preset, flags)
    model = GPT(run.model, vocab_size=257, max_tokens=64)
    groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
    banks = ShardedOptimizer(groups, EightRanks(), hooks=build_hooks(run)).banks
    sizes, (stage, *_) = measure_sizes(run)
    prediction = predict(stage, sizes, MACHINES["h100"], gpus=8, share=Efficiency())
    assert prediction.weight_bytes == sum(bank.weights.nbytes for bank in banks)
    assert prediction.gradient_bytes == sum(bank.grads.nbytes for bank in banks)
    assert prediction.state_bytes == pytest.approx(sum(t.nbytes for bank in banks for t in bank.state.values()), rel=1e-3)


def test_a_plan_that_does_not_fit_has_a_note():
    text = plan_text(Arguments(preset="track3", gpus=1, device="4090"), [])
    assert "this does not fit: lower --train.micro_tokens (65,536)" in text and "* does not fit" in text
    text = plan_text(Arguments(preset="track3", gpus=1, device="4090"), ["--train.micro_tokens", "8192"])
    assert "this does not fit" not in text
    assert "banks are padded to a multiple of 1,024 ranks" in plan_text(Arguments(preset="track3", gpus=1024), [])


def test_doubling_the_efficiency_halves_the_compute_time(speedrun):
    sizes, stages = speedrun
    slow, fast = (predict(stages[1], sizes, MACHINES["a100"], gpus=8, share=Efficiency(flops=share)) for share in (0.2, 0.4))
    assert slow.compute_ms == pytest.approx(2 * fast.compute_ms) and slow.network_ms == fast.network_ms
    assert predict_seconds(stages, sizes, MACHINES["a100"], gpus=8, share=Efficiency(0.2)) > predict_seconds(
        stages, sizes, MACHINES["a100"], gpus=8, share=Efficiency(0.4))


def test_the_printed_plan_names_every_machine_and_stage():
    text = plan_text(Arguments(preset="speedrun"), [])
    tables = [line for line in text.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 80
    assert all(machine.name in text for machine in MACHINES.values())
    assert all(f"{window:>7}" in text for window in (128, 384, 640, 768)) and "338,821,120 tokens" in text


def test_flags_change_the_run():
    short_plan = make_plan(Arguments(preset="bytes", gpus=1), ["--train.steps", "7", "--model.layers", "2"])
    assert short_plan["steps"] == 7 and short_plan["tokens"] == 7 * 768


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "h10"}, "unknown device 'h10'; did you mean 'h100'"), ({"gpus": 0}, "--gpus must be at least 1, got 0"),
    ({"efficiency": 40.0}, "--efficiency is a share of a peak rate, above 0 and at most 1, got 40.0")])
def test_unknown_devices_and_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Arguments(preset="bytes", **arguments), [])
