"""The report's page as a file, and errors; test_report_in_chromium.py opens the page in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lab.folders import by_experiment, find_runs
from scripts.report import (
    EXPERIMENT_COLUMNS,
    RUN_COLUMNS,
    Report,
    ablation_files,
    difference_table,
    json_for_script,
    page_data,
    read_ablation,
    report,
    screenshot,
    table,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(laboratory):
    return find_runs([str(laboratory)])


def column(table, label):
    index = [column["label"] for column in table["columns"]].index(label)
    return [row[index] for row in table["rows"]]


def test_one_file_holds_everything(laboratory, tmp_path):
    page = tmp_path / "report.html"
    assert report(Report(runs=(str(laboratory),), output=page, title="a <b>title</b>")) == [page]
    text = page.read_text()
    assert "<title>a &lt;b&gt;title&lt;/b&gt;</title>" in text and not re.search(r"<!--\w+-->", text)
    assert not re.search(r"""<(?:script|img|iframe)[^>]*\ssrc=|<link[^>]*\shref=["']?http""", text)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data)["experiments"][0] == {"name": "lr0.01", "runs": 3, "loss": pytest.approx(2.12)}
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_data_cannot_end_its_element():
    hostile = {"name": "</script><script>alert(1)</script>", "text": "<!--data-->"}
    assert "<" not in json_for_script(hostile) and json.loads(json_for_script(hostile)) == hostile


def test_tables_add_up(runs):
    by_run, by_name = table(RUN_COLUMNS, runs), table(EXPERIMENT_COLUMNS, list(by_experiment(runs).items()))
    assert len(by_run["rows"]) == 13 and column(by_run, "run")[0] == "lr0.01-seed1"
    assert column(by_run, "tokens/s")[0] == pytest.approx(768 * 240 / 61, rel=1e-5)
    assert "time to target" not in [column["label"] for column in by_run["columns"]]  # no run has it
    assert column(by_name, "mean loss (nats)") == pytest.approx([2.12, 2.04, 2.02, 2.08, 2.3])
    assert column(by_name, "standard deviation (nats)") == [pytest.approx(0.01)] * 4 + [None]


def test_only_settings_that_differ_have_a_column(runs):
    table = difference_table(runs)
    assert {column["label"] for column in table["columns"]} == {"run", "optim.matrix.lr", "model.smear"}
    assert column(table, "model.smear") == ["True"] * 12 + ["False"]


def test_ablations_beside_the_runs_are_read(runs, laboratory):
    assert ablation_files(runs) == [laboratory / "ablation.json"]
    ablation = read_ablation(laboratory / "ablation.json")
    assert ablation["unit"] == "nats" and [row["name"] for row in ablation["rows"]] == ["no_smear", "no_softcap"]


def test_unfinished_runs_have_a_state(fabricate, tmp_path):
    fabricate(tmp_path / "a", finished=False, records=20, steps=100)
    data = page_data(find_runs([str(tmp_path)]), [])
    assert column(data["tables"]["run-table"], "state") == ["at step 100"]
    assert data["experiments"][0]["loss"] is None and data["axes"] == ["step", "tokens", "train_seconds", "flops"]
    json_for_script(data)


@pytest.mark.parametrize(("given", "message"), [
    ({"runs": ()}, "name the runs"),
    ({"runs": ("{lab}/lr0.01-seed9",)}, "no run at .*; did you mean 'lr0.01-seed"),
    ({"ablation": ("{lab}/lr0.01-seed1/config.json",)}, "is no ablation"),
    ({"ablation": ("{lab}/nowhere.json",)}, "nowhere.json"),
    ({"output": "{lab}/no/such/report.html"}, "cannot write"),
    ({"output": "{lab}"}, "cannot write"),
    ({"output": "{lab}/report.png"}, "--png {lab}/report.png"),
])
def test_mistakes_are_named_and_nothing_is_written(laboratory, given, message):
    def fill_in(text):
        return text.format(lab=laboratory)

    args = Report(runs=tuple(map(fill_in, given.get("runs", ["{lab}"]))),
                  output=Path(fill_in(given.get("output", "{lab}/r.html"))),
                  ablation=tuple(Path(fill_in(path)) for path in given.get("ablation", ())))
    with pytest.raises(ValueError, match=fill_in(message)):
        report(args)
    assert not [path.name for path in laboratory.iterdir() if path.suffix in (".html", ".partial", ".png")]


def test_a_mistake_is_one_line_and_status_2(laboratory):
    done = subprocess.run([sys.executable, "-m", "scripts.report", str(laboratory / "lr9"), "-o", "never.html"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: no run at") and done.stderr.count("\n") == 1


def test_pictures_need_a_browser(laboratory, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs Chromium or Chrome"):
        report(Report(runs=(str(laboratory),), output=tmp_path / "a.html", png=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_browser_that_draws_nothing_leaves_no_picture(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "chromium"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho no display >&2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    page = tmp_path / "page.html"
    page.write_text("<p>")
    with pytest.raises(ValueError, match="drew no loss: no display"):
        screenshot(page, "loss", tmp_path / "loss.png", width=100, height=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "page.html"]
