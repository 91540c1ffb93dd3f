"""Sampling from a run's folder."""

from pathlib import Path

import pytest

import train_gpt
from configs.cli import parse
from scripts.sample import Sample, sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has memorised one sentence."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "my.txt").write_text("steepest descent under a norm. " * 400)
    flags = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.train_files", str(folder / "my.txt"),
             "--data.sequence_tokens", "64", "--model.dim", "32", "--model.head_dim", "16", "--model.bigram_buckets", "64",
             "--train.steps", "60", "--train.batch_tokens", "512", "--train.val_every_steps", "0", "--log.wandb", "disabled",
             "--run.dir", str(folder), "--run.name", "run"]
    train_gpt.main(parse(["tiny", *flags]))
    return folder / "run"


def test_the_model_continues_a_memorised_sentence(run):
    text = sample(Sample(folder=run, prompt="steepest descent ", tokens=30, temperature=0.0))
    assert text.startswith("steepest descent under a norm.")


def test_equal_seeds_give_equal_text(run):
    first, same, other = (sample(Sample(folder=run, prompt="a", tokens=40, temperature=3.0, seed=s)) for s in (1, 1, 2))
    assert first == same != other
    assert len(first) > 30


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"temperature": -1.0}])
def test_sampling_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="--top_k must be at least 1 and --temperature at least 0"):
        sample(Sample(folder=Path(tmp_path), **settings))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        sample(Sample(folder=Path(tmp_path)))
