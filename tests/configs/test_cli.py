"""The command line: every mistake ends with status 2 and the nearest right name; help comes fast and without torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs.cli import parse, parse_row
from configs.help import COMMON_FLAGS, SECTIONS, all_flags
from configs.notation import nearest
from configs.optim import RULES, Adam, RuleConfig, switch_rule
from configs.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The error message of a command line that must end with status 2 and print nothing to standard output."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    return " ".join(err.replace("│", " ").split())


# ---- Valid command lines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_itself(name):
    run = parse([name])
    assert run == PRESETS[name]() and run.preset == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.preset = "other"


def test_no_preset_means_tiny():
    assert parse([]) == PRESETS["tiny"]()
    assert parse(["--run.seed", "7"]) == parse(["tiny", "--run.seed", "7"]) != parse([])


def test_flags_change_their_field_alone():
    run, base = parse(["bytes", "--optim.matrix.lr", "0.5", "--train.steps=9"]), PRESETS["bytes"]()
    assert run.optim.matrix.lr == 0.5 and run.train.steps == 9
    matrix = dataclasses.replace(run.optim.matrix, lr=base.optim.matrix.lr)
    undone = dataclasses.replace(run, optim=dataclasses.replace(run.optim, matrix=matrix),
                                 train=dataclasses.replace(run.train, steps=base.train.steps))
    assert undone == base


@pytest.mark.parametrize(("flags", "holds"), [
    (["--model.no_qk_norm"], lambda run: run.model.qk_norm is False),
    (["--model.no-qk-norm"], lambda run: run.model.qk_norm is False),
    (["--run.target_loss_nats", "3.28"], lambda run: run.run.target_loss_nats == 3.28),
    (["--model.mlp_dim", "None"], lambda run: run.model.mlp_dim is None),
    (["--schedule.momentum", "0=0.5 50%=0.9"], lambda run: run.schedule.momentum == "0=0.5 50%=0.9"),
    (["--data.source", "text", "--data.train_files", "a", "b"], lambda run: run.data.train_files == ("a", "b")),
    (["--optim.embed.rule", "steepest", "--optim.embed.norm", "row"], lambda run: run.optim.embed.norm == "row"),
    (["--optim.embed.norm=row", "--optim.embed.rule=steepest"], lambda run: run.optim.embed.norm == "row"),
    (["--optim.matrix.graft.rule", "adam", "--optim.matrix.graft.eps", "1e-3"],
     lambda run: run.optim.matrix.graft == Adam(eps=1e-3)),
    (["--optim.matrix.extra.lr_factors", "mlp.down=4", "mlp.up=2"],
     lambda run: run.optim.matrix.extra.lr_factors == ("mlp.down=4", "mlp.up=2")),
    (["--optim.matrix.no-nesterov"], lambda run: run.optim.matrix.nesterov is False),
    (["--optim.matrix.no_nesterov"], lambda run: run.optim.matrix.nesterov is False),
    (["--schedule.lr", "-50=1"], lambda run: run.schedule.lr == "-50=1"),
])
def test_kinds_of_values(flags, holds):
    assert holds(parse(["tiny", *flags]))


# ---- Refused command lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "said"), [
    (["tinny"], "unknown preset 'tinny'; did you mean 'tiny'?"),
    (["trak3"], "did you mean 'track3'?"),
    (["zzzzzz"], "choices: " + ", ".join(PRESETS)),
    (["tiny", "--train.stepz", "5"], "--train.steps INT"),
    (["tiny", "--optim.matrx.lr", "5"], "--optim.matrix.lr FLOAT"),
    (["tiny", "--train.steps", "ten"], "--train.steps: invalid literal for int() with base 10: 'ten'"),
    (["tiny", "--optim.matrix.lr", "fast"], "--optim.matrix.lr"),
    (["tiny", "--optim.matrix.ns", "quintik"], "unknown ns 'quintik'; did you mean 'quintic'?"),
    (["tiny", "--optim.matrix.ns", "2,-1.5"], "cannot read '2,-1.5'"),
    (["tiny", "--train.steps"], "'--train.steps'"),
    (["tiny", "bytes"], "bytes"),
    (["tiny", "--model.dim", "100"], "head_dim must divide dim, got 64 and 100"),
    (["tiny", "--train.steps=0"], "steps must be at least 1, got 0"),
    (["tiny", "--train.batch_tokens", "4000"], "got 4000; nearest: 4096"),
    (["tiny", "--schedule.lr", "0=1,5=2"], "cannot read '0=1,5=2'"),
    (["tiny", "--run.stop_at_target"], "--run.target_loss_nats"),
    (["tiny", "--preset", "bytes"], "the preset is the first word: python train_gpt.py NAME"),
    (["--preset=bytes"], "the preset is the first word"),
    (["tiny", "--optim.matrix.lr", "inf"], "lr"),
])
def test_mistakes_are_named(capsys, argv, said):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(("flag", "having"), [
    ("norm=row", "steepest"), ("ns-steps=3", "muon, normuon, steepest"), ("no_nesterov", "muon"), ("nesterov", "muon"),
    ("momentum=0.95", "muon"), ("unit=plain", "muon"), ("ns=svd", "muon"), ("rank_frac=0.5", "dion, dion2")])
def test_a_flag_of_another_rule_is_unknown_and_its_rules_are_named(capsys, flag, having):
    """Also where it repeats that rule's default, and in every spelling."""
    said = refused(capsys, "tiny", f"--optim.embed.{flag}")
    name = flag.split("=")[0].replace("-", "_")
    assert f"--optim.embed.{name}: rule adam has no {name}" in said
    assert f"; rules that have it: {having}" in said


