"""scripts.plan against the figures and logs of the public record, and against the optimizer's own memory."""

import json
from dataclasses import replace

import pytest
import torch

from configs.cli import parse_row
from configs.presets import PRESETS
from model import GPT
from optim.comm import Comm
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.sharded import ShardedOptimizer
from scripts.lab import workload as workloads
from scripts.lab.costs import MACHINES, Assumptions
from scripts.lab.probe import probe, read_rates, write_rates
from scripts.lab.workload import measure_sizes, newton_schulz_flops, public_workload, workload
from scripts.plan import STEP_NOTES, Arguments, main, make_plan, plan_lines, predict_stage, run_seconds


@pytest.fixture(autouse=True)
def no_measured_rates(tmp_path, monkeypatch):
    """Plan with the default assumptions, whatever a probe of this machine has stored."""
    monkeypatch.setattr("scripts.plan.RATES", tmp_path / "rates.json")


@pytest.fixture(scope="module")
def speedrun():
    return workload(parse_row("speedrun", ["--train.micro_tokens", "16384"]), Assumptions())


def plan_text(args, flags=()):
    return "\n".join(plan_lines(make_plan(args, list(flags))))


def step_ms(load, first, gpus, machine="h100"):
    """Milliseconds of a step of the stage that begins at a step."""
    stage = next(stage for stage in load.stages if stage.first == first)
    return predict_stage(stage, load, MACHINES[machine], gpus, Assumptions()).step_ms


# Milliseconds a step from the logs of modded-nanogpt, in the stages that begin at steps 0, 423 and 847, and seconds in all.
# The last row's milliseconds are of slightly older code, the others are of the very code.
LOGGED = [("record89", 1, (229.6, 421.8, 619.4), 547.4), ("record89", 8, (32.2, 56.8, 82.4), 73.8),
          ("record344", 1, (217.1, 385.4, 561.1), 518.0), ("record344", 8, (30.5, 51.9, 75.1), 70.0),
          ("record89", 8, (32.4, 58.1, 84.0), 73.8)]


@pytest.mark.parametrize(("script", "gpus", "stage_ms", "seconds"), LOGGED)
def test_public_scripts_are_predicted_within_a_tenth(script, gpus, stage_ms, seconds):
    """No assumption was fitted to these logs."""
    load = public_workload(script, Assumptions())
    for first, logged in zip((0, 423, 847), stage_ms, strict=True):
        assert step_ms(load, first, gpus) == pytest.approx(logged, rel=0.10)
    predicted, steps = run_seconds(load, MACHINES["h100"], gpus, Assumptions()), sum(stage.steps for stage in load.stages)
    assert predicted == pytest.approx(seconds, rel=0.10)
    average = {("record89", 1): 425.8, ("record344", 1): 393.9}.get((script, gpus), 1e3 * seconds / steps)
    assert 1e3 * predicted / steps == pytest.approx(average, rel=0.10)


@pytest.mark.parametrize(("machine", "gpus", "logged_ms"), [("h200", 1, 1070.0), ("h100", 8, 154.0)])
def test_the_estimate_of_a_run_without_recorded_graphs(monkeypatch, machine, gpus, logged_ms):
    """The reference of track 3 on one H200 (log of its author, May 2026) and on 8 H100s."""
    monkeypatch.setattr(workloads, "recorded", lambda file: {})
    load = workload(PRESETS["track3"](), Assumptions())
    assert load.parameters == 162_354_816 and "bytes are estimated as 3.5 times the stored activations" in load.source
    assert step_ms(load, 0, gpus, machine) == pytest.approx(logged_ms, rel=0.10)


def test_the_description_of_a_public_script_is_complete():
    """Its products are those of its matrices: 6 operations a weight and token, whichever kernel multiplies."""
    tables = json.loads((workloads.BENCHMARKS / "record_step.json").read_text())
    for script, qkv_out in (("record89", 4 * 768), ("record344", 2 * 576 + 2 * 768)):
        weights = 768 * (10 * qkv_out + 11 * 2 * 3072 + 50_304)
        for stage in tables["presets"][script]["stages"]:
            tally = stage["training"]["forward_backward"]
            gates = sum(p["flops"] for p in tally["products"] if 64 in (p["m"], p["n"], p["k"]))
            assert sum(p["flops"] for p in tally["products"]) - gates == 6 * weights * stage["pass_tokens"]
            assert tally["bytes"] == sum(kernel["bytes"] for kernel in tally["triton"] + tally["own"])
            assert tally["other_bytes"] == sum(kernel["bytes"] for kernel in tally["other"])
            names = [kernel["name"] for kernel in tally["triton"] + tally["own"] + tally["other"]]
            assert set(names) <= tables["rules"].keys()


def test_its_plan_names_its_logs_and_takes_no_flags():
    text = plan_text(Arguments(preset="record89", gpus=1))
    assert "its public logs: 547.3 s (+" in text and "1,285 steps, 338,821,120 tokens" in text
    assert "memory of a rank" not in text
    assert "its public logs" not in plan_text(Arguments(preset="record89", gpus=1, device="h200"))
    with pytest.raises(ValueError, match="record89 is a public script and takes no flags, got --train.steps 5"):
        make_plan(Arguments(preset="record89"), ["--train.steps", "5"])


