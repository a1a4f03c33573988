"""Dot products of 8-bit weights with fp32, in LLVM's language: vectors of 16 lanes.

LLVM makes 16 lanes of fp32 one register of AVX-512, two of AVX2 or four of NEON: the order of
additions, and so every bit, is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

from qmoe_kernels.cpu.native import dots_name

LANES = 16
STEP = 64  # weights of a row per turn: a line of the cache

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


def _vector(element: ir.Type, value: Any, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _widen(builder: Any, values: Any, fp8: bool) -> list[Any]:
    """<16 n x i8> to n <16 x float>: int8 as it is; e4m3fn / 256, see `quantization.widen`."""
    lanes = values.type.count
    if fp8:
        half = builder.sext(values, ir.VectorType(I16, lanes))
        half = builder.shl(half, _vector(I16, 7, lanes))
        values = builder.and_(half, _vector(I16, ~0x4000, lanes))
    wide = []
    for first in range(0, lanes, LANES):
        places = ir.Constant(ir.VectorType(I32, LANES), [*range(first, first + LANES)])
        part = builder.shuffle_vector(values, values, places)
        if fp8:
            part = builder.bitcast(part, ir.VectorType(ir.HalfType(), LANES))
            wide.append(builder.fpext(part, ir.VectorType(F32, LANES)))
        else:
            part = builder.sext(part, ir.VectorType(I32, LANES))
            wide.append(builder.sitofp(part, ir.VectorType(F32, LANES)))
    return wide


def _declared(module: ir.Module, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


class _Dots:
    """Emits the dot products of some rows of weights with some tokens' rows."""

    def __init__(self, builder: Any, rows: int, tokens: int, fp8: bool, arguments: Any) -> None:
        self.builder, self.rows, self.tokens, self.fp8 = builder, rows, tokens, fp8
        (weights, row_bytes, x, x_bytes, table, self.columns, self.ahead, self.out,
         self.out_bytes) = arguments  # fmt: skip
        self.weights = [self._plus(weights, row_bytes, row) for row in range(rows)]
        numbers = [self._load(self._plus(table, I64(8), t), I64, 8) for t in range(tokens)]
        self.x = [builder.add(x, builder.mul(x_bytes, number)) for number in numbers]
        # Sums of each (row, token), then the largest magnitude of each row's codes, if they are
        # e4m3fn: 0x7f is NaN.
        self.states = [_vector(F32, 0.0)] * (rows * tokens)
        if fp8:
            self.states += [_vector(I8, 0, STEP)] * rows

    def _plus(self, address: Any, stride: Any, times: int) -> Any:
        return self.builder.add(address, self.builder.mul(stride, I64(times)))

    def _load(self, address: Any, kind: ir.Type, align: int) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def loop(self, start: Any, step: int, body: Callable[[Any], None], whole: bool = True) -> Any:
        """Run ``body`` from ``start`` on in steps, if ``whole`` while a whole one is left.

        Returns:
            where it ends.
        """
        builder = self.builder
        before = builder.basic_block
        head, inside, after = (builder.append_basic_block(n) for n in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(I64)
        k.add_incoming(start, before)
        phis = [builder.phi(state.type) for state in self.states]
        for phi, state in zip(phis, self.states, strict=True):
            phi.add_incoming(state, before)
        following = builder.add(k, I64(step))
        more = builder.icmp_signed("<", k, self.columns)
        if whole:
            more = builder.icmp_signed("<=", following, self.columns)
        builder.cbranch(more, inside, after)
        builder.position_at_end(inside)
        self.states = list(phis)
        body(k)
        k.add_incoming(following, builder.basic_block)
        for phi, state in zip(phis, self.states, strict=True):
            phi.add_incoming(state, builder.basic_block)
        builder.branch(head)
        builder.position_at_end(after)
        self.states = list(phis)
        return k

    def line(self, k: Any) -> None:
        """One line of each row; the line that comes ``ahead`` bytes later is asked for."""
        builder, pointer = self.builder, I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        prefetch = _declared(builder.module, "llvm.prefetch.p0", kind)
        addresses = [builder.add(row, k) for row in self.weights]
        for address in addresses:
            there = builder.inttoptr(builder.add(address, self.ahead), pointer)
            builder.call(prefetch, [there, I32(0), I32(3), I32(1)])
        if self.fp8:
            for row, address in enumerate(addresses):
                self._remember(row, self._load(address, ir.VectorType(I8, STEP), 1))
        for offset in range(0, STEP, 2 * LANES):
            at = builder.add(k, I64(offset))
            self.multiply(at, [self._bytes(row, at, 2 * LANES) for row in range(self.rows)])

    def lanes(self, k: Any) -> None:
        """16 weights of each row."""
        values = [self._bytes(row, k) for row in range(self.rows)]
        self._remember_all(values)
        self.multiply(k, values)

    def rest(self, k: Any) -> None:
        """Fewer than 16 weights of each row, zeros behind them; a token's row has zeros there."""
        builder = self.builder
        count, values = builder.sub(self.columns, k), []
        for row in range(self.rows):
            value, source = _vector(I8, 0), builder.add(self.weights[row], k)
            # Bytes behind the row may not be ours to read: the last of them again and again.
            for lane in range(LANES - 1):
                inside = builder.icmp_signed("<", I64(lane), count)
                offset = builder.select(inside, I64(lane), I64(0))
                byte = self._load(builder.add(source, offset), I8, 1)
                byte = builder.select(inside, byte, I8(0))
                value = builder.insert_element(value, byte, I32(lane))
            values.append(value)
        self._remember_all(values)
        self.multiply(k, values)

    def multiply(self, k: Any, values: list[Any]) -> None:
        builder, vector = self.builder, ir.VectorType(F32, LANES)
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = _declared(builder.module, f"llvm.fma.v{LANES}f32", kind)
        wide = [_widen(builder, v, self.fp8) for v in values]
        for part in range(len(wide[0])):
            for token in range(self.tokens):
                place = builder.mul(builder.add(k, I64(part * LANES)), I64(4))
                x = self._load(builder.add(self.x[token], place), vector, 4)
                for row in range(self.rows):
                    i = token * self.rows + row
                    self.states[i] = builder.call(fma, [wide[row][part], x, self.states[i]])

    def finish(self) -> None:
        """Add the lanes, halves to halves, and store the sums."""
        builder = self.builder
        for token in range(self.tokens):
            for row in range(self.rows):
                total = self._halved(self.states[token * self.rows + row], builder.fadd)
                if self.fp8:
                    total = builder.fmul(total, F32(256.0))
                    codes = self.states[self.rows * self.tokens + row]
                    nan = builder.icmp_unsigned("==", self._halved(codes, self._larger), I8(0x7F))
                    total = builder.select(nan, F32(float("nan")), total)
                place = builder.add(self._plus(self.out, self.out_bytes, token), I64(4 * row))
                builder.store(total, builder.inttoptr(place, F32.as_pointer()))

    def _bytes(self, row: int, k: Any, lanes: int = LANES) -> Any:
        address = self.builder.add(self.weights[row], k)
        return self._load(address, ir.VectorType(I8, lanes), 1)

    def _remember_all(self, values: list[Any]) -> None:
        if self.fp8:
            places = ir.Constant(ir.VectorType(I32, STEP), [*range(LANES)] * (STEP // LANES))
            for row, value in enumerate(values):
                self._remember(row, self.builder.shuffle_vector(value, value, places))

    def _remember(self, row: int, codes: Any) -> None:
        i = self.rows * self.tokens + row
        magnitudes = self.builder.and_(codes, _vector(I8, 0x7F, STEP))
        self.states[i] = self._larger(self.states[i], magnitudes)

    def _larger(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_unsigned(">", a, b), a, b)

    def _halved(self, values: Any, combine: Callable[[Any, Any], Any]) -> Any:
        builder, lanes = self.builder, values.type.count
        while lanes > 1:
            lanes //= 2
            low, high = (
                ir.Constant(ir.VectorType(I32, lanes), [*range(first, first + lanes)])
                for first in (0, lanes)
            )
            values = combine(
                builder.shuffle_vector(values, values, low),
                builder.shuffle_vector(values, values, high),
            )
        return builder.extract_element(values, I32(0))


def assembly(blocks: Iterable[tuple[bool, int, int]]) -> str:
    """Functions that multiply rows of weights with rows of fp32, named by `native.dots_name`.

    Their arguments are int64: the address of the first row of weights; the bytes from one to the
    next; the address of all tokens' rows, which are fp32, zeros behind the columns up to a multiple
    of 16; the bytes from one to the next; the address of a table of which of them are meant; the
    number of columns; how many bytes further on the weights are that come
    next; where the first token's sums go, one after the other; the bytes from a token's sums to the
    next one's. A sum adds 16 lanes of fp32, each in order; neither how many rows nor how many
    tokens there are changes a bit of it. Of e4m3fn a NaN gives NaN.

    Args:
        blocks: whether weights are FP8, rows of weights, and rows of tokens of each function.
    """
    module = ir.Module()
    for fp8, rows, tokens in blocks:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 9)
        function = ir.Function(module, kind, dots_name(fp8, rows, tokens))
        builder = ir.IRBuilder(function.append_basic_block("start"))
        emit = _Dots(builder, rows, tokens, fp8, function.args)
        k = emit.loop(I64(0), STEP, emit.line)
        k = emit.loop(k, LANES, emit.lanes)
        emit.loop(k, LANES, emit.rest, whole=False)
        emit.finish()
        builder.ret_void()
    return str(module)
