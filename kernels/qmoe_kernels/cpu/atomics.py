"""What threads that Python does not know say to one another: words of memory, sleep, the time.

Every access is sequentially consistent: all threads see one order of them, so that a proof over
interleavings (``tests/kernels/test_worker_protocol.py``) is one of the machine's behaviour.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)
ORDER = "seq_cst"
# Numbers of Linux's system call futex, and its operations.
ON_X86 = platform.machine() in ("x86_64", "AMD64")
FUTEX = 202 if ON_X86 else 98
FUTEX_WAIT, FUTEX_WAKE = 0, 1
EVERYBODY = 0x7FFFFFFF
CLOCK_MONOTONIC = 1


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


def _declared(builder: Any, name: str, kind: ir.FunctionType) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic
def load(_: Any, address: Any) -> Any:
    """The int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(builder, arguments[0]), ORDER, 8)

    return types.int64(types.int64), generate


@intrinsic
def swap(_: Any, address: Any, value: Any) -> Any:
    """Put an int64 at an address and return what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, arguments[0]), arguments[1], ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def add(_: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address and return what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def replace(_: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put an int64 at an address if ``expected`` is there; return whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _word(builder, arguments[0])
        found = builder.cmpxchg(where, arguments[1], arguments[2], ORDER)
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(_: Any) -> Any:
    """Let the processor know that this thread spins."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if ON_X86:
            name, kinds, given = "llvm.x86.sse2.pause", [], []
        else:  # yield
            name, kinds, given = "llvm.aarch64.hint", [I32], [I32(1)]
        builder.call(_declared(builder, name, ir.FunctionType(ir.VoidType(), kinds)), given)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def now(_: Any) -> Any:
    """Nanoseconds of the system's monotonic clock."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        kind = ir.FunctionType(I32, [I32, time.type])
        builder.call(_declared(builder, "clock_gettime", kind), [I32(CLOCK_MONOTONIC), time])
        seconds, nanoseconds = (builder.load(builder.gep(time, [I32(0), I32(i)])) for i in (0, 1))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), nanoseconds)

    return types.int64(), generate


def _futex(builder: Any, address: Any, operation: int, value: Any, timeout: Any) -> None:
    kind = ir.FunctionType(I64, [I64], var_arg=True)
    call = _declared(builder, "syscall", kind)
    nothing = I64(0)
    builder.call(call, [I64(FUTEX), address, I64(operation), value, timeout, nothing, nothing])


@intrinsic
def sleep_on(_: Any, address: Any, value: Any, nanoseconds: Any) -> Any:
    """Sleep for less than a second, unless the low half of a word is no longer ``value``'s.

    `wake` ends it, and a signal may.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        for i, part in enumerate((I64(0), arguments[2])):
            builder.store(part, builder.gep(time, [I32(0), I32(i)]))
        low = builder.and_(arguments[1], I64(0xFFFFFFFF))
        _futex(builder, arguments[0], FUTEX_WAIT, low, builder.ptrtoint(time, I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def wake(_: Any, address: Any) -> Any:
    """Wake all who sleep on a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _futex(builder, arguments[0], FUTEX_WAKE, I64(EVERYBODY), I64(0))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def run(_: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with one int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
