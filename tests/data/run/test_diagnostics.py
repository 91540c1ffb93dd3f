"""Metrics of layers against direct computation; healthy ranges and their alarms."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_gpt
from configs.cli import parse
from configs.schema import Model
from data.run.diagnostics import activation_metrics, weight_metrics
from data.run.log import HEALTHY_RANGES, find_alarms
from data.run.metrics import LAYER_MEASURES, read_metrics
from model import GPT
from scripts.lab.figures import heat_maps

CONFIG = Model(layers=2, dim=16, head_dim=8, zero_init_projections=False, softcap="none")
SPHERE = replace(CONFIG, geometry="sphere", eigen_lr=0.3, logit_scale=4.0)
TOKENS = torch.arange(8).view(1, 8)


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=40, max_tokens=8)


def test_features_are_those_of_the_forward_pass_and_nothing_is_left_behind():
    model = build(CONFIG)
    logits, streams = model(TOKENS), []
    handle = model.blocks[1].register_forward_hook(lambda _m, _i, out: streams.append(out))
    metrics = activation_metrics(model, TOKENS)
    handle.remove()
    assert metrics["diag/block1/stream_rms"] == pytest.approx(streams[0].square().mean().sqrt().item())
    assert metrics["diag/logits/largest"] == pytest.approx(logits.abs().max().item())
    assert set(metrics) == {f"diag/block{i}/{name}_rms" for i in range(2) for name in ("stream", "attention", "mlp")} | {
        "diag/logits/rms", "diag/logits/largest"}
    assert torch.equal(model(TOKENS), logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_is_measured_too():
    """A graph that was compiled before the hooks were registered does not call them."""
    plain = activation_metrics(model := build(CONFIG), TOKENS)
    model.compile(backend="eager")
    with torch.no_grad():
        model(TOKENS)
    assert activation_metrics(model, TOKENS) == pytest.approx(plain)


def test_a_layer_without_attention_has_no_such_measure():
    assert "diag/block0/attention_rms" not in activation_metrics(build(replace(CONFIG, attention_free=(0,))), TOKENS)


def test_spectra_of_a_matrix_that_is_known():
    model = build(CONFIG)
    model.blocks[0].attention.q.weight.data = torch.diag(torch.tensor([3.0, *[1.0] * 14, 0.5]))
    metrics = weight_metrics(model)
    assert metrics["diag/0.attention.q/spectral"] == pytest.approx(3)
    assert metrics["diag/0.attention.q/frobenius"] == pytest.approx(math.sqrt(9 + 14 + 0.25))
    assert metrics["diag/0.attention.q/condition"] == pytest.approx(6)
    model.blocks[0].attention.q.weight.data.zero_()
    model.blocks[1].attention.q.weight.data[0, 0] = math.inf
    metrics = weight_metrics(model)
    assert metrics["diag/0.attention.q/condition"] == 0 and math.isnan(metrics["diag/1.attention.q/spectral"])


def test_factors_of_the_sphere_as_they_act():
    model = build(SPHERE)
    model.blocks[1].add2.alpha.stored.data[:2] *= torch.tensor([-3.0, 0.5])
    metrics = weight_metrics(model)
    assert metrics["diag/0.add1.alpha/factor"] == pytest.approx(0.3)
    assert metrics["diag/1.add2.alpha/factor"] == pytest.approx(0.3 * (14 + 3.5) / 16)
    assert metrics["diag/1.add2.alpha/factor_least"] == pytest.approx(0.15)
    assert metrics["diag/1.add2.alpha/factor_greatest"] == pytest.approx(0.9)
    assert metrics["diag/head.scale/factor"] == pytest.approx(4.0)
    assert metrics["diag/0.attention.norm_qk.scale/factor"] == pytest.approx(1)
    features = activation_metrics(build(SPHERE), TOKENS)
    assert features["diag/block0/stream_rms"] == pytest.approx(0.25)  # length 1 in 16 dimensions


# ---- Healthy ranges -----------------------------------------------------------------------------------------------------


def test_alarms_name_the_metric_the_range_and_the_reason():
    assert find_alarms({"optim/matrix/angle": 0.02, "diag/logits/largest": 15.0, "train/loss_nats": 1e9, "step": 3}) == {}
    assert find_alarms({"optim/matrix/angle": 0.9}) == {
        "optim/matrix/angle": "optim/matrix/angle is 0.9, outside 1e-05 to 0.5: "
                              "angle in radians that the matrices turn in one step"}
    (message,) = find_alarms({"diag/block7/stream_rms": 0.0}).values()
    assert message.startswith("diag/block7/stream_rms is 0, outside 0.001")
    assert find_alarms({"diag/x/condition": math.inf}) == {"diag/x/condition": "diag/x/condition is inf"}


def test_a_group_may_move_less_as_its_lr_falls_and_rests_without_alarm():
    record = {"optim/matrix/angle": 1e-7}
    assert len(find_alarms(record)) == 1 and find_alarms(record, {"matrix": 1e-3}) == {}
    assert find_alarms({"optim/matrix/angle": 0.0}, {"matrix": 0.0}) == {}
    assert len(find_alarms({"optim/matrix/angle": 0.9}, {"matrix": 0.0})) == 1


def test_every_range_has_a_length_and_a_reason():
    assert all(low < high and reason for _, low, high, reason in HEALTHY_RANGES)


# ---- Runs ----------------------------------------------------------------------------------------------------------------


def arguments(preset: str, folder: Path, *flags: str) -> list[str]:
    return [preset, "--log.wandb", "disabled", "--data.val_bytes", "2048", "--log.sample_tokens", "0",
            "--run.dir", str(folder), "--run.name", "run", "--train.steps", "6", *flags]


def records(folder: Path, *flags: str, preset: str = "bytes") -> list[dict]:
    train_gpt.main(parse(arguments(preset, folder, *flags)))
    return read_metrics(folder / "run" / "metrics.jsonl")


@pytest.mark.parametrize("preset", ["tiny", "bytes", "ngpt_bytes"])
def test_presets_raise_no_alarm_and_write_their_layers(preset, tmp_path, capsys):
    flags = ["--train.val_every_steps", "3", "--log.layers_every_steps", "3", "--model.bigram_buckets", "64",
             "--train.batch_tokens", "1024" if preset == "tiny" else "768"]
    log = records(tmp_path, *flags, preset=preset)
    lines = [line for line in log if "diag/logits/rms" in line]
    assert [line["step"] for line in lines] == [3, 6] and "diag/0.attention.q/spectral" in lines[0]
    assert {name.split("/")[-1] for name in lines[0] if name.startswith("diag/")} <= set(LAYER_MEASURES)
    assert "alarm at" not in capsys.readouterr().out and not any("alarms" in line for line in log)
    maps = {heat_map["name"]: heat_map for heat_map in heat_maps(lines)}  # what the report draws
    assert maps["diag stream_rms"]["steps"] == [3, 6] and "0.mlp.up" in maps["diag angle"]["rows"]
    assert ("0.add1.alpha" in maps["diag factor"]["rows"]) if preset == "ngpt_bytes" else "diag factor" not in maps


def test_a_wild_run_raises_an_alarm_once_and_goes_on(tmp_path, capsys):
    log = records(tmp_path, "--train.val_every_steps", "2", "--optim.matrix.lr", "20")
    assert capsys.readouterr().out.count("optim/matrix/angle is") == 1
    assert any(line.get("alarms") for line in log) and log[-1]["step"] == 6


def test_without_diagnostics_nothing_is_measured_and_nothing_alarms(tmp_path, capsys):
    log = records(tmp_path, "--log.no_diagnostics", "--optim.matrix.lr", "20", "--log.layers_every_steps", "6")
    assert "alarm" not in capsys.readouterr().out
    assert not any("alarms" in line or "optim/matrix/angle" in line for line in log)
    assert log[-2]["diag/0.attention.q/angle"] > 0  # layers were asked for


def test_measuring_changes_nothing(tmp_path):
    flags = ["--log.every_steps", "1", "--model.smear"]
    plain, measured = (records(tmp_path / name, *flags, "--log.layers_every_steps", every)
                       for name, every in (("plain", "0"), ("measured", "2")))
    losses = [[line[key] for line in log for key in ("train/loss_nats", "val/loss_nats") if key in line]
              for log in (plain, measured)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert not any(name.startswith("diag/") for line in plain for name in line)


def test_an_interrupted_run_measures_at_the_same_steps(tmp_path):
    flags = ["--log.layers_every_steps", "2", "--train.val_every_steps", "3"]
    whole = records(tmp_path / "whole", *flags)

    def stop(trainer: train_gpt.Trainer, *arguments: object) -> torch.Tensor:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(trainer, *arguments)

    gradients = train_gpt.Trainer.gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "gradients", stop)
        records(tmp_path / "cut", *flags)
    cut = records(tmp_path / "cut", *flags, "--run.resume")
    measured = [[{k: v for k, v in line.items() if k.startswith(("diag/", "step"))} for line in log
                 if "diag/logits/rms" in line] for log in (whole, cut)]
    assert measured[0] == measured[1] and [line["step"] for line in measured[0]] == [2, 4, 6]


def test_ranks_measure_what_one_does(tmp_path):
    flags = ["--train.steps", "3", "--log.layers_every_steps", "3", "--model.layers", "2", "--run.device", "cpu",
             "--model.mlp_dim", "32", "--optim.matrix.weight_decay", "0.1",  # the MLP's banks are too small to be cut
             "--model.no_zero_init_projections"]  # whose first gradients are rounding, made large by the orthogonalisation
    alone = records(tmp_path / "alone", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train_gpt.__file__]
    done = subprocess.run([*command, *arguments("bytes", tmp_path / "both", *flags)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    both = read_metrics(tmp_path / "both" / "run" / "metrics.jsonl")
    one, two = (next({k: v for k, v in line.items() if k.startswith(("diag/", "optim/")) and not k.endswith("condition")}
                     for line in log if "diag/logits/rms" in line) for log in (alone, both))  # of small values: rounding
    assert one == pytest.approx(two, rel=1e-3) and "diag/1.mlp.down/angle" in one and "optim/matrix/equilibrium_angle" in one
