"""The designer's command line: its table is what training reads, and mistakes are one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.notation import parse_table
from optim.newton_schulz import TABLES
from scripts.design_newton_schulz import Optimal, Radii, draw, main

ROOT = Path(__file__).resolve().parents[2]


def test_optimal_prints_the_speedrun_table(capsys):
    main(Optimal(cushion=0.02))
    said = capsys.readouterr().out
    safety, triples = parse_table(said.split('"')[1])
    assert safety == 1.02 and said.splitlines()[0].endswith("--optim.matrix.ns_steps 5")
    np.testing.assert_allclose(triples, TABLES["polar_express"].triples, atol=1e-6)
    mine, known = (next(line.split()[-3:] for line in said.splitlines() if name in line)
                   for name in ("this table", "polar_express"))
    assert mine == known == ["0.847", "1.141", "970"]


def test_radii_repeat_the_last(capsys):
    main(Radii(inner=(0.3, 0.2), steps=4))
    safety, triples = parse_table(capsys.readouterr().out.split('"')[1])
    assert safety == 1 and len(triples) == 4 and triples[1] == triples[2] == triples[3] != triples[0]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    triples, safety = Radii().table()
    draw(triples, safety, Radii(figure=tmp_path / "map.html"))
    assert "relative singular value" in (tmp_path / "map.html").read_text()
    with pytest.raises(ValueError, match="must end with .html, .png"):
        draw(triples, safety, Radii(figure=tmp_path / "map.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, "-m", "scripts.design_newton_schulz", "radii", "--inner", "1.5"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: radii must have 0 < inner < 1 and outer > 0, got 1.5 and 0.2\n")


@pytest.mark.parametrize("lower", [0, -1, 2, float("nan")])
def test_a_lower_bound_outside_its_range_is_refused(lower):
    with pytest.raises(ValueError, match="lower must lie in"):
        main(Radii(lower=lower))
