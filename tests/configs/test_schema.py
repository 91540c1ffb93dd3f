"""The schema: every class is frozen, every field has a help text, and settings that exclude each other are refused."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import model, schema
from configs.optim import Optim
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train

CLASSES = (Run, Identity, Data, Model, Optim, Schedule, Train, Log)
SHARDS = dict(source="shards", tokenizer="gpt2", train_files=("t.bin",), val_files=("v.bin",))


@pytest.mark.parametrize("cls", CLASSES)
def test_configurations_are_frozen_values(cls):
    config = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        cls("by position")
    assert config == cls() and hash(config) == hash(cls())


@pytest.mark.parametrize("module", [schema, model])
def test_fields_are_documented(module):
    """A string under each field of a settings class is its help text; the sections of a Run have that of their class."""
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name != "Run":
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id}"


def test_the_schema_needs_the_standard_library_alone():
    code = ("import sys; import configs.schema, configs.presets; "
            "print(sorted({n.split('.')[0] for n in sys.modules} - sys.stdlib_module_names - {'__main__'}))")
    root = Path(schema.__file__).resolve().parent.parent
    process = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True)
    assert process.stdout.strip() == "['configs']", process.stderr


IMPOSSIBLE = [
    (Identity, dict(seed=-1), "seed must be at least 0, got -1"),
    (Identity, dict(stop_at_target=True), "needs --run.target_loss_nats"),
    (Identity, dict(resume=True, dry_run=True), "exclude each other"),
    (Data, dict(sequence_tokens=0), "sequence_tokens must be at least 1, got 0"),
    (Data, dict(val_sequence_tokens=0), "val_sequence_tokens must be at least 1"),
    (Data, dict(bpe_vocab_tokens=255), r"lie in \[256, 65535\], got 255"),
    (Data, dict(bpe_vocab_tokens=65_536), "got 65536"),
    (Data, dict(source="text"), "text needs --data.train_files"),
    (Data, dict(source="shards", tokenizer="gpt2"), "shards needs --data.train_files"),
    (Data, SHARDS | dict(val_files=()), "shards needs --data.val_files"),
    (Data, SHARDS | dict(tokenizer="bpe"), "must be gpt2, got bpe"),
    (Data, dict(train_files=("x.txt",)), "corpus reads no files"),
    (Data, dict(source="corpus", val_files=("x.txt",)), "corpus reads no files"),
    (Data, dict(order="documents"), "document starts"),
    (Model, dict(layers=0), "layers must be at least 1, got 0"),
    (Model, dict(dim=100), "head_dim must divide dim, got 64 and 100"),
    (Model, dict(dim=6, head_dim=6), "rotary needs head_dim divisible by 4, got 6"),
    (Model, dict(value_embeds=3), r"at most layers \(2\), got 3"),
    (Model, dict(value_embeds=-1), "value_embeds must be at least 0"),
    (Model, dict(full_attention_layers=(1,)), "no effect without --model.window_tokens"),
    (Model, dict(softcap_value=0.0), "must be positive, got 0"),
    (Model, dict(attention="varlen"), "needs --model.document_mask"),
    (Schedule, dict(lr="0=1 50%=-0.1"), "schedule.lr must not be negative"),
    (Schedule, dict(batch_tokens="twice"), "cannot read '0=twice'"),
    (Schedule, dict(momentum="0=0.85 20%=95"), "schedule.momentum must stay below 1"),
    (Schedule, dict(momentum="1"), "schedule.momentum must stay below 1, got '1'"),
    (Train, dict(steps=0), "steps must be at least 1, got 0"),
    (Train, dict(val_every_steps=-1), "val_every_steps must be at least 0"),
    (Log, dict(every_steps=0), "every_steps must be at least 1"),
    (Log, dict(sample_tokens=-1), "sample_tokens must be at least 0"),
    (Run, dict(train=Train(batch_tokens=4000)), r"multiple of data.sequence_tokens \(128\), got 4000; nearest: 3968"),
    (Run, dict(train=Train(batch_tokens=1)), "nearest: 128"),
    (Run, dict(train=Train(micro_tokens=100)), "must hold one sequence of 128 tokens, got 100"),
    (Run, dict(train=Train(val_long_window_tokens=2560)), "val_long_window_tokens needs --model.long_window_tokens"),
    (Run, dict(schedule=Schedule(window_tokens="0=0.5 100%=1")), "needs --model.window_tokens"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), IMPOSSIBLE, ids=lambda x: str(x)[:60])
def test_impossible_values_are_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize(("cls", "fields"), [
    (Identity, dict(stop_at_target=True, target_loss_nats=3.28)),
    (Data, SHARDS), (Data, SHARDS | dict(order="documents")),
    (Data, dict(source="text", train_files=("x.txt",))), (Data, dict(bpe_vocab_tokens=256)),
    (Model, dict(dim=6, head_dim=6, position="learned")), (Model, dict(value_embeds=2)),
    (Model, dict(full_attention_layers=(1,), window_tokens=8)),
    (Model, dict(attention="varlen", document_mask=True)),
    (Train, dict(val_every_steps=0)),
    (Run, dict(schedule=Schedule(window_tokens="0=0.5 100%=1"), model=Model(window_tokens=64))),
], ids=lambda x: str(x)[:60])
def test_values_at_the_limits_are_accepted(cls, fields):
    config = cls(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())
