"""The preset speedrun: its schedules are those of the record, and it trains alike on any number of ranks, also while its
head is untied."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train_gpt
from configs.cli import parse
from configs.presets import PRESETS
from data.run.metrics import read_metrics
from model import GPT
from optim.hooks import WeightAverage
from optim.schedule import Schedule, training_shapes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--data.source text --data.tokenizer bytes --data.train_files my.txt --data.sequence_tokens 16 "
         "--data.val_bytes 600 --model.dim 32 --model.head_dim 8 --model.bigram_buckets 2048 --model.window_tokens 4 "
         "--model.long_window_tokens 8 --model.dynamic_window 4 --train.batch_tokens 192 --train.steps 12 "
         "--train.val_every_steps 4 --log.every_steps 1 --log.wandb disabled --log.sample_tokens 0").split()
# What speedrun_frontier adds, but its sampled softmax, which excludes the auxiliary losses.
FRONTIER = ("--model.qk_head_dim 4 --optim.matrix.kernel 0.85=0.4385 0.98=0.5615 --optim.matrix.kernel_from 5 "
            "--optim.matrix.ns anvil --optim.matrix.ns_steps 6 --train.weight_average 0.8 --train.weight_average_start 0.5 "
            "--train.weight_average_blend 0 --optim.matrix.extra.average_blend 0.5 --optim.embed.extra.average_blend 0.65 "
            "--optim.head.extra.average_blend 0.65 --optim.value_embed.extra.update_every_from 4=4 "
            "--optim.bigram_embed.extra.update_every_from 4=4").split()
SAMPLED = "--model.sampled_softmax 64 --model.prefix_loss 0 --model.mtp_weights".split()
SPARSE = ("--optim.bigram_embed.extra.sparse_rows", "--optim.value_embed.extra.sparse_rows")


# ---- Sizes and schedules -------------------------------------------------------------------------------------------------


def parameters(name: str) -> dict[str, int]:
    with torch.device("meta"):
        model = GPT(PRESETS[name]().model, vocab_size=50_257, max_tokens=16_384, document_start=50_256,
                    prefix_of=[-1] * 50_257)
    counts: dict[str, int] = {}
    for parameter, role in zip(model.parameters(), model.roles().values(), strict=True):
        counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def test_number_of_parameters_is_the_records():
    """643.8 M in the record, whose banks of matrices are padded to divide by 8: 64 for 60, 24 for 20, 24 for 22."""
    counts = parameters("speedrun")
    assert counts["embed"] == counts["head"] == 50_304 * 768
    assert counts["value_embed"] == 5 * 50_304 * 768 and counts["bigram_embed"] == 377_280 * 768
    assert counts["matrix"] == 10 * 4 * 768**2 + 11 * 2 * 768 * 3072
    padding = (64 - 60) * 256 * 768 + (24 - 20) * 768**2 + (24 - 22) * 3072 * 768
    gates = counts["gate"] + counts["scalar"]  # ours are each technique's own: .55 M for .2 M
    assert sum(counts.values()) - gates + padding == pytest.approx(643.8e6 - 0.2e6, abs=0.1e6)


def test_tokens_and_steps_are_the_records():
    run = PRESETS["speedrun"]()
    assert run.train.steps == 1285
    assert Schedule(run).tokens_before(1285) == 423 * 131_072 + 424 * 262_144 + 438 * 393_216 == 338_821_120


@pytest.mark.parametrize(("step", "batch", "windows"), [
    (0, 131_072, (128, 384)), (422, 131_072, (128, 384)), (423, 262_144, (384, 896)), (846, 262_144, (384, 896)),
    (847, 393_216, (640, 1408)), (1269, 393_216, (640, 1408)), (1270, 393_216, (768, 1664)), (1284, 393_216, (768, 1664))])
def test_every_stage_has_the_records_batch_and_windows(step, batch, windows):
    values = Schedule(PRESETS["speedrun"]()).values(step)
    assert values.batch_tokens == batch and (values.window_tokens, values.long_window_tokens) == windows


@pytest.mark.parametrize(("step", "lr"), [(0, 1.0), (422, 1.0), (423, 1.52), (508, 1.52), (846, 0.912), (847, 1.027),
                                          (1000, 0.710), (1200, 0.295), (1270, 0.15), (1284, 0.15)])
def test_learning_rates_are_the_records(step, lr):
    values = Schedule(PRESETS["speedrun"]()).values(step)
    assert values.lr == pytest.approx(lr, abs=5e-4) and values.weight_decay == values.lr


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (150, 0.9), (300, 0.95), (1235, 0.95), (1260, 0.9), (1285, 0.85)])
def test_momentum_is_the_records(step, momentum):
    assert Schedule(PRESETS["speedrun"]()).values(step).momentum == pytest.approx(momentum, abs=2e-3)


@pytest.mark.parametrize(("step", "longest"), [(0, 896), (422, 896), (423, 2048), (1284, 2048)])
def test_longest_document_is_the_records(step, longest):
    assert Schedule(PRESETS["speedrun"]()).values(step).max_document_tokens == longest


@pytest.mark.parametrize(("step", "reach"), [(0, 2), (423, 1), (847, 0), (1284, 0)])
def test_multi_token_losses_fade_out_over_the_stages(step, reach):
    assert Schedule(PRESETS["speedrun"]()).values(step).mtp == pytest.approx(reach, abs=0.01)


def test_preset_for_one_gpu_has_the_same_schedule():
    one, eight = Schedule(PRESETS["speedrun_1gpu"]()), Schedule(PRESETS["speedrun"]())
    assert all(one.values(step) == eight.values(step) for step in range(1285))


# ---- The frontier --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "lr", "tokens", "windows", "longest"), [
    (0, 1, 131_072, (128, 384), 896), (223, 1, 131_072, (128, 384), 896),
    (309, 1.52 * 810 / 896 + 0.2 * 86 / 896, 262_144, (384, 896), 2048),
    (656, 1.73 * 463 / 896 + 0.2 * 433 / 896, 393_216, (640, 1408), 3072),
    (1054, 1.73 * (2 / 3) ** 0.5 * 65 / 896 + 0.2 * 831 / 896, 262_144, (640, 1408), 3072),
    (1119, 0.2, 131_072, (768, 1664), 3072), (1139, 0.2, 131_072, (768, 1664), 3072)])
def test_stages_of_the_frontier(step, lr, tokens, windows, longest):
    values = Schedule(PRESETS["speedrun_frontier"]()).values(step)
    assert values.lr == pytest.approx(lr, abs=1e-6) and values.weight_decay == values.lr
    assert (values.batch_tokens, values.max_document_tokens) == (tokens, longest)
    assert (values.window_tokens, values.long_window_tokens) == windows


def test_the_frontier_has_narrow_queries_and_keys_alone_of_other_sizes():
    frontier, record, run = parameters("speedrun_frontier"), parameters("speedrun"), PRESETS["speedrun_frontier"]()
    assert record.pop("matrix") - frontier.pop("matrix") == 10 * 2 * (768 - 576) * 768
    assert frontier == record
    # Blocks of pairs of heads, as in the record: 3 of 192 rows.
    assert run.optim.matrix.extra.blocks == ("attention.q=3", "attention.k=3") and 768 // 128 * 96 == 3 * 192


def test_the_frontier_averages_the_weights_of_the_last_298_steps():
    run = PRESETS["speedrun_frontier"]()
    hook, blends = WeightAverage.build(run.train), {}
    for role in ("matrix", "embed", "head", "value_embed", "bigram_embed", "gate", "scalar"):
        blends[role] = hook.blend_of(getattr(run.optim, role))
    assert run.train.steps - hook.start == 298 and hook.beta**4 == pytest.approx(1 - 2 / 75.5)
    assert blends == dict.fromkeys(blends, 0) | {"matrix": 0.5, "embed": 0.65, "head": 0.65}


def test_the_frontier_compiles_five_graphs_for_training():
    assert len(training_shapes(PRESETS["speedrun_frontier"](), limited=True)) == 5


# ---- Ranks, tied then untied ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, and the shrunk recipe trained there on one rank."""
    path, rng = tmp_path_factory.mktemp("speedrun"), random.Random(0)
    (path / "my.txt").write_text(" ".join(rng.choice(["steepest", "descent", "norm", "\n"]) for _ in range(3000)))
    train(path, 1, "--run.name", "one")
    return path


