"""Tests and the processes that they start use one thread: for small tensors, more threads only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
