"""One thread for tests and the processes they start: their tensors are small, and threads that wait for each other are slow."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