def test_assumed_steps_are_printed_with_their_source(monkeypatch):
    monkeypatch.setitem(STEP_NOTES, "bytes", "its number of steps is an assumption: a source")
    assert "its number of steps is an assumption: a source" in plan_text(Arguments(preset="bytes"))
    assert "assumption: a source" not in plan_text(Arguments(preset="tiny"))


# ---- Recorded graphs ------------------------------------------------------------------------------------------------

EMPTY = {"bytes": 0, "launches": 0, "other_bytes": 0, "triton": [], "own": [], "other": [], "products": [], "attention": []}


def recorded_entry():
    """Counts of a preset whose passes move 1 GB in compiled code and 2 GB in eager code."""
    compiled = EMPTY | {"bytes": 10**9, "launches": 100, "own": [{"name": "relu2_product", "count": 11, "bytes": 10**8}]}
    eager = EMPTY | {"other_bytes": 2 * 10**9, "launches": 7, "other": [{"name": "add_", "count": 7, "bytes": 2 * 10**9}]}
    update = {"step": 1, "banks": 1, "inference": compiled, "eager": eager, "collectives": [["all_reduce", 1000]]}
    stages = [{"first_step": first, "sequence_tokens": 16_384, "pass_tokens": 16_384, "windows": [window, None],
               "training": {"graphs": 2, "peak_bytes": 5 * 10**9, "forward": compiled, "backward": compiled, "eager": eager}}
              for first, window in ((0, 128), (423, 384), (847, 640), (1270, 768))]
    return {"capability": "9.0", "layers": 11, "stages": stages, "update": {"8": [update]}}


def test_recorded_counts_are_used_until_a_flag_changes_the_model(monkeypatch):
    monkeypatch.setattr(workloads, "recorded", lambda file: {"speedrun": recorded_entry()})
    load = workload(parse_row("speedrun", ["--train.micro_tokens", "16384"]), Assumptions())
    assert load.source.startswith("bytes, launches and products are those of the graphs compiled for capability 9.0")
    (passes, work), (update,) = load.stages[2].passes(8), load.updates(8)
    # Three passes of 16,384 tokens on each of eight ranks. The MLP's kernel is a product, whose bytes are its own.
    assert passes == 3 and work.memory_bytes == 4 * 10**9 - 2 * 10**8 and (work.launches, work.eager) == (200, 7)
    assert work.products[0].flops == 11 * 2 * 16_384 * 768 * 3072 and work.products[0].dtype == "bfloat16"
    assert update.collectives == (("all_reduce", 1000),) and load.activation_bytes(16_384) == 5e9
    assert load.updates(64)[0].work.memory_bytes == pytest.approx(update.work.memory_bytes / 8)
    # Steps change no graph; the model does, and so does a schedule with a window that is not recorded.
    assert workload(parse_row("speedrun", ["--train.steps", "2000"]), Assumptions()).source == load.source
    for flags in (["--model.no_key_offset"], ["--model.window_tokens", "256"]):
        assert "no compiled graph is recorded" in workload(parse_row("speedrun", flags), Assumptions()).source
    monkeypatch.setattr(workloads, "recorded", lambda file: {"speedrun": recorded_entry() | {"layers": 5}})
    assert "no compiled graph is recorded" in workload(PRESETS["speedrun"](), Assumptions()).source


def test_a_plan_without_recorded_graphs_says_so():
    text = plan_text(Arguments(preset="bytes", gpus=1), ["--model.layers", "2"])
    assert "no compiled graph is recorded for this run: bytes are estimated" in text
    assert "python -m benchmarks.compiled_step bytes --save" in text


# ---- Sizes, stages and ranks ----------------------------------------------------------------------------------------


def test_operations_of_track3():
    """6 operations a weight and token give 0.418 PFLOP a step with attention at half of the context; blocks add to it."""
    sizes, model, ((_, steps, values),) = measure_sizes(PRESETS["track3"]())
    assert steps == 3250 and values.batch_tokens * model.flops_per_token(1024) == pytest.approx(0.418e15, rel=0.002)
    assert sizes.newton_schulz_flops() == pytest.approx(3.9e12, rel=0.05)  # 72 matrices, 12 Newton-Schulz steps
    assert newton_schulz_flops(768, 3072, 1) == newton_schulz_flops(3072, 768, 1) == 4 * 768**2 * 3072 + 2 * 768**3


def test_the_speedruns_stages(speedrun):
    assert [(s.first, s.steps) for s in speedrun.stages] == [(0, 423), (423, 424), (847, 423), (1270, 15)]
    assert sum(s.steps * s.values.batch_tokens for s in speedrun.stages) == 338_821_120


