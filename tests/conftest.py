"""One thread for tests and the processes they start: their tensors are small, and threads waiting for threads are slow."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
