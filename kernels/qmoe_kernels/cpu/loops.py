"""The loops themselves, in numba's Python; `native` imports this where it has to compile them.

A loop takes the address of int64 arguments, of which the first two are addresses of counters, of
items and of threads: any number of threads call the loop at once with the same arguments, and each
claims the next item until none is left. No thread needs Python. Items are rows of an output, so
that who does which changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock

from qmoe_kernels.cpu import ROWS_AT_ONCE
from qmoe_kernels.cpu.atomics import pause
from qmoe_kernels.cpu.intrinsics import (
    advance,
    bits_of_float,
    call,
    claim,
    float_of_bits,
    float_of_half_bits,
    nearest_half,
    pointer_to,
    read_counter,
    yield_processor,
)

bytes_at = pointer_to(types.int8)
shorts_at = pointer_to(types.int16)
ints_at = pointer_to(types.int32)
longs_at = pointer_to(types.int64)
floats_at = pointer_to(types.float32)
doubles_at = pointer_to(types.float64)

# Counters behind `claim`'s two, in bytes from them: see `native.COUNTERS`.
ROUTED, DOWN_DONE, FOUND = 16, 24, 32

# How far ahead of what is multiplied the weights are asked for: half of it is too near on AMD's
# Zen 4, and twice as much changes nothing.
AHEAD_BYTES = 1 << 14

# At a counter, before others may run: who is waited for ends an item, within some microseconds,
# and who lets others run can be away for twenty.
LOOKS = 1000

BF16, FP16, FP32 = 0, 1, 2  # places in `cpu.DTYPES`

OPTIONS = {
    "error_model": "numpy",  # x / 0 is infinity and raises nothing
    # Only loops call these: what Python would call them by takes as long to compile again.
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
ONE, HALF = np.float32(1.0), np.float32(0.5)
TINY = np.float32(np.finfo(np.float32).tiny)


@global_compiler_lock
def loop(function: Callable[..., Any]) -> tuple[str, str]:
    """Compile ``function(arguments)`` for threads that Python does not know.

    Returns:
        its code in LLVM's language, and its name there: of the function itself, not of what numba
        makes for C, which may call Python. No loop raises.
    """
    signature = ((types.CPointer(types.int64),), types.void)
    # What `cfunc` does, without machine code, which is made of all loops together.
    compiled = CFunc(function, signature, {}, {"error_model": "numpy"})._compile_uncached()
    compiled.library._ensure_finalized()  # which links the functions that it calls
    return compiled.library.get_llvm_str(), compiled.fndesc.llvm_func_name


# ---- numbers -----------------------------------------------------------------------------------


@njit(**OPTIONS)
def float_of_code(code, fp8):
    """An int8, or the bits of an e4m3fn number as int8, in fp32."""
    if not fp8:
        return np.float32(code)
    half = np.int16((np.int16(code) << 7) & ~0x4000)
    value = float_of_half_bits(half) * np.float32(256.0)
    return np.float32(np.nan) if (code & 0x7F) == 0x7F else value


@njit(**OPTIONS)
def code_of_float(x, fp8):
    """Round half to even to an integer, or to the bits of an e4m3fn number; x is in range."""
    if not fp8:
        return np.int8(np.rint(x))
    bits = bits_of_float(x)
    magnitude = bits & 0x7FFFFFFF
    # Normal: drop 20 bits of the mantissa and rebase the exponent from 127 to 7.
    odd = (magnitude >> 20) & 1
    normal = (magnitude + 0x7FFFF + odd - (120 << 23)) >> 20
    # Below 2**-6: in the sum with 2**14 the last bit counts units of 2**-9.
    magic = np.int32((127 + 14) << 23)
    small = bits_of_float(float_of_bits(np.int32(magnitude)) + float_of_bits(magic)) - magic
    code = small if magnitude < ((127 - 6) << 23) else normal
    return np.int8(code | ((bits >> 24) & 0x80))


@njit(**OPTIONS)
def read_floats(to, address, count, dtype):
    """Widen ``count`` numbers to fp32 and return the bits of the largest magnitude."""
    largest = np.int32(0)
    if dtype == BF16:
        shorts = shorts_at(address)
        for i in range(count):
            bits = np.int32(shorts[i]) << 16
            largest = max(largest, np.int32(bits & 0x7FFFFFFF))
            to[i] = float_of_bits(np.int32(bits))
    elif dtype == FP16:
        shorts = shorts_at(address)
        for i in range(count):
            x = float_of_half_bits(shorts[i])
            largest = max(largest, np.int32(bits_of_float(x) & 0x7FFFFFFF))
            to[i] = x
    else:
        floats = floats_at(address)
        for i in range(count):
            x = floats[i]
            largest = max(largest, np.int32(bits_of_float(x) & 0x7FFFFFFF))
            to[i] = x
    return largest


# ---- products ----------------------------------------------------------------------------------


@njit(**OPTIONS)
def tanh(x):
    return np.float32(math.tanh(x))


@njit(**OPTIONS)
def exp(x):
    """e**x within two units of the last place; of many lanes at once, which the C library's is not.

    x = n log(2) + r; the polynomial of e**r is that of Cephes' expf (S. Moshier, netlib).
    """
    inside = np.float32(90.0) if x > np.float32(90.0) else x
    inside = inside if inside > np.float32(-106.0) else np.float32(-106.0)
    n = np.rint(inside * np.float32(1.44269504))
    r = inside - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    # In two steps: 2**n alone may be no fp32 number.
    whole = np.int32(n)
    half = np.int32(whole >> 1)
    scale = float_of_bits(np.int32((half + 127) << 23))
    scale_rest = float_of_bits(np.int32((whole - half + 127) << 23))
    return (p * r * r + r + ONE) * scale * scale_rest if x == x else x


@njit(**OPTIONS)
def gated(x, up, flags, numbers):
    """`activations.apply` on one number of gate and up; ``up`` is not used without a gate."""
    name, has_gate, limited, gate_capped, up_capped = (
        flags[0], flags[1], flags[2], flags[3], flags[4],
    )  # fmt: skip
    alpha, shift, limit = numbers[0], numbers[1], numbers[2]
    if limited:
        up = limit if up > limit else (-limit if up < -limit else up)
        if limited == 1:
            x = limit if x > limit else x
    if name == 0:
        linear = numbers[3] * tanh(x / numbers[3]) if gate_capped else x
        out = linear / (ONE + exp(-alpha * x))
    elif name == 1:
        out = HALF * x * (ONE + np.float32(math.erf(x * np.float32(0.7071067811865476))))
    elif name == 2:
        inner = x + np.float32(0.044715) * x * x * x
        out = HALF * x * (ONE + tanh(np.float32(0.7978845608028654) * inner))
    else:
        out = np.float32(0.0) if x < 0 else x
        if name == 4:
            out = out * out
    if has_gate:
        if limited == 2:
            out = limit if out > limit else out
        if up_capped:
            up = numbers[4] * tanh(up / numbers[4])
        out = out * (up + shift)
    return out


@njit(**OPTIONS)
def read_float(address, index, dtype):
    if dtype == FP32:
        return floats_at(address)[index]
    short = shorts_at(address)[index]
    if dtype == FP16:
        return float_of_half_bits(short)
    return float_of_bits(np.int32(np.int32(short) << 16))


@njit(**OPTIONS)
def group(a):
    """Pairs by expert; see `cpu.layer` for the arguments. For one thread."""
    ids, num_pairs, top_k, num_experts, few_rows = longs_at(a[2]), a[3], a[4], a[5], a[7]
    found, counts = longs_at(a[0] + FOUND), longs_at(a[8])
    pairs, tokens, order = longs_at(a[9]), longs_at(a[10]), longs_at(a[11])
    offsets, experts, slots = longs_at(a[12]), longs_at(a[13]), longs_at(a[14])
    progress = longs_at(a[15])
    for expert in range(num_experts):
        counts[expert] = 0
    for pair in range(num_pairs):
        if 0 <= ids[pair] < num_experts:
            counts[ids[pair]] += 1
    number, start, missing = 0, 0, np.int64(-1)
    for many in range(2):  # experts with few rows, then the others
        for expert in range(num_experts):
            count = counts[expert]
            if count > 0 and (count > few_rows) == (many == 1):
                experts[number], offsets[number] = expert, start
                slots[number], progress[number] = expert, 0
                if a[6]:
                    slots[number] = np.int64(ints_at(a[6])[expert])
                    if slots[number] < 0 or slots[number] >= a[19]:
                        missing = expert
                counts[expert] = -1 - start  # from here on, where its next pair goes
                number, start = number + 1, start + count
        if many == 0:
            found[0] = number
    offsets[number], found[1], found[2] = start, number, missing
    for pair in range(num_pairs):
        order[pair] = pair
        if 0 <= ids[pair] < num_experts:
            place = -1 - counts[ids[pair]]
            pairs[place], tokens[place] = pair, pair // top_k
            counts[ids[pair]] -= 1


@njit(**OPTIONS)
def multiply(
    dots, rows, weights, row_bytes, x, x_bytes, table, count, columns, ahead, out, out_bytes
):
    """At most `ROWS_AT_ONCE` rows of weights with ``count`` rows of an expert.

    ``dots`` are the address of a function for one row of each; then for 1, 2 and 4 tokens an
    address, and for how many rows of weights it is.
    """
    token = 0
    while token < count:
        which, tokens = 1, 1
        if count - token >= 4:
            which, tokens = 5, 4
        elif count - token >= 2:
            which, tokens = 3, 2
        if rows == ROWS_AT_ONCE:
            function, step = dots[which], dots[which + 1]
        else:
            function, step, tokens = dots[0], 1, 1
        row = 0
        while row < rows:
            call(function, weights + row * row_bytes, row_bytes, x, x_bytes, table + 8 * token,
                 columns, ahead, out + token * out_bytes + 4 * row, out_bytes)  # fmt: skip
            row += step
        token += tokens
        ahead = 0  # asked for with the first token's


@njit(**OPTIONS)
def finish(p, number, first, last):
    """Scales, bias and gate of some channels of an expert's rows, from its sums."""
    channels, parts, offsets, sources = p[2], p[3], longs_at(p[11]), longs_at(p[10])
    begin = longs_at(p[12])[number] * parts * channels
    scales, row_scales = floats_at(p[14] + 4 * begin), floats_at(p[17])
    targets, flags, numbers = longs_at(p[20]), longs_at(p[23]), floats_at(p[24])
    for row in range(offsets[number], offsets[number + 1]):
        sums = floats_at(p[22] + 4 * row * parts * channels)
        out = floats_at(p[18] + targets[row] * p[19])
        row_scale = row_scales[sources[row]] if p[17] else ONE
        if not (p[23] or p[15]):  # what down_proj is, most of the time: of many lanes at once
            for i in range(first, last):
                out[i] = sums[i] * scales[i] * row_scale
        elif p[23] and not (p[15] or flags[0] or flags[2] or flags[3] or flags[4]) and parts == 2:
            for i in range(first, last):  # silu, of many lanes, too
                x, j = sums[i] * scales[i] * row_scale, channels + i
                up = sums[j] * scales[j] * row_scale
                out[i] = x / (ONE + exp(-numbers[0] * x)) * (up + numbers[1])
        else:
            for i in range(first, last):
                x = sums[i] * scales[i] * row_scale
                if p[15]:
                    x += read_float(p[15], begin + i, p[16])
                up = x
                if parts == 2:
                    j = channels + i
                    up = sums[j] * scales[j] * row_scale
                    if p[15]:
                        up += read_float(p[15], begin + j, p[16])
                out[i] = gated(x, up, flags, numbers) if p[23] else x
        if p[21] == BF16:
            for i in range(first, last):
                bits = bits_of_float(out[i])
                nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
                out[i] = float_of_bits(np.int32(nearest)) if out[i] == out[i] else out[i]
        elif p[21] == FP16:
            for i in range(first, last):
                out[i] = nearest_half(out[i])


