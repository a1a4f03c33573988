"""Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import torch

# Read when a kernel is defined, therefore set before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
