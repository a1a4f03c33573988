"""Without a GPU, Triton kernels run in Triton's interpreter; Ctrl-C works wherever tests run."""

import os
import signal

import torch

# Read when a kernel is defined, therefore set before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts background jobs with SIGINT ignored, which tests of Ctrl-C and the processes that
# they start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