@njit(**OPTIONS)
def weights_of(p, item):
    """Where the weights of an item of a product begin."""
    return p[4] + longs_at(p[13])[item // p[0]] * p[5] + item % p[0] * p[1] * p[6]


@njit(**OPTIONS)
def product(p, item, upcoming):
    """Some channels of an expert's rows; the weights at ``upcoming`` are wanted next."""
    blocks, size, channels, parts, row_bytes, columns = p[0], p[1], p[2], p[3], p[6], p[7]
    offsets, number, first = longs_at(p[11]), item // blocks, item % blocks * size
    last = min(first + size, channels)
    start, count = offsets[number], offsets[number + 1] - offsets[number]
    near = -(-AHEAD_BYTES // (ROWS_AT_ONCE * max(1, row_bytes))) * ROWS_AT_ONCE  # in rows
    for part in range(parts):
        at = weights_of(p, item) + part * channels * row_bytes
        to = p[22] + 4 * (start * parts * channels + part * channels + first)
        then = upcoming if part + 1 == parts else at + channels * row_bytes
        left = last - first
        while left > 0:
            rows = min(ROWS_AT_ONCE, left)
            ahead = near * row_bytes
            if left <= near:  # that is in what is multiplied next
                ahead = then + (near - left) * row_bytes - at
            multiply(longs_at(p[25]), rows, at, row_bytes, p[8], p[9], p[10] + 8 * start,
                     count, columns, ahead, to, 4 * parts * channels)  # fmt: skip
            at, to, left = at + rows * row_bytes, to + 4 * rows, left - rows
    finish(p, number, first, last)


@njit(**OPTIONS)
def add_rows(s, token):
    """The sum over a token's experts; see `cpu._sum` for the arguments."""
    top_k, columns, dtype, num_experts = s[1], s[2], s[3], s[8]
    itemsize = 4 if dtype == FP32 else 2
    out = floats_at(s[6] + 4 * token * columns)
    for i in range(columns):
        out[i] = np.float32(0.0)
    for pair in range(token * top_k, token * top_k + top_k):
        if s[7] and not 0 <= longs_at(s[7])[pair] < num_experts:
            continue  # NaN times zero would be NaN
        weight = floats_at(s[5])[pair]
        row = s[4] + pair * columns * itemsize
        if dtype == FP32:
            floats = floats_at(row)
            for i in range(columns):
                out[i] += weight * floats[i]
        else:
            for i in range(columns):
                out[i] += weight * read_float(row, i, dtype)


@njit(**OPTIONS)
def wait_for(address, number):
    """Wait until a counter has come to a number; let others run where that takes long."""
    looks = 0
    while read_counter(address) < number:
        looks += 1
        if looks < LOOKS:
            pause()
        else:
            yield_processor()


def make_layer() -> Any:
    """Both products of a layer and the sum over experts; see `cpu.layer` for the arguments.

    Items are in order: the routing, those of the first product, of the second, of the sum. A thread
    that needs what others have claimed waits for it. Each does its items in order, so that the
    first of those that are not done never waits.
    """

    def layer(a):
        routed, down_done, found = a[0] + ROUTED, a[0] + DOWN_DONE, longs_at(a[0] + FOUND)
        item = claim(a[0]) - 1
        if item < 0:
            group(a)
            advance(routed)
            item = claim(a[0]) - 1
        wait_for(routed, 1)
        num_few = found[0] if found[2] < 0 else 0
        up, down, total = longs_at(a[16]), longs_at(a[17]), longs_at(a[18])
        ups = num_few * up[0]
        downs = num_few * down[0] if a[17] else 0
        while item < ups + downs:
            following = claim(a[0]) - 1  # now, so that its first rows can be asked for in time
            p, at = (up, following) if following < ups else (down, following - ups)
            upcoming = weights_of(p, at) if following < ups + downs else up[4]
            p, at = (up, item) if item < ups else (down, item - ups)
            done = a[15] + 8 * (at // p[0])
            if item >= ups:
                wait_for(done, up[0])
                done = down_done
            product(p, at, upcoming)
            if item < ups or a[18]:  # else nobody waits for it
                advance(done)
            item = following
        if a[18] and found[1] == num_few:
            while item < ups + downs + total[0]:
                wait_for(down_done, downs)
                add_rows(total, item - ups - downs)
                item = claim(a[0]) - 1

    return loop(layer)


def make_weighted_sum() -> Any:
    """The sum over a token's experts; see `cpu._sum` for the arguments."""

    def weighted_sum(a):
        total = longs_at(a[2])
        token = claim(a[0])
        while token < total[0]:
            add_rows(total, token)
            token = claim(a[0])

    return loop(weighted_sum)


def make_linear() -> Any:
    """Few rows times a whole matrix; see `cpu.linear` for the arguments."""

    def linear(a):
        channels, columns, row_bytes, size, count = a[2], a[3], a[5], a[6], a[9]
        near = -(-AHEAD_BYTES // (ROWS_AT_ONCE * row_bytes)) * ROWS_AT_ONCE * row_bytes
        block = claim(a[0])
        while block * size < channels:
            first, last = block * size, min(block * size + size, channels)
            for row in range(first, last, ROWS_AT_ONCE):
                multiply(longs_at(a[13]), min(ROWS_AT_ONCE, last - row), a[4] + row * row_bytes,
                         row_bytes, a[7], a[8], a[10], count, columns, near, a[11] + 4 * row,
                         4 * channels)  # fmt: skip
            for token in range(count):
                sums = floats_at(a[11] + 4 * token * channels)
                out = shorts_at(a[12] + 2 * token * channels)
                if a[14]:
                    for i in range(first, last):
                        sums[i] += read_float(a[14], i, BF16)
                for i in range(first, last):
                    bits = bits_of_float(sums[i])
                    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                    out[i] = np.int16(nearest if sums[i] == sums[i] else 0x7FC0)
            block = claim(a[0])

    return loop(linear)


# ---- formats -----------------------------------------------------------------------------------


@njit(fastmath={"reassoc"}, **OPTIONS)
def squares(exact, codes, columns, fp8, out):
    error, norm = 0.0, 0.0
    for i in range(columns):
        x = np.float64(exact[i])
        off = np.float64(float_of_code(codes[i], fp8)) - x
        error += off * off
        norm += x * x
    out[0], out[1] = error, norm


@njit(**OPTIONS)
def narrow(x, scale, codes, columns, fp8):
    if fp8:
        for i in range(columns):
            x[i] = x[i] / scale
            codes[i] = code_of_float(x[i], True)
    else:
        for i in range(columns):
            x[i] = x[i] / scale
            codes[i] = code_of_float(x[i], False)


def make_quantize() -> Any:
    """Rows to codes and scales, and the squares of sampled rows; see `cpu.quantize_rows`."""

    def quantize(a):
        rows, columns, dtype, fp8 = a[2], a[3], a[4], a[5] != 0
        x = floats_at(a[10] + 4 * columns * claim(a[1]))  # the thread's own
        scales = floats_at(a[9])
        largest = np.float32(448.0) if fp8 else np.float32(127.0)
        row = claim(a[0])
        while row < rows:
            codes = bytes_at(a[8] + row * columns)
            scale = float_of_bits(read_floats(x, a[6] + row * a[7], columns, dtype)) / largest
            scale = TINY if scale < TINY else scale
            scales[row] = scale
            if math.isfinite(scale):
                narrow(x, scale, codes, columns, fp8)
                if a[11] and row % a[12] == 0:
                    out = doubles_at(a[11] + row // a[12] * 16)
                    if fp8:
                        squares(x, codes, columns, True, out)
                    else:
                        squares(x, codes, columns, False, out)
            else:  # which shows it; codes that are the same from run to run
                for i in range(columns):
                    codes[i] = 0
            row = claim(a[0])

    return loop(quantize)


@njit(**OPTIONS)
def row_is_wrong(x, codes, scale, columns, fp8, relative, bound):
    wrong = 0
    for i in range(columns):
        off = abs(float_of_code(codes[i], fp8) * scale - x[i]) - relative * abs(x[i])
        wrong |= not (off <= bound)  # so that NaN is
    return wrong


def make_compare() -> Any:
    """Which rows are further from their source than rounding; see `cpu.wrong_rows`."""

    def compare(a):
        rows, columns, dtype, fp8 = a[2], a[3], a[4], a[5] != 0
        x = floats_at(a[10] + 4 * columns * claim(a[1]))
        scales, limits, flags = floats_at(a[9]), floats_at(a[11]), bytes_at(a[12])
        row = claim(a[0])
        while row < rows:
            codes, scale = bytes_at(a[8] + row * columns), scales[row]
            read_floats(x, a[6] + row * a[7], columns, dtype)
            bound = limits[1] * scale
            if fp8:
                wrong = row_is_wrong(x, codes, scale, columns, True, limits[0], bound)
            else:
                wrong = row_is_wrong(x, codes, scale, columns, False, limits[0], bound)
            flags[row] = np.int8(wrong or not math.isfinite(scale))
            row = claim(a[0])

    return loop(compare)


@njit(**OPTIONS)
def widen_row(codes, out, columns, fp8):
    for i in range(columns):
        out[i] = np.int16(bits_of_float(float_of_code(codes[i], fp8)) >> 16)  # exact


def make_widen() -> Any:
    """Codes to bf16; see `cpu.widen`."""

    def widen(a):
        rows, columns = a[2], a[3]
        row = claim(a[0])
        while row < rows:
            codes, out = bytes_at(a[5] + row * a[6]), shorts_at(a[7] + row * columns * 2)
            if a[4]:
                widen_row(codes, out, columns, True)
            else:
                widen_row(codes, out, columns, False)
            row = claim(a[0])

    return loop(widen)
