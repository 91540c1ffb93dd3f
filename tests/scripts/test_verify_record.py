"""verify_record on files: recomputed tables, errors and exit status; and the records of this repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.verify_record import Verify, main, target_line

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = sorted((ROOT / "records").glob("*.jsonl"))


def line(name: str, loss: float, seed: int) -> str:
    return json.dumps({"format": 1, "name": name, "experiment": "a", "preset": "tiny", "config": {}, "environment": {},
                       "summary": {"val_loss_nats": loss, "seed": seed}, "validations": []})


@pytest.mark.skipif(not RECORDS, reason="no records yet")
def test_our_own_records_have_no_errors():
    """The smallest file; CONTRIBUTING's command verifies all."""
    assert main(Verify(files=(min(RECORDS, key=lambda file: file.stat().st_size),))) == 0


@pytest.mark.skipif(not RECORDS, reason="no records yet")
def test_a_wrong_table_is_reported_and_written_anew(tmp_path, capsys):
    file = tmp_path / RECORDS[0].name
    file.write_text("\n".join(RECORDS[0].read_text().splitlines()[:3]) + "\n")
    assert main(Verify(files=(file,))) == 1 and "write it anew with --write" in capsys.readouterr().out
    assert main(Verify(files=(file,), write=True)) == 0 and main(Verify(files=(file,))) == 0
    table = file.with_suffix(".md")
    table.write_text(table.read_text().replace("3 runs", "30 runs"))
    assert main(Verify(files=(file,))) == 1


@pytest.mark.skipif(not RECORDS, reason="no records yet")
def test_damaged_and_foreign_records_are_errors_not_crashes(tmp_path, capsys):
    file = tmp_path / "bench_cpu.jsonl"
    record = json.loads((ROOT / "records" / "bench_cpu.jsonl").read_text().splitlines()[0])
    file.write_text(json.dumps(record | {"preset": "bytes"}) + "\n")
    assert main(Verify(files=(file,))) > 0 and "preset is bytes; this file is for bench_cpu only" in capsys.readouterr().out
    file.write_text(json.dumps(record | {"summary": {}}) + "\n")
    assert main(Verify(files=(file,))) > 0 and "summary has no number val_loss_nats" in capsys.readouterr().out


def test_a_target_is_tested_by_both_rules(tmp_path):
    """Published: eight runs, mean 3.27708, margin .00827."""
    losses = [3.27543, 3.27615, 3.27651, 3.27726, 3.27770, 3.27775, 3.27787, 3.27794]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(line(f"a{i}", loss, i) + "\n" for i, loss in enumerate(losses)))
    message = target_line(file, 3.28)
    assert "mean 3.27708 nats (n = 8)" in message and "0.00827 reaches 0.004" in message and "passes p < .01" in message
    assert "misses" in target_line(file, 3.2775)


def test_the_exit_status(tmp_path):
    """1 for errors in the records, 2 for a missing file."""
    file = tmp_path / "x.jsonl"
    file.write_text(line("a", 1.0, 1) + "\n")

    def run(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "scripts.verify_record", str(path)], cwd=ROOT, capture_output=True,
                              text=True)
    assert run(file).returncode == 1
    missing = run(tmp_path / "y.jsonl")
    assert missing.returncode == 2 and missing.stderr.startswith("error: there is no")
