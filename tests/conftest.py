"""What all tests share: the device that kernels run on, the tests it takes, Ctrl-C."""

import os
import signal

import pytest
import torch

# Read when a kernel is defined, therefore set before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers side by side share the cores: threads that waited for one another took twenty times as
# long, and the first GPU tests of fifteen workers ran into their time limit.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

# A shell starts background jobs with SIGINT ignored, which tests of Ctrl-C and the processes that
# they start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
