"""Reading of files into frames, in numba's Python: the job of `readers`' threads.

A job is a list of pages and of the frames that they go to. Each page lies in files in *parts*; the
threads claim parts until none is left. Who fails writes why into the status, once, and the others
leave what is not begun.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qmoe_kernels.cpu.atomics import I32, I64, ON_X86, load, replace
from qmoe_kernels.cpu.intrinsics import claim, pointer_to
from qmoe_kernels.cpu.loops import OPTIONS, loop

bytes_at = pointer_to(types.int8)
longs_at = pointer_to(types.int64)

# Numbers of Linux's system calls.
PREAD, FSTAT = (17, 5) if ON_X86 else (67, 80)
# Places in what fstat writes, counted in int64, on both architectures.
STAT_WORDS, STAT_SIZE, STAT_SECONDS, STAT_NANOSECONDS = 32, 6, 11, 12
INTERRUPTED = 4  # EINTR: a signal came, nothing is wrong

# The arguments of `read`. Lists, tables and frames are addresses.
CLAIMED, STATUS, COUNT, PAGES, FRAMES, FIRST, PARTS, MOST, FILES, MEMORY, FRAME_BYTES = range(11)
NUM_ARGUMENTS = 11
# A row of the table of parts, and one of the table of files.
FILE, FILE_OFFSET, OFFSET, NBYTES = range(4)
DESCRIPTOR, SIZE, SECONDS, NANOSECONDS = range(4)
# What a status says, beside the system's numbers of errors, which are smaller: the file ended, it
# was changed, nobody wants the rest. The number of the file lies above.
ENDED, CHANGED, CANCELLED = 4001, 4002, 4003
FILE_BIT = 12


def _system_call(builder: Any, number: int, *arguments: Any) -> Any:
    """What Linux returns, or an error's number with a minus."""
    module = builder.module

    def declared(name: str, kind: ir.FunctionType) -> Any:
        return module.globals.get(name) or ir.Function(module, kind, name)

    call = declared("syscall", ir.FunctionType(I64, [I64], var_arg=True))
    result = builder.call(call, [I64(number), *arguments])
    where = declared("__errno_location", ir.FunctionType(I32.as_pointer(), []))
    error = builder.sext(builder.load(builder.call(where, [])), I64)
    failed = builder.icmp_signed("<", result, I64(0))
    return builder.select(failed, builder.neg(error), result)


@intrinsic
def read_at(_: Any, descriptor: Any, address: Any, nbytes: Any, offset: Any) -> Any:
    """Read from a place in a file to an address; how many bytes it were, or less than 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _system_call(builder, PREAD, *arguments)

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def is_unchanged(_: Any, descriptor: Any, size: Any, seconds: Any, nanoseconds: Any) -> Any:
    """Whether a file has a size and a time of its last change."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = cgutils.alloca_once(builder, ir.ArrayType(I64, STAT_WORDS))
        address = builder.ptrtoint(found, I64)
        same = builder.icmp_signed(
            "==", _system_call(builder, FSTAT, arguments[0], address), I64(0)
        )
        places = (STAT_SIZE, STAT_SECONDS, STAT_NANOSECONDS)
        for place, expected in zip(places, arguments[1:], strict=True):
            value = builder.load(builder.gep(found, [I32(0), I32(place)]))
            same = builder.and_(same, builder.icmp_signed("==", value, expected))
        return same

    return types.boolean(types.int64, types.int64, types.int64, types.int64), generate


@njit(**OPTIONS)
def read_part(part, file, frame):
    """Read one part of a page; 0, or why not."""
    done = 0
    while done < part[NBYTES]:
        count = read_at(
            file[DESCRIPTOR],
            frame + part[OFFSET] + done,
            part[NBYTES] - done,
            part[FILE_OFFSET] + done,
        )
        if count > 0:
            done += count
        elif count == 0:
            return ENDED
        elif count != -INTERRUPTED:
            return -count
    # Afterwards: what was changed before it was read is seen, what is changed later does not count.
    if is_unchanged(file[DESCRIPTOR], file[SIZE], file[SECONDS], file[NANOSECONDS]):
        return 0
    return CHANGED


@njit(**OPTIONS)
def prepare_reads(count, capacity, job):
    """Fill in the job's arguments; whether what is posted can be one."""
    a = longs_at(job)
    if not 0 < count <= capacity:
        return False
    a[COUNT] = count
    longs_at(a[CLAIMED])[0] = 0
    return True


def read(a):
    """Claim parts and read them until none is left."""
    items = a[COUNT] * a[MOST]
    while load(a[STATUS]) == 0:
        item = claim(a[CLAIMED])
        if item >= items:
            return
        i = item // a[MOST]
        page = longs_at(a[PAGES])[i]
        first = longs_at(a[FIRST] + 8 * page)
        row = first[0] + item % a[MOST]
        if row < first[1]:
            part = longs_at(a[PARTS] + 32 * row)
            file = longs_at(a[FILES] + 32 * part[FILE])
            frame = a[MEMORY] + longs_at(a[FRAMES])[i] * a[FRAME_BYTES]
            error = read_part(part, file, frame)
            if error:
                # What another file holds may be NaN, which ends a GPU's context where tokens are
                # drawn, before anybody is told.
                target = bytes_at(frame + part[OFFSET])
                for k in range(part[NBYTES]):
                    target[k] = 0
                replace(a[STATUS], 0, (part[FILE] << FILE_BIT) | error)


def make_read() -> Any:
    return loop(read)
