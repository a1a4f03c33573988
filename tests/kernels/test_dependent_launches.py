"""Kernels that start while the one before them ends: what each program does, in any case.

Every way through a kernel waits for the kernel before it: before it lets the next one start, and
before it ends. Otherwise a launch could be over while its predecessor still writes.
"""

from __future__ import annotations

import re
import sys

import pytest
from compiling import run_compiler

WAIT, START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
ENDS = ("ret", "exit")


def hasty_steps(ptx: str) -> set[str]:
    """What can be reached of `START` and `ENDS` without a `WAIT` before it."""
    body = ptx[ptx.index(".entry") :]
    lines = [line.split("//")[0].strip() for line in body.splitlines()]
    places = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"[$\w]+:", line)}
    found: set[str] = set()
    seen: set[int] = set()
    left = [0]
    while left:
        i = left.pop()
        if i in seen or i >= len(lines):
            continue
        seen.add(i)
        condition, step = re.fullmatch(r"(@!?%\w+\s+)?(.*)", lines[i]).groups()  # type: ignore[union-attr]
        if step.startswith(WAIT):
            assert condition is None, lines[i]
            continue
        found.update(word for word in (START, *ENDS) if re.match(rf"{re.escape(word)}\b", step))
        if jump := re.match(r"bra(?:\.uni)?\s+([$\w]+)", step):
            left.append(places[jump[1]])
        if condition is not None or not (jump or step.startswith(ENDS)):
            left.append(i + 1)
    return found


def test_hasty_steps() -> None:
    ptx = """.visible .entry kernel() {{
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra $L__BB0_2;
    {0}
    bra.uni $L__BB0_3;
$L__BB0_2:
    {1}
$L__BB0_3:
    griddepcontrol.launch_dependents;
    ret; }}"""
    assert hasty_steps(ptx.format(WAIT + ";", WAIT + ";")) == set()
    assert hasty_steps(ptx.format(WAIT + ";", "")) == {START, "ret"}
    assert hasty_steps(ptx.format("@%p1 ret;", WAIT + ";")) == {START, "ret"}


