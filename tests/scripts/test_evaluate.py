"""Evaluating and exporting a trained run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import train_gpt
from configs.cli import parse
from data.run.checkpoint import load_checkpoint
from optim.schedule import Schedule
from scripts.evaluate import Arguments as Evaluation
from scripts.evaluate import Question, ending_cross_entropy, evaluate_hellaswag, main, parse_contexts, read_questions
from scripts.export import export
from scripts.lab.models import evaluation_weights, load_exported, load_trained
from scripts.sample import Sample, sample

TEXT = "steepest descent under a norm. the norm is chosen by the role of the tensor. "


def short_run(folder: Path, *more: str) -> Path:
    """Train thirty steps, with windows that grow, on a text of one repeated line; return the run's folder."""
    (folder / "my.txt").write_text(TEXT * 300)
    flags = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.train_files", str(folder / "my.txt"),
             "--data.sequence_tokens", "32", "--model.dim", "32", "--model.head_dim", "16", "--model.bigram_buckets", "64",
             "--model.window_tokens", "8", "--schedule.window_tokens", "0=1 100%=2", "--train.steps", "30",
             "--train.batch_tokens", "512", "--train.val_every_steps", "0", "--log.wandb", "disabled",
             "--log.sample_tokens", "0", "--run.dir", str(folder), "--run.name", "run"]
    train_gpt.main(parse(["tiny", *flags, *more]))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("evaluate"))


def evaluate(run: Path, capsys, *, context: str = "1x", **options: object) -> dict:
    main(Evaluation(folder=run, context=context, json=True, **options))
    return json.loads(capsys.readouterr().out)


def test_at_the_training_context_it_is_the_loss_of_the_summary(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    row = evaluate(run, capsys)["contexts"][0]
    assert row["context_tokens"] == 32
    assert row["val_loss_nats"] == pytest.approx(summary["val_loss_nats"], abs=1e-6)
    assert row["val_bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], abs=1e-6)


def test_several_contexts(run, capsys):
    rows = evaluate(run, capsys, context="1x,2x,100")["contexts"]
    assert [row["context_tokens"] for row in rows] == [32, 64, 100]
    assert len({row["val_loss_nats"] for row in rows}) == 3


@pytest.mark.parametrize("text", ["2y", "x", "0x", "", "1x,,2x"])
def test_invalid_contexts_are_quoted(text):
    with pytest.raises(ValueError, match=r"--context takes lengths like 2x or 512"):
        parse_contexts(text, 32)


def test_endings_are_scored_by_the_mean_of_their_tokens(run):
    trained = load_trained(run)
    tokens = [trained.source.tokenizer.end_of_text, *b"steepest des", *b" cent"]
    logits = trained.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    expected = -sum(logits[i - 1, tokens[i]] for i in range(len(tokens) - 5, len(tokens))) / 5
    with torch.no_grad():
        torch.testing.assert_close(ending_cross_entropy(trained, "steepest des", "cent"), expected)


def test_hellaswag_counts_right_endings(run, tmp_path):
    file = tmp_path / "questions.jsonl"
    good = {"ctx": "steepest descent", "endings": ["qqq zzz", "under a norm.", "#!?", "XYZXYZ"], "label": 1}
    file.write_text("\n".join(json.dumps(row) for row in (good, good | {"label": 0})) + "\n")
    assert list(read_questions(file))[1] == Question(good["ctx"], good["endings"], 0)
    assert evaluate_hellaswag(load_trained(run), file) == {"hellaswag_accuracy": 0.5, "hellaswag_questions": 2}


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ('{"ctx": 1}\n', "line 1"),
                                                  ("no json\n", "line 1"), ("", "holds no question")])
def test_files_without_questions_are_refused(run, tmp_path, content, message):
    file = tmp_path / "file.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_hellaswag(load_trained(run), file)


def test_an_exported_model_is_built_again_from_its_file_alone(run, tmp_path):
    target = tmp_path / "model.safetensors"
    trained = load_trained(run)
    assert export(run, target) == sum(p.numel() for p in trained.model.parameters())
    with safe_open(target, "pt") as file:
        assert file.metadata()["vocab_size"] == "257" and json.loads(file.metadata()["document_start"]) == 256
    again, tokens = load_exported(target), torch.arange(32).view(1, 32)
    assert again.run == trained.run
    assert torch.equal(again.model(tokens), trained.model(tokens))
    options = {"prompt": "steepest", "tokens": 20}
    assert sample(Sample(folder=target, **options)) == sample(Sample(folder=run, **options))


@pytest.mark.parametrize("content", [b"", b"no tensors", save({"weight": torch.ones(2)})], ids=["empty", "text", "others"])
def test_files_that_were_not_exported_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors holds no exported model .* python -m scripts.export"):
        load_exported(tmp_path / "model.safetensors")


def test_the_windows_are_those_of_the_last_step(run):
    """Of 8 tokens at first, nearly 16 at the end."""
    trained, tokens = load_trained(run), torch.arange(32).view(1, 32)
    last = Schedule(trained.run).values(29).window_tokens
    assert last == trained.model.config.window_tokens > trained.run.model.window_tokens == 8
    assert torch.equal(trained.model(tokens), trained.model(tokens, window=last))
    assert not torch.equal(trained.model(tokens), trained.model(tokens, window=8))


@pytest.mark.parametrize("flags", ["", "--train.weight_average_blend 0.5", "--train.weight_average_blend 0 "
                                   "--optim.embed.extra.average_blend 0.65 --optim.matrix.extra.average_blend 0.5"])
def test_the_weights_are_those_that_the_summary_judged(tmp_path, capsys, flags):
    """Averaged, which the checkpoint's own are not."""
    run = short_run(tmp_path, "--train.weight_average", "0.9", *flags.split())
    capsys.readouterr()
    judged = json.loads((run / "summary.json").read_text())["val_loss_nats"]
    assert evaluate(run, capsys)["contexts"][0]["val_loss_nats"] == pytest.approx(judged, abs=1e-6)
    tensors, _ = load_checkpoint(run / "checkpoint.safetensors")
    assert not torch.equal(load_trained(run).model.embed, tensors["weights/embed"])


def test_weights_that_looked_ahead_are_taken_where_they_are():
    tensors = {"weights/a": torch.full((2,), 5.0), "ahead_base/a": torch.full((2,), 3.0), "average/a": torch.ones(2),
               "weights/b": torch.full((1,), 7.0)}
    weights = evaluation_weights(tensors, {"a": 0.25, "b": 0.5})
    assert weights["a"].tolist() == [2.5, 2.5] and weights["b"].tolist() == [7.0]


def test_targets_that_are_no_safetensors_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"model.bin must end in .safetensors"):
        export(run, tmp_path / "model.bin")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        main(Evaluation(folder=tmp_path))
