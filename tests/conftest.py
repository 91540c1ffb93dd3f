"""Tests and the processes that they start use one thread: for small tensors, synchronising threads costs more than it saves."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
