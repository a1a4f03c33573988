"""What all tests share: the device that kernels run on, the tests it takes, Ctrl-C."""

import os
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.utils import _python_dispatch as dispatch

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


@pytest.fixture(autouse=True)
def modes_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take off what an interrupted test has left on torch's stack of modes, and name the test.

    An interrupt at the wrong instruction of torch's own code can leave one there, and then a later
    test's torch.compile finds it.
    """
    yield
    while dispatch._get_current_dispatch_mode_stack():
        left = dispatch._pop_mode()
        warnings.warn(f"{request.node.nodeid} left {type(left).__name__}", stacklevel=1)