@pytest.mark.parametrize("flag", ["beta1", "beta2", "eps"])
def test_flags_follow_the_rule_that_is_chosen(capsys, flag):
    said = refused(capsys, "tiny", f"--optim.matrix.{flag}", "0.5")
    assert f"--optim.matrix.{flag}: rule muon has no {flag}; rules that have it: adam" in said
    assert parse(["tiny", f"--optim.matrix.{flag}", "0.5", "--optim.matrix.rule", "adam"]).optim.matrix.rule == "adam"


@pytest.mark.parametrize(("flags", "said"), [
    (["--optim.matrix.rule", "adamm"], "unknown rule 'adamm'; did you mean 'adam'?"),
    (["--optim.matrix.rule"], "unknown rule ''; choices: muon, adam, normuon"),
    (["--optim.matrx.rule", "adam"], "--optim.matrx.rule: unknown role 'matrx'; did you mean 'matrix'?"),
    (["--optim.matrix.lrr", "1"], "--optim.matrix.lrr: rule muon has no lrr; did you mean 'lr'?"),
    (["--optim.matrix.clip", "1"], "rule muon has no clip; did you mean 'extra.clip'?"),
    (["--optim.matrix.graft", "adam"], "rule muon has no graft; did you mean 'graft.rule'?"),
    (["--optim.matrix.graft.eps", "1"], "rule muon has no graft.eps; did you mean 'graft.rule'?"),
    (["--optim.matrix.graft.rule", "muon"], "graft must be another rule than muon"),
    (["--optim.matrix.graft.rule", "adam", "--optim.matrix.graft.lr", "1"], "has no effect"),
])
def test_mistakes_with_rules_are_named(capsys, flags, said):
    assert said in refused(capsys, "tiny", *flags)


def test_a_switched_rule_keeps_the_presets_values_of_what_both_have():
    matrix = PRESETS["tiny"]().optim.matrix
    assert parse(["tiny", "--optim.matrix.rule", "adam"]).optim.matrix == Adam(lr=matrix.lr)
    run = parse(["track3", "--optim.matrix.rule", "normuon"])
    assert run.optim.matrix == switch_rule(PRESETS["track3"]().optim.matrix, "normuon")
    assert dataclasses.replace(run, optim=PRESETS["track3"]().optim) == PRESETS["track3"]()


def test_rules_of_several_roles_are_switched_with_the_other_flags():
    """Embedding and head are tied at the start, and so must be alike; but not before all flags are read."""
    both = ["--optim.embed.rule", "sm3", "--optim.head.rule", "sm3"]
    assert parse_row("speedrun_cpu", both).optim.head.rule == "sm3"
    assert parse_row("speedrun_cpu", [*both[:2], "--train.tied_until_frac", "0"]).optim.embed.rule == "sm3"
    with pytest.raises(ValueError, match="optim.embed and optim.head to be alike"):
        parse_row("speedrun_cpu", both[:2])


