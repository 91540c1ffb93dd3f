"""Measures of layers against direct computation; bands and their alarms."""

import math
from dataclasses import replace

import pytest
import torch

import train_gpt
from configs.cli import parse
from configs.schema import Model
from data.alarms import BANDS, alarms
from data.runs import read_metrics
from layers.diagnostics import feature_measures, weight_measures
from model import GPT

CONFIG = Model(layers=2, dim=16, head_dim=8, zero_init_projections=False, softcap="none")
SPHERE = replace(CONFIG, geometry="sphere", eigen_lr=0.3, logit_scale=4.0)
TOKENS = torch.arange(8).view(1, 8)


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=40, max_tokens=8)


def test_features_are_those_of_the_forward_pass_and_nothing_is_left_behind():
    model = build(CONFIG)
    before, seen = model(TOKENS), []
    handle = model.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    found = feature_measures(model, TOKENS)
    handle.remove()
    assert found["diag/block1/stream_rms"] == pytest.approx(seen[0].square().mean().sqrt().item())
    assert found["diag/logits/largest"] == pytest.approx(before.abs().max().item())
    assert set(found) == {f"diag/block{i}/{name}_rms" for i in range(2) for name in ("stream", "attention", "mlp")} | {
        "diag/logits/rms", "diag/logits/largest"}
    assert torch.equal(model(TOKENS), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_without_attention_has_no_such_measure():
    assert "diag/block0/attention_rms" not in feature_measures(build(replace(CONFIG, attention_free=(0,))), TOKENS)


def test_spectra_of_a_matrix_that_is_known():
    model = build(CONFIG)
    model.blocks[0].attention.q.weight.data = torch.diag(torch.tensor([3.0, *[1.0] * 14, 0.5]))
    found = weight_measures(model)
    assert found["diag/0.attention.q/spectral"] == pytest.approx(3)
    assert found["diag/0.attention.q/frobenius"] == pytest.approx(math.sqrt(9 + 14 + 0.25))
    assert found["diag/0.attention.q/condition"] == pytest.approx(6)


def test_factors_of_the_sphere_as_they_act():
    found = weight_measures(build(SPHERE))
    assert found["diag/1.add2.alpha/factor"] == pytest.approx(0.3)
    assert found["diag/head.scale/factor"] == pytest.approx(4.0)
    features = feature_measures(build(SPHERE), TOKENS)
    assert features["diag/block0/stream_rms"] == pytest.approx(0.25)  # length 1 in 16 dimensions


# ---- Bands ---------------------------------------------------------------------------------------------------------------


def test_alarms_name_the_measure_the_band_and_the_reason():
    assert alarms({"optim/matrix/angle": 0.02, "diag/logits/largest": 15.0, "train/loss_nats": 1e9, "step": 3}) == []
    (sentence,) = alarms({"optim/matrix/angle": 0.9})
    assert sentence == "optim/matrix/angle is 0.9, outside 1e-05 to 0.5: the matrices turn so much in a step"
    assert alarms({"diag/block7/stream_rms": 0.0})[0].startswith("diag/block7/stream_rms is 0, outside 0.001")
    assert alarms({"diag/x/condition": math.inf}) == ["diag/x/condition is inf"]


def test_every_band_is_one():
    assert all(band.low < band.high and band.why for band in BANDS)


@pytest.mark.parametrize("preset", ["tiny", "bytes", "ngpt_bytes"])
def test_presets_raise_no_alarm_and_write_their_layers(preset, tmp_path, capsys):
    flags = ["--train.steps", "6", "--train.val_every_steps", "3", "--log.layers_every_steps", "3",
             "--log.wandb", "disabled", "--data.val_bytes", "2048", "--log.sample_tokens", "0",
             "--run.dir", str(tmp_path), "--run.name", "run", "--model.bigram_buckets", "64",
             "--train.batch_tokens", "1024" if preset == "tiny" else "768"]
    train_gpt.main(parse([preset, *flags]))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "diag/logits/rms" in line]
    assert [line["step"] for line in lines] == [3, 6] and "diag/0.attention.q/spectral" in lines[0]
    assert "alarm at" not in capsys.readouterr().out


def test_a_wild_run_raises_an_alarm_once(tmp_path, capsys):
    flags = ["--train.steps", "6", "--train.val_every_steps", "2", "--data.val_bytes", "2048", "--log.wandb", "disabled",
             "--log.sample_tokens", "0", "--run.dir", str(tmp_path), "--run.name", "run", "--optim.matrix.lr", "20"]
    train_gpt.main(parse(["bytes", *flags]))
    assert capsys.readouterr().out.count("optim/matrix/angle is") == 1
    assert any(line.get("alarms") for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
