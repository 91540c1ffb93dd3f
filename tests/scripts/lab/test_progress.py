"""What a sweep says of itself."""

import io

import pytest

from scripts.lab.folders import RunFolder
from scripts.lab.progress import Board, Lines, Live, board_for, spell
from scripts.lab.sweep import Outcome, Trial

A, B = (Trial(f"{name}-seed1", name, "bytes", (), 1) for name in "ab")


def finished(trial, path, loss=2.0):
    return Outcome(trial, "finished", RunFolder(path, {}, {}, {"val_loss_nats": loss}), "")


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")])
def test_times_are_spelled(seconds, text):
    assert spell(seconds) == text


def test_time_left_comes_from_what_this_sweep_ran(tmp_path):
    board = Board(["a", "b", "c", "d"], jobs=2)
    board.done(finished(A, tmp_path), fresh=False)
    assert board.left == "?"
    board.started(B)
    board.starts[B.name] -= 60
    board.done(finished(B, tmp_path), fresh=True)
    assert board.left == "1 min 0 s"  # two to come, both at once


def test_the_table_counts(tmp_path):
    board = Live(["a", "a", "b"], jobs=1)
    with board:
        board.started(A)
        board.done(finished(A, tmp_path, 2.5), fresh=True)
        board.started(B)
        board.done(Outcome(B, "failed", None, "why"), fresh=True)
        columns = [list(column.cells) for column in board.table().columns]
    assert columns == [["a", "b"], ["1 of 2", "0 of 1"], ["0", "0"], ["0", "1"], ["2.50000", ""], ["2.50000", ""]]


def test_lines_go_into_files_and_pipes(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert type(board_for(["a"], jobs=1, show=True)) is Lines
    assert type(board_for(["a"], jobs=1, show=False)) is Board
