"""Whole runs of small models on small text: files, resuming, ranks, signals, and the messages of a user's mistakes."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train_gpt
from configs.cli import parse
from data.run.checkpoint import load_checkpoint
from data.run.metrics import SUMMARY_KEYS, read_metrics
from kernels.fp8 import Scaling

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_gpt.py")
SMALL = ("--data.source text --data.tokenizer bytes --data.sequence_tokens 16 --data.val_bytes 600 --model.dim 32 "
         "--model.head_dim 16 --model.bigram_buckets 64 --model.layers 2 --model.value_embeds 2 --model.x0_skip "
         "--model.softcap tanh --schedule.batch_tokens 1 --train.batch_tokens 192 --train.steps 12 "
         "--train.val_every_steps 5 --log.every_steps 1 --log.wandb disabled --log.sample_tokens 4").split()
GROWING = ("--schedule.batch_tokens", "0=0.5 50%=1", "--schedule.sequence_tokens", "0=0.5 hold 4=1")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A working folder with a text of 20 kB."""
    monkeypatch.chdir(tmp_path)
    words = ["steepest", "descent", "under", "a", "norm", "chosen", "by", "role", "\n"]
    rng = random.Random(0)
    (tmp_path / "my.txt").write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return tmp_path


def arguments(*flags: str) -> list[str]:
    return ["tiny", "--data.train_files", "my.txt", *SMALL, *flags]


def train(*flags: str) -> Path:
    """Train in this process and return the folder of --run.name."""
    train_gpt.main(parse(arguments(*flags)))
    return Path("runs") / flags[flags.index("--run.name") + 1]


