"""Tests and the processes that they start use one thread: for small tensors, more threads only wait for each other.

They see no GPU, so that small runs neither compile nor ask for one GPU per rank, unless `pytest --cuda` runs those that need
one.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--cuda", action="store_true", help="leave the GPU visible, for the tests that need one")


def pytest_configure(config):
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for, which no test has done yet
