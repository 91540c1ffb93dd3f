"""Run folders of format 1, stopped after four of eight steps: `tiny` continues to the bit as under the code that wrote it.

The recipe of `speedrun_cpu` is another one today: the settings of its old folder can be read, its weights not continued.
"""

import json
import shutil

import pytest
import torch

import train_gpt
from configs.cli import parse
from configs.serialize import config_from_dict
from tests.golden.runs import HERE, SAME_ANYWHERE, losses, machine, write_text

FORMAT1 = HERE / "format1"
RESUMED = json.loads((FORMAT1 / "resumed.json").read_text())
COMMON = ("--data.source text --data.train_files text.txt --data.val_bytes 512 --data.tokenizer bpe "
          "--data.bpe_vocab_tokens 260 --data.sequence_tokens 32 --train.batch_tokens 128 --train.steps 8 "
          "--train.val_every_steps 3 --model.dim 8 --model.head_dim 4 --model.vocab_multiple 1 --model.bigram_buckets 64 "
          "--run.device cpu --run.compile off --log.every_steps 1 --log.wandb disabled --log.sample_tokens 0").split()
FLAGS = {
    "tiny": "--train.lookahead 0.6 --train.weight_average 0.5".split(),
    "speedrun_cpu": "--model.bigram_signs 16".split(),
}
CHANGED = "speedrun_cpu"  # the preset whose recipe is another one today
WRITTEN = 5  # losses that a folder already contains: of four steps, and of the validation after the third


def resume(preset, folder, monkeypatch):
    """Resume a copy of the preset's folder; return all losses in its metrics."""
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    write_text(folder)
    shutil.copytree(FORMAT1 / preset, folder / "runs" / preset)
    train_gpt.main(parse([preset, *COMMON, *FLAGS[preset], "--run.name", preset, "--run.resume"]))
    return losses(folder / "runs" / preset)


@pytest.mark.parametrize("preset", [preset for preset in FLAGS if preset != CHANGED])
def test_an_old_folder_continues_with_the_same_losses(preset, tmp_path, monkeypatch):
    losses_nats = resume(preset, tmp_path, monkeypatch)
    golden = RESUMED["losses_nats"][preset]
    assert losses_nats[:WRITTEN] == golden[:WRITTEN] == losses(FORMAT1 / preset)
    assert losses_nats[:WRITTEN + SAME_ANYWHERE] == pytest.approx(golden[:WRITTEN + SAME_ANYWHERE], rel=1e-6)
    assert losses_nats == pytest.approx(golden, rel=5e-3)
    if machine() != RESUMED["machine"]:
        pytest.skip(f"close, but not compared to the bit: recorded on another machine, {RESUMED['machine']}")
    assert losses_nats == golden


def test_the_settings_of_an_old_folder_of_another_recipe_are_read_and_its_weights_refused(tmp_path, monkeypatch):
    saved = json.loads((FORMAT1 / CHANGED / "config.json").read_text())
    run = config_from_dict(saved)
    assert run.preset == CHANGED and run.model.skips == tuple(saved["model"]["skips"])
    with pytest.raises(ValueError, match=r"^\S*checkpoint\.safetensors ") as error:
        resume(CHANGED, tmp_path, monkeypatch)
    assert "another --run.name" in str(error.value) and "\n" not in str(error.value)
