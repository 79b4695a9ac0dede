"""What every test run needs before the first test module is imported."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # More threads would wait for the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it starts in the background, and so would every process of
    # the tests, those that are to be stopped by it among them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