def train(folder: Path, ranks: int, *flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               str(ROOT / "train_gpt.py"), "speedrun_cpu", *SMALL, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def losses(folder: Path, name: str) -> list[float]:
    return [line["train/loss_nats"] for line in read_metrics(folder / "runs" / name / "metrics.jsonl")
            if "train/loss_nats" in line]


@pytest.mark.parametrize(("ranks", "flags"), [(3, SPARSE), (4, ())], ids=["3-sparse", "4-dense"])  # 2: the golden losses
def test_ranks_agree_with_dense_and_sparse_communication(folder, ranks, flags):
    name = f"ranks{ranks}{len(flags)}"
    train(folder, ranks, "--run.name", name, *flags)
    assert losses(folder, name) == pytest.approx(losses(folder, "one"), abs=2e-4)


def build_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> train_gpt.Trainer:
    monkeypatch.chdir(folder)
    return train_gpt.Trainer(parse(["speedrun_cpu", *SMALL, *flags]))


def test_every_stage_is_compiled_once_as_one_graph(folder, monkeypatch):
    """No graph break and no recompilation within a stage: windows, batch and loss weights change between stages only."""
    trainer, compiled = build_trainer(folder, monkeypatch), CompileCounter()
    trainer.model.compile(backend=compiled, fullgraph=True, dynamic=False)
    batches = trainer.start_batches()
    graphs = [(trainer.step(batches), compiled.frame_count)[1] for _ in range(12)]
    batches.close()
    assert graphs == [1] * 4 + [2] * 5 + [3] * 3


def test_head_equals_the_embedding_until_it_is_untied(folder, monkeypatch):
    """Both tables are equal until the switch, so the loss is continuous there."""
    trainer = build_trainer(folder, monkeypatch)
    batches, model = trainer.start_batches(), trainer.model
    for step in range(12):
        trainer.step(batches)
        assert torch.equal(model.embed, model.head.weight) or step >= 0.66 * 12
    batches.close()
    assert not torch.equal(model.embed, model.head.weight)


@pytest.mark.parametrize("every", ["1", "2", "3"])
def test_training_tied_to_the_end_equals_a_tied_head(folder, monkeypatch, every):
    """Training both tables as tied equals a tied head, also if gradients of several steps are summed before an update."""
    slow = ["--optim.embed.update_every", every, "--optim.head.update_every", every]
    losses_of_both = []
    for flags in (["--train.tied_until_frac", "1"], ["--train.tied_until_frac", "0", "--model.tied_head"]):
        trainer = build_trainer(folder, monkeypatch, *slow, *flags)
        batches = trainer.start_batches()
        losses_of_both.append([trainer.step(batches).item() / 192 for _ in range(8)])
        batches.close()
    assert losses_of_both[0] == pytest.approx(losses_of_both[1], abs=1e-4)


@pytest.mark.parametrize("changes", [[], FRONTIER, FRONTIER + SAMPLED], ids=["record", "frontier", "sampled"])
def test_a_run_resumed_after_untying_equals_the_uninterrupted_run(folder, monkeypatch, changes):
    monkeypatch.chdir(folder)
    name = f"whole{len(changes)}"
    flags = [*SMALL, "--run.checkpoint_every_steps", "9", *changes, "--run.name"]
    train_gpt.main(parse(["speedrun_cpu", *flags, name]))
    losses = [line["train/loss_nats"] for line in read_metrics(folder / "runs" / name / "metrics.jsonl")
              if "train/loss_nats" in line]
    assert losses[-1] < losses[0]
    stopped = train_gpt.Trainer(parse(["speedrun_cpu", *flags, "cut"]))
    batches = stopped.start_batches()
    for _ in range(9):
        stopped.step(batches)
    batches.close()
    (folder / "runs" / "cut").mkdir(exist_ok=True)
    stopped.save(folder / "cut.safetensors")
    resumed = train_gpt.Trainer(parse(["speedrun_cpu", *flags, "cut"]))
    resumed.load(folder / "cut.safetensors")
    batches = resumed.start_batches()
    for _ in range(3):
        resumed.step(batches)
    batches.close()
    whole, _ = train_gpt.load_checkpoint(folder / "runs" / name / train_gpt.CHECKPOINT)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole[f"weights/{name}"]), name


@pytest.mark.parametrize("flags", [["--optim.head.lr", "0.5"], ["--model.tied_head"], ["--model.embed_dtype", "bfloat16"],
                                   ["--model.head_dtype", "bfloat16"]])
def test_settings_that_conflict_with_tying_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse(["speedrun_cpu", *flags])
    assert "tied_until_frac" in capsys.readouterr().err