def torchrun(ranks: int, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", SCRIPT]
    return subprocess.run([*command, *arguments(*flags)], capture_output=True, text=True, timeout=300)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.safetensors")[0]


def losses(folder: Path) -> list[tuple]:
    """Return all records of metrics.jsonl without their time measurements."""
    return [tuple((k, v) for k, v in record.items() if not k.startswith(("time/", "train_seconds")))
            for record in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that weights, optimizer state and logged losses are bit-identical."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(one) == losses(other)


# ---- Files and figures ------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_files_metrics_and_summary(text, capsys):
    folder = train("--run.name", "a", "--run.target_loss_nats", "5.4")
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.safetensors", "code.txt", "config.json", "env.json", "metrics.jsonl", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    assert tuple(summary) == SUMMARY_KEYS
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 192
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss_nats" in r] == list(range(1, 13))
    validations = {r["step"]: r["val/loss_nats"] for r in records if "val/loss_nats" in r}
    assert list(validations) == [5, 10, 12]
    assert summary["val_loss_nats"] == validations[12]
    crossed = [step for step, loss in validations.items() if loss <= 5.4]
    assert summary["target_step"] == crossed[0]
    angles = [r["optim/matrix/angle"] for r in records if "optim/matrix/angle" in r]
    assert len(angles) == 3 and all(0 < angle < 1.6 for angle in angles)
    out = capsys.readouterr().out
    assert "steepest" in out and "bits/byte" in out and "the model continues:" in out
    code = (folder / "code.txt").read_text()
    assert "class ShardedOptimizer" in code and "class GPT" in code


def test_training_lowers_the_loss(text):
    folder = train("--run.name", "learns", "--train.steps", "60", "--train.val_every_steps", "0")
    train_losses = [r["train/loss_nats"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss_nats" in r]
    assert train_losses[0] > 5 and train_losses[-1] < 1.2


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(text):
    one, two, other = (train("--run.name", name, "--run.seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2")))
    assert_same_run(one, two)
    assert losses(one) != losses(other)


def test_micro_batches_change_only_the_rounding(text):
    whole, parts = train("--run.name", "whole"), train("--run.name", "parts", "--train.micro_tokens", "16")
    for a, b in zip(read_metrics(whole / "metrics.jsonl"), read_metrics(parts / "metrics.jsonl"), strict=True):
        for key in ("train/loss_nats", "val/loss_nats"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-4)


def test_the_run_stops_at_its_target(text):
    folder = train("--run.name", "a", "--run.target_loss_nats", "5.5", "--run.stop_at_target",
                   "--train.val_every_steps", "1")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == summary["target_step"] < 12


def test_a_second_run_gets_a_folder_of_its_own(text):
    for _ in range(2):
        train_gpt.main(parse(arguments()))
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_a_dry_run_prints_the_plan_and_writes_no_files(text, capsys):
    train_gpt.main(parse(arguments("--run.dry_run")))
    out = capsys.readouterr().out
    assert "role" in out and "parameters" in out and "sequence_tokens" in out
    assert not Path("runs").exists()


def test_a_dry_run_needs_no_data(text, capsys):
    flags = ["speedrun", "--run.dry_run", "--model.dim", "48", "--model.head_dim", "8", "--model.bigram_buckets", "64",
             "--data.sequence_tokens", "1024", "--data.val_sequence_tokens", "None"]
    train_gpt.main(parse(flags))
    out = " ".join(capsys.readouterr().out.split())
    assert "data/fineweb10B/fineweb_train_*.bin, data/fineweb10B/fineweb_val_*.bin" in out
    assert "python -m scripts.fetch_fineweb --preset speedrun" in out
    assert "0 training tokens" in out and "vocabulary of 50,257 tokens" in out and "338,821,120 tokens" in out
    with pytest.raises(ValueError, match="--data.train_files: no file matches"):
        train_gpt.main(parse([flag for flag in flags if flag != "--run.dry_run"]))


def test_the_summary_is_written_before_sampling(text, monkeypatch):
    def sample(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt.Trainer, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        train("--run.name", "a")
    assert json.loads(Path("runs/a/summary.json").read_text())["steps"] == 12


def test_a_final_checkpoint_is_a_choice(text, monkeypatch):
    folder = train("--run.name", "none", "--run.no_final_checkpoint")
    assert (folder / "summary.json").exists() and not (folder / "checkpoint.safetensors").exists()
    with monkeypatch.context() as patch:
        interrupt_at(6, signal.SIGTERM, patch)
        train("--run.name", "cut", "--run.no_final_checkpoint")
    assert load_checkpoint(Path("runs/cut/checkpoint.safetensors"))[1]["progress"]["step"] == 7


def test_passes_chosen_by_memory_stand_in_the_config(text, capsys):
    folder = train("--run.name", "a", "--train.micro_tokens", "None")
    assert json.loads((folder / "config.json").read_text())["train"]["micro_tokens"] == 65_536
    assert "passes of at most 65,536 tokens" in " ".join(capsys.readouterr().out.split())


def test_the_last_validation_alone_has_the_longer_window(text, monkeypatch):
    windows, evaluate = [], train_gpt.evaluate

    def record(loss, *args, **options):
        windows.append(loss.keywords)
        return evaluate(loss, *args, **options)

    monkeypatch.setattr(train_gpt, "evaluate", record)
    train("--run.name", "a", "--model.window_tokens", "4", "--model.long_window_tokens", "6",
          "--model.full_attention_layers", "1", "--train.val_long_window_tokens", "12")
    assert windows == [{"window": 4, "long_window": n} for n in (6, 6, 12)]


def test_a_compiled_run_of_many_shapes_is_refused(text):
    with pytest.raises(ValueError, match="12 shapes.*--schedule.batch_tokens in jumps"):
        train_gpt.Trainer(parse(arguments("--run.compile", "on", "--schedule.batch_tokens", "0=1 100%=8")))


@torch._dynamo.config.patch(recompile_limit=64)
def test_warm_up_compiles_every_graph_of_training(text, monkeypatch):
    torch._dynamo.reset()  # graphs of other tests count too
    trainer, graphs = train_gpt.Trainer(parse(arguments(*GROWING))), CompileCounter()
    trainer.model.compile(backend=graphs, fullgraph=True, dynamic=False)
    trainer.warm_up()
    warm, batches = graphs.frame_count, trainer.start_batches()
    assert warm >= len(trainer.shapes) > 1
    for _ in range(12):
        trainer.step(batches)
    batches.close()
    assert graphs.frame_count == warm


@pytest.mark.parametrize("rank", range(5))
def test_warm_up_has_the_rows_of_the_rank(text, monkeypatch, rank):
    """12 rows on 5 ranks: some have 2, others 3, and each compiles its own."""
    trainer, rows = train_gpt.Trainer(parse(arguments())), []
    monkeypatch.setattr(trainer.comm, "rank", rank)
    monkeypatch.setattr(trainer.comm, "world_size", 5)
    monkeypatch.setattr(trainer, "gradients", lambda inputs, *_: rows.append(len(inputs)))
    monkeypatch.setattr(trainer.optimizer, "step", lambda *_: None)
    trainer.warm_up()
    assert rows == [len(range(12 * rank // 5, 12 * (rank + 1) // 5))] * 2


def test_warm_up_restores_the_models_buffers(text, monkeypatch):
    """Such as the scales of 8-bit products, which follow the tokens of the pass before."""
    trainer = train_gpt.Trainer(parse(arguments()))
    trainer.model.register_buffer("scale", torch.zeros(()))
    gradients = trainer.gradients
    monkeypatch.setattr(trainer, "gradients", lambda *args: (trainer.model.scale.add_(1), gradients(*args)))
    trainer.warm_up()
    assert trainer.model.scale == 0


def test_warm_up_restores_optimizer_state_and_random_state(text, monkeypatch):
    trainer = train_gpt.Trainer(parse(arguments("--model.sampled_softmax", "16")))  # this loss draws classes
    trainer.model.scales = scales = Scaling("delayed", static=1.0, headroom=1.0)
    forward = trainer.model.forward
    # Each pass leaves its largest entry.
    monkeypatch.setattr(trainer.model, "forward", lambda *args, **inputs: forward(*args, **inputs) * scales(torch.ones(3)))
    before = {name: tensor.clone() for name, tensor in trainer.optimizer.state.tensors().items()}
    state = torch.get_rng_state()
    trainer.warm_up()
    after = trainer.optimizer.state.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state()) and not scales.previous_max
    assert all(not bank.grads.any() for bank in trainer.optimizer.banks)


def test_classes_are_drawn_for_each_step_and_micro_batch(text, monkeypatch):
    """Anew, and not from the generator that a checkpoint saves: a resumed run draws as the run without interruption."""
    trainer, drawn = train_gpt.Trainer(parse(arguments("--model.sampled_softmax", "16", "--train.micro_tokens", "64"))), []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *args, aux_weights, **windows: (
        drawn.append(tuple(aux_weights.classes.tolist())) or forward(*args, aux_weights=aux_weights, **windows)))
    batches, state = trainer.start_batches(), torch.get_rng_state()
    trainer.step(batches)
    trainer.step(batches)
    batches.close()
    assert len(set(drawn)) == len(drawn) == 6 and all(len(set(classes)) == 16 for classes in drawn)
    assert torch.equal(state, torch.get_rng_state())


def test_terms_that_do_not_act_in_a_stage_are_not_in_its_graph(text, monkeypatch):
    trainer = train_gpt.Trainer(parse(arguments("--model.mtp_weights", "0.5", "0.25", "--schedule.mtp", "0=1.5 6=1 7=0")))
    weights = []
    monkeypatch.setattr(trainer.model, "forward", lambda x, y, aux_weights, **windows: (
        weights.append(aux_weights) or torch.zeros((), requires_grad=True)))
    for step in (0, 6, 7):
        trainer.gradients(*torch.zeros(2, 12, 16, dtype=torch.long), trainer.schedule.values(step))
    assert [None if aux.mtp is None else aux.mtp.tolist() for aux in weights] == [[0.5, 0.125], [0.5], None]
    assert all(aux.prefix is aux.classes is None for aux in weights)


# ---- Interrupted and resumed ------------------------------------------------------------------------------------------


def interrupt_at(step: int, number: int, monkeypatch) -> None:
    """Send this process a signal while it computes step `step`."""
    original = train_gpt.Trainer.gradients

    def gradients(self, *args):
        if self.progress.step == step:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(train_gpt.Trainer, "gradients", gradients)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", [(), ("--data.order", "contiguous"), ("--data.order", "documents"), GROWING])
def test_resumed_equals_uninterrupted_bit_for_bit(text, monkeypatch, capsys, number, flags):
    whole = train("--run.name", "whole", *flags)
    with monkeypatch.context() as patch:
        interrupt_at(6, number, patch)
        cut = train("--run.name", "cut", *flags)
    assert "interrupted at step 7" in capsys.readouterr().out
    assert not (cut / "summary.json").exists()
    train("--run.name", "cut", *flags, "--run.resume")
    assert_same_run(whole, cut)


def test_resuming_a_finished_run_changes_nothing(text):
    folder = train("--run.name", "a")
    before = weights(folder), losses(folder)
    train("--run.name", "a", "--run.resume")
    after = weights(folder), losses(folder)
    assert before[1] == after[1] and all(torch.equal(before[0][k], after[0][k]) for k in before[0])


def test_training_time_continues_after_resuming(text, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(6, signal.SIGINT, patch)
        train("--run.name", "cut")
    train("--run.name", "cut", "--run.resume")
    seconds = [r["train_seconds"] for r in read_metrics(Path("runs/cut/metrics.jsonl"))]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_run_killed_at_random_moments_and_resumed_equals_the_whole_run(text):
    """SIGKILL, often while a checkpoint is written, loses only the steps since the last checkpoint."""
    flags = ("--train.steps", "40", "--run.checkpoint_every_steps", "1")
    whole = train("--run.name", "whole", *flags)
    rng = random.Random(1)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, SCRIPT, *arguments("--run.name", "cut", *flags, "--run.resume")],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_lines(Path("runs/cut/metrics.jsonl"), child)
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
    cut = train("--run.name", "cut", *flags, "--run.resume")
    assert_same_run(whole, cut)


def wait_for_lines(path: Path, child: subprocess.Popen) -> None:
    """Wait until the file grows or the process ends."""
    size = path.stat().st_size if path.exists() else 0
    while child.poll() is None and (not path.exists() or path.stat().st_size <= size):
        time.sleep(0.01)


def test_a_non_finite_loss_stops_the_run_with_advice(text):
    message = r"(loss is (nan|inf)|the gradient of \S+ is not finite) at step \d+.*Lower --optim.matrix.lr"
    with pytest.raises(train_gpt.DivergedError, match=message):
        train("--run.name", "a", "--model.softcap", "none", "--optim.head.lr", "1e38")


@pytest.mark.parametrize("flags", [("--train.val_every_steps", "1"), ("--log.layers_every_steps", "1")])
def test_exploded_weights_are_measured_and_do_not_stop_the_run(text, flags):
    """The loss stays finite where norms bound the activations; metrics of such weights are infinite or NaN, and alarm."""
    folder = train("--run.name", "a", "--optim.matrix.lr", "1e30", "--train.steps", "3", *flags)
    assert (folder / "summary.json").exists() and "alarms" in (folder / "metrics.jsonl").read_text()


# ---- Ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A folder with the same run on 1, 2 and 3 gloo ranks."""
    folder = tmp_path_factory.mktemp("ranked")
    rng = random.Random(0)
    (folder / "my.txt").write_text(" ".join(rng.choice(["steepest", "descent", "norm", "\n"]) for _ in range(3000)))
    old = os.getcwd()
    os.chdir(folder)
    try:
        for ranks in (1, 2, 3):
            done = torchrun(ranks, "--run.name", f"ranks{ranks}", "--run.checkpoint_every_steps", "6")
            assert done.returncode == 0, done.stderr[-2000:]
    finally:
        os.chdir(old)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_world_size_gives_the_same_curve(ranked, ranks):
    one, many = (read_metrics(ranked / "runs" / f"ranks{n}" / "metrics.jsonl") for n in (1, ranks))
    for a, b in zip(one, many, strict=True):
        assert a["step"] == b["step"]
        for key in ("train/loss_nats", "val/loss_nats"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-4)


def test_a_run_saved_on_three_ranks_resumes_on_one(ranked, monkeypatch):
    monkeypatch.chdir(ranked)
    flags = ("--run.name", "mixed", "--run.checkpoint_every_steps", "6")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
from configs.cli import parse
original = train_gpt.Trainer.gradients
def gradients(self, *args):
    if self.progress.step == 5 and self.comm.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)
train_gpt.Trainer.gradients = gradients
train_gpt.main(parse({arguments(*flags)!r}))
"""
    Path("cut.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "cut.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "interrupted at step 6" in done.stdout, done.stderr[-2000:]
    train(*flags, "--run.resume")
    for a, b in zip(losses(Path("runs/ranks1")), losses(Path("runs/mixed")), strict=True):
        a, b = dict(a), dict(b)
        assert a["step"] == b["step"]
        assert a.get("train/loss_nats", 0) == pytest.approx(b.get("train/loss_nats", 0), abs=1e-4)


def test_two_nodes_train_together_on_loopback(text):
    """Two launchers of one process each, as on two machines."""
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
         "--master_addr=127.0.0.1", "--master_port=29611", SCRIPT, *arguments("--run.name", "nodes")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads(Path("runs/nodes/summary.json").read_text())["world_size"] == 2


# ---- Mistakes ---------------------------------------------------------------------------------------------------------


def error_message(monkeypatch, capsys, *argv: str) -> str:
    """Run train_gpt.py as a command and return its error message. It must exit with status 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())


def write_shard(path: str, magic: int = 20240520, claimed: int = 2000, tokens: int = 2000, token: int = 7) -> None:
    header = torch.zeros(256, dtype=torch.int32)
    header[:3] = torch.tensor([magic, 1, claimed])
    body = torch.full((tokens,), token, dtype=torch.int32).to(torch.uint16)
    Path(path).write_bytes(header.numpy().tobytes() + body.numpy().tobytes())


SHARDS = ("--data.source shards --data.tokenizer gpt2 --data.order contiguous --data.train_files t*.bin "
          "--data.val_files v.bin --log.wandb disabled").split()


@pytest.mark.parametrize("flags, message", [
    (["tinny"], "did you mean 'tiny'"),
    (["tiny", "--optim.matrx.lr", "0.1"], "--optim.matrix.lr"),
    (["tiny", "--train.steps", "many"], "many"),
    (["tiny", "--model.head_dim", "100"], "head_dim must divide dim, got 100 and 128"),
    (["tiny", "--model.attention", "flex", "--run.device", "cpu"], "CUDA only"),
    (["tiny", "--data.source", "text", "--data.train_files", "none.txt"], "none.txt"),
    (["tiny", *SHARDS], "t*.bin"),
])
def test_wrong_flags_and_missing_files_are_refused(text, monkeypatch, capsys, flags, message):
    assert message in error_message(monkeypatch, capsys, *flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize("fault, value", [
    ({"magic": 1}, "magic"), ({"claimed": 3000}, "3000"), ({"token": 60_000}, "60000")])
def test_damaged_shards_are_refused(text, monkeypatch, capsys, fault, value):
    write_shard("v.bin")
    write_shard("t1.bin", **fault)
    message = error_message(monkeypatch, capsys, "tiny", *SHARDS, "--train.batch_tokens", "1024")
    assert value in message.replace(",", "") and "t1.bin" in message
    assert not list(Path(".").rglob("summary.json")) and not list(Path(".").rglob("checkpoint*"))


def test_text_that_is_not_utf8_is_refused(text, monkeypatch, capsys):
    Path("my.txt").write_bytes(b"fine so far \xff\xfe")
    assert "my.txt" in error_message(monkeypatch, capsys, *arguments())


def test_corrupt_checkpoint_is_refused(text, monkeypatch, capsys):
    path = train("--run.name", "a") / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "checkpoint.safetensors" in error_message(monkeypatch, capsys, *arguments("--run.name", "a", "--run.resume"))


def test_checkpoint_of_another_model_is_refused(text, monkeypatch, capsys):
    train("--run.name", "a")
    message = error_message(monkeypatch, capsys, *arguments("--run.name", "a", "--run.resume", "--model.layers", "3"))
    assert "checkpoint.safetensors" in message


def test_checkpoint_of_another_experiment_is_refused(text, monkeypatch, capsys):
    train("--run.name", "a")
    message = error_message(monkeypatch, capsys, *arguments("--run.name", "a", "--run.resume", "--optim.matrix.lr", "0.5"))
    assert "--optim.matrix.lr" in message and "0.5" in message


def test_unwritable_run_folder_is_refused(text, monkeypatch, capsys):
    Path("runs").write_text("a file in the way")
    assert "runs" in error_message(monkeypatch, capsys, *arguments())
