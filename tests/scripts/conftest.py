"""Fabricated run folders, for tests of the scripts that read them."""

import json
import math
import random

import pytest

from configs.presets import PRESETS
from configs.serialize import config_to_dict
from data.run.metrics import SUMMARY_KEYS

PARAMETERS = 868_373  # of the preset `bytes`, as train_gpt.py counts them; smear has 13 of them
MEASURES = {"lr": 0.02, "update_rms": 0.0005, "weight_size": 1.2, "angle": 0.01}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))  # unlike the real one, it does not wait for the disk


def write_run(folder, *, seed=1, experiment="", settings=None, steps=240, loss=2.0, records=50, finished=True,
              parameters=PARAMETERS):
    """Write the folder of a run with final loss `loss`.

    It has `records` training losses, and ten validations with measures of two parameter groups. `settings` go by dotted
    names. Step s has seen 768 s tokens and has taken s / 4 + seed seconds.
    """
    nested = config_to_dict(PRESETS["bytes"]())
    for name, value in {"run.seed": seed, "train.steps": steps, "log.experiment": experiment, **(settings or {})}.items():
        *groups, field = name.split(".")
        inner = nested
        for group in groups:
            inner = inner[group]
        inner[field] = value
    write_json(folder / "config.json", nested)
    write_json(folder / "env.json", {"python": "3.11.7", "cpu": "a processor", "variables": {}})
    rng = random.Random(seed)
    lines = []
    for i in range(1, records + 1):
        step = round(i * steps / records)
        stamp = {"step": step, "tokens": 768 * step, "train_seconds": step / 4 + seed}
        mean_loss = loss + 3 * math.exp(-5 * step / steps) - 3 * math.exp(-5)
        lines.append(stamp | {"train/loss_nats": mean_loss + rng.gauss(0, 0.05)})
        if i % (records // 10) == 0:
            measures = {f"optim/{group}/{name}": size * factor * (1 - 0.8 * step / steps)
                        for group, factor in {"matrix": 1, "embed": 10}.items() for name, size in MEASURES.items()}
            lines.append(stamp | {"val/loss_nats": mean_loss, "val/bits_per_byte": mean_loss / math.log(2)} | measures)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"val_loss_nats": loss, "val_bits_per_byte": loss / math.log(2), "best_val_loss_nats": loss, "steps": steps,
             "tokens": 768 * steps, "train_seconds": steps / 4 + seed, "seed": seed, "parameters": parameters,
             "device": "cpu", "world_size": 1}
    if finished:
        write_json(folder / "summary.json", dict.fromkeys(SUMMARY_KEYS) | summary)


@pytest.fixture(scope="session")
def fabricate():
    """Return the function `write_run`."""
    return write_run


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory):
    """Return a folder of runs: four learning rates with three seeds each, a run without smear, and its ablation table."""
    lab = tmp_path_factory.mktemp("lab")
    for lr, loss in {0.01: 2.10, 0.02: 2.02, 0.04: 2.00, 0.08: 2.06}.items():
        for seed in (1, 2, 3):
            write_run(lab / f"lr{lr}-seed{seed}", seed=seed, experiment=f"lr{lr}", settings={"optim.matrix.lr": lr},
                      loss=loss + 0.01 * seed)
    write_run(lab / "no_smear-seed1", experiment="no_smear", settings={"model.smear": False}, loss=2.3,
              parameters=PARAMETERS - 13)
    row = {"name": "no_smear", "flags": ["--model.no_smear"], "n": 3, "mean": 2.3, "sd": 0.01, "difference": 0.27,
           "low": 0.24, "high": 0.30, "p": 1e-4, "p_holm": 2e-4, "seconds_difference": -1.0, "verdict": "hurts"}
    rows = [row, row | {"name": "no_softcap", "difference": -0.002, "low": -0.03, "high": 0.026, "p_holm": 0.8,
                        "verdict": "no difference seen"},
            row | {"name": "bytes", "difference": None, "low": None, "high": None, "p": None, "p_holm": None, "verdict": ""}]
    write_json(lab / "ablation.json", {"base": "bytes", "metric": "val_loss_nats", "rows": rows})
    return lab