COMPILE = """
import json
import torch
from compiling import compiling_for
from random_layer import random_layer
from qmoe_kernels.attention import launch_decode_attention, launch_store_kv
from qmoe_kernels.heuristic import hopper_tiles
from qmoe_kernels.hopper_gemm import gluon, hopper_fused_moe, launch_sort_quantized_rows
from qmoe_kernels.linear import launch_linear
from qmoe_kernels.mailbox import Mailbox, Posts
from qmoe_kernels.mailbox_kernels import launch_admit_and_post, launch_combine
from qmoe_kernels.norm import launch_rms_norm
from qmoe_kernels.paging import CopyList, Residency, Transfer, launch_admit
from qmoe_kernels.quantization import STORAGE_DTYPE, QuantizedRows
from qmoe_kernels.rope import launch_rotate
from qmoe_kernels.router import launch_select_experts
from qmoe_kernels.routing import launch_routing

bf16 = torch.bfloat16
sizes = dict(num_experts=8, hidden_size=128, intermediate_size=128, dtype=bf16)
with compiling_for(90) as compiled:
    for num_tokens, top_k, weights, activations in [
        (1, 2, "int8", None), (4, 2, "fp8", None), (200, 8, "fp8", None), (4, 2, "int8", "int8"),
    ]:
        layer = random_layer(num_tokens=num_tokens, top_k=top_k, weights=weights, **sizes)
        layer.triton(activations=activations)
    if gluon is not None:
        for weights, activations in [("int8", None), ("int8", torch.int8), (None, None)]:
            layer = random_layer(num_tokens=64, weights=weights, **sizes)
            hopper_fused_moe(
                layer.hidden_states, layer.experts(), layer.topk_ids, layer.topk_weights,
                hopper_tiles(128, activations or bf16, 3, 16).gate_up, activations=activations,
            )
    rows = torch.zeros(64, 128, dtype=torch.int8), torch.zeros(64)
    places = torch.zeros(128, dtype=torch.int32)
    launch_sort_quantized_rows(QuantizedRows(*rows, bf16), places, 2)
    launch_routing(torch.zeros(600, 8, dtype=torch.int32), 8)
    x = torch.zeros(1, 2048, dtype=bf16)
    launch_linear(x, x.expand(4096, 2048).contiguous(), None)
    launch_linear(x.expand(8, 2048).contiguous(), x.expand(2048, 2048).contiguous(), None)
    launch_rms_norm(x, x[0], 1e-5, 0.0, True)
    heads, column = torch.zeros(1, 4, 1, 64, dtype=bf16), torch.zeros(1, dtype=torch.int32)
    launch_rotate(heads, heads, heads[:, 0], heads[:, 0], False, False)
    cache = torch.zeros(1, 2048, 4, 64, dtype=bf16)
    launch_store_kv(heads, heads, cache, cache, column)
    for early in (False, True):
        launch_decode_attention(heads[:, :, 0], cache, cache, column, column, 1.0, early=early)
    launch_select_experts(
        torch.zeros(4, 128), None, 8, "softmax", True, 1.0, 0.0, 1, 1, "max", torch.float32
    )
    cpu, copies = torch.device("cpu"), CopyList.empty(8, "cpu")
    ids = torch.zeros(1, 2, dtype=torch.int64)
    posts, box = Posts.empty(8, 1, cpu), Mailbox.empty(2048, cpu)
    residency = Residency.empty(8, 4, 1, cpu)
    for pages in (None, Transfer(ids[0], torch.zeros(4, 128, dtype=torch.uint8), 128)):
        launch_admit(ids, 0, 0, 8, 0, 8, residency, copies, None, pages)
        launch_admit_and_post(x, ids, 0, 0, 8, residency, copies, posts, box, pages)
    launch_combine(torch.zeros(1, 2, 2048, dtype=bf16), ids, ids, None, 0, 8, posts, box, 5.0)
for kernel in compiled:
    print(json.dumps({
        "name": kernel.metadata.name,
        "dependent": kernel.metadata.launch_pdl,
        "ptx": kernel.asm["ptx"],
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_every_program_waits() -> None:
    kernels = [kernel for kernel in run_compiler(COMPILE) if kernel["dependent"]]
    assert {kernel["name"] for kernel in kernels} >= {
        "admit_and_post_kernel",
        "admit_kernel",
        "combine_kernel",
        "combine_splits_kernel",
        "decode_attention_kernel",
        "gemv_kernel",
        "grouped_gemm_kernel",
        "linear_dot_kernel",
        "linear_fma_kernel",
        "quantize_rows_kernel",
        "rms_norm_kernel",
        "rotate_kernel",
        "select_experts_kernel",
        "sort_pairs_kernel",
        "sort_rows_kernel",
        "store_kv_kernel",
        "weighted_sum_kernel",
    }
    for kernel in kernels:
        assert hasty_steps(kernel["ptx"]) == set(), kernel["name"]


PAGED = """
import json
from dataclasses import replace
import torch
from compiling import compiling_for
from random_layer import random_layer

with compiling_for(90) as compiled:
    layer = random_layer(num_tokens=1, top_k=2, num_experts=8, hidden_size=128,
                         intermediate_size=128, weights="int8", dtype=torch.bfloat16)
    layer.triton()
    replace(layer, expert_to_slot=torch.arange(8, dtype=torch.int32)).triton()
for kernel in compiled:
    before, _, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
    print(json.dumps({
        "name": kernel.metadata.name,
        "dependent": kernel.metadata.launch_pdl,
        "reads first": "ld.global" in before,
    }))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_product_behind_an_admission_waits_before_it_reads() -> None:
    """What an admission has changed is where slots are; the second product starts behind that."""
    kernels = run_compiler(PAGED)
    assert {kernel["name"] for kernel in kernels} == {"gemv_kernel"}
    found = [(kernel["dependent"], kernel["reads first"]) for kernel in kernels]
    assert found == [(False, True), (True, True), (True, False), (True, True)]