def test_parse_row_raises_what_parse_prints(capsys):
    for flags, said in [(["--train.stepz", "5"], "--train.steps"), (["--train.steps", "0"], "at least 1, got 0"),
                        (["--optim.embed.norm", "row"], "rule adam has no norm")]:
        with pytest.raises(ValueError) as caught:
            parse_row("tiny", flags)
        assert said in " ".join(str(caught.value).replace("│", " ").split())
        assert str(caught.value).startswith(f"tiny {' '.join(flags)}: ")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        parse_row("tinny", [])


def test_parse_row_is_parse():
    assert parse_row("bytes", ["--run.seed", "4"]) == parse(["bytes", "--run.seed", "4"])


def test_nearest():
    assert nearest("matrx", ["embed", "matrix"]) == "; did you mean 'matrix'?"
    assert nearest("qqq", ["embed", "matrix"]) == "; choices: embed, matrix"


# ---- Help ----------------------------------------------------------------------------------------


def help_text(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[str]:
    """The lines of a help page on a screen of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 0 and not err
    return out.splitlines()


def test_first_screen_has_every_preset_and_fits_80_by_40(capsys, monkeypatch):
    lines = help_text(capsys, monkeypatch, "--help")
    assert len(lines) < 40 and max(map(len, lines)) <= 80
    twins = next(line for line in lines if line.startswith("  ..._adamw ")).replace(",", " ").replace(".", " ").split()
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line.strip()}
    assert [name for name in PRESETS if name not in (twins if name.endswith("_adamw") else listed)] == []
    assert not any(line.endswith("...") for line in lines)  # every title has room
    assert help_text(capsys, monkeypatch, "track3", "--help") == help_text(capsys, monkeypatch, "--help", "track3") != lines


@pytest.mark.parametrize("section", SECTIONS)
def test_help_on_a_section_has_every_flag_with_the_presets_value(capsys, monkeypatch, section):
    lines = help_text(capsys, monkeypatch, "track3", "--help", section)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    if section != "optim":
        for field in dataclasses.fields(getattr(PRESETS["track3"](), section)):
            assert f"--{section}.{field.name} " in text, field.name
    assert {"train": "--train.steps INT = 3250", "model": "--model.biases | --model.no_biases = on",
            "optim": "matrix muon lr=0.025"}.get(section, "") in text


@pytest.mark.parametrize("rule", RULES)
def test_help_on_a_rule_has_its_own_fields(capsys, monkeypatch, rule):
    text = " ".join(" ".join(help_text(capsys, monkeypatch, "--help", rule)).split())
    own = {f.name for f in dataclasses.fields(RULES[rule])} - {f.name for f in dataclasses.fields(RuleConfig)}
    assert {name for name in own if f"--optim.ROLE.{name} " not in text} == set()
    assert "--optim.ROLE.constraint" not in text


def test_help_on_all_is_every_section_and_rule(capsys, monkeypatch):
    text = "\n".join(help_text(capsys, monkeypatch, "--help", "all"))
    for topic in (*SECTIONS, *RULES):
        assert "\n".join(help_text(capsys, monkeypatch, "--help", topic)) in text


def test_help_on_an_unknown_topic_names_the_nearest(capsys):
    assert "no help on 'moun'; did you mean 'muon'?" in refused(capsys, "--help", "moun")


def test_flags_used_most_are_flags():
    assert set(COMMON_FLAGS) <= {name for name, *_ in all_flags(PRESETS["tiny"]())}


def test_a_closed_pipe_ends_help_without_a_traceback():
    command = f"{sys.executable} train_gpt.py --help all | head -3"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 3


def test_help_of_the_program_needs_no_torch():
    """The program itself, not only its parser, answers before torch is imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", "train_gpt.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "--train.steps" in done.stdout and "configs.help" in modules
    assert not modules & {"torch", "numpy", "wandb", "tiktoken"}