def test_a_sequence_is_not_divided_between_ranks(speedrun):
    """The first stage has 8 sequences of 16,384 tokens: 64 ranks are no faster than 8."""
    first, third = speedrun.stages[0], speedrun.stages[2]
    assert [third.portion(gpus) for gpus in (1, 8, 16, 64)] == [(24, 24, 1), (24, 3, 1), (24, 2, 1), (24, 1, 1)]
    assert [third.passes(gpus)[0] for gpus in (1, 8, 16, 64)] == [24, 3, 2, 1]
    assert first.passes(8) == first.passes(64)
    assert "keeps no more than 8 of 64 ranks busy" in plan_text(Arguments(preset="speedrun", gpus=64))


def test_one_rank_sends_nothing_and_tables_are_sent_at_every_second_step(speedrun):
    one, eight = (make_plan(Arguments(preset="speedrun", gpus=gpus), [])["stages"][0] for gpus in (1, 8))
    assert one["network_ms"] == one["sent_bytes"] == 0 < eight["network_ms"]
    assert eight["sent_bytes"] < 0.65 * 7 / 8 * 2 * eight["weight_bytes"]


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
    weight_bytes, state_bytes = measure_sizes(run)[0].rank_bytes(8)
    assert weight_bytes == sum(bank.weights.nbytes for bank in banks) == sum(bank.grads.nbytes for bank in banks)
    assert state_bytes == pytest.approx(sum(t.nbytes for bank in banks for t in bank.state.values()), rel=1e-3)


def test_a_plan_that_does_not_fit_has_a_note():
    text = plan_text(Arguments(preset="track3", gpus=1, device="4090"))
    assert "this does not fit: lower --train.micro_tokens (65,536)" in text and "* does not fit" in text
    text = plan_text(Arguments(preset="track3", gpus=1, device="4090"), ["--train.micro_tokens", "8192"])
    assert "this does not fit" not in text
    assert "banks are padded to a multiple of 1,024 ranks" in plan_text(Arguments(preset="track3", gpus=1024))


# ---- Text, assumptions, probe ---------------------------------------------------------------------------------------


def test_the_printed_plan_names_every_machine_stage_and_assumption():
    lines = plan_lines(make_plan(Arguments(preset="speedrun"), []))
    text = "\n".join(lines)
    assert max(len(line) for line in lines if line.startswith(" ") or "assumed" in line) <= 80
    assert all(machine.name in text for machine in MACHINES.values())
    assert all(f"{window:>7}" in text for window in (128, 384, 640, 768)) and "338,821,120 tokens" in text
    joined = " ".join(text.split())
    assert all(f"{name} {getattr(Assumptions(), name):.4g} " in joined for name in Assumptions.__slots__)


def test_parts_of_a_step_add_up():
    for row in make_plan(Arguments(preset="speedrun"), [])["stages"]:
        parts = ("products", "attention", "memory", "gaps", "update", "network", "host")
        assert row["step_ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in parts))


def test_flags_change_the_run_and_assumptions_its_time():
    short_plan = make_plan(Arguments(preset="bytes", gpus=1), ["--train.steps", "7", "--model.layers", "2"])
    assert short_plan["steps"] == 7 and short_plan["tokens"] == 7 * 768
    slow = Arguments(preset="bytes", gpus=1, assume=Assumptions(product_frac=0.325, product_ramp_us=0.0))
    fast = replace(slow, assume=Assumptions(product_ramp_us=0.0))
    slow, fast = (make_plan(args, [])["stages"][0]["products_ms"] for args in (slow, fast))
    assert slow == pytest.approx(2 * fast)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "h10"}, "unknown device 'h10'; did you mean 'h100'"), ({"gpus": 0}, "--gpus must be at least 1, got 0"),
    ({"preset": "record98"}, "unknown preset 'record98'; did you mean 'record89'"),
    ({"assume": Assumptions(product_frac=40.0)}, "--assume.product_frac is a share of a peak rate, above 0 and at most 1"),
    ({"assume": Assumptions(gap_us=-1.0)}, "--assume.gap_us must not be negative, got -1.0")])
def test_unknown_devices_and_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Arguments(**{"preset": "bytes"} | arguments), [])


def test_a_probe_is_read_by_later_plans_of_its_device_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    rates = probe(MACHINES["h100"], device="cpu", size=64)
    assert rates.keys() <= set(Assumptions.__slots__) and all(value > 0 for value in rates.values())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--probe needs a CUDA device"):
            main(Arguments(probe=True), [])
    file = tmp_path / "measured.json"
    write_rates(file, "h100", {"product_frac": 0.5, "memory_frac": 0.6})
    assert read_rates(file, "a100", Assumptions()) == (Assumptions(), [])
    chosen, measured = read_rates(file, "h100", Assumptions(memory_frac=0.9))
    assert measured == ["product_frac"] and (chosen.product_frac, chosen.memory_frac) == (0.5, 0.9)
    monkeypatch.setattr("scripts.plan.RATES", file)
    assert "product_frac 0.5 of peak bfloat16 FLOP/s (measured on this machine)" in plan_text(Arguments(preset="bytes"))
