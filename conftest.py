"""Under `pytest -n`, each worker computes in one thread: more would wait for the other workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
