"""Dot products of 8-bit and bf16 weights with fp32, in LLVM's language: vectors of 16 lanes.

LLVM makes 16 lanes of fp32 one register of AVX-512, two of AVX2 or four of NEON: the order of
additions, and so every bit, is the same on all of them.

Widening e4m3fn takes longer than reading it on a processor that reads 30 GB/s with one thread. Some
have an instruction that multiplies pairs of bf16 and adds them up in fp32: there, where the rows
are bf16 numbers too, weights are looked up in a table of bf16 (``FP8_PAIRS``), a third of the
instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from llvmlite import ir

from qmoe_kernels.cpu.native import BF16, FP8, FP8_PAIRS, dots_name

LANES = 16
STEP = 64  # bytes of a row per turn: a line of the cache

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


class _BFloat(ir.Type):
    """bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
# The halves of eight bytes that `vpunpcklbw` and `vpunpckhbw` put together of two vectors.
_HALVES = [
    [place for lane in range(0, STEP, 16) for i in range(lane + half, lane + half + 8)
     for place in (i, STEP + i)]
    for half in (0, 8)
]  # fmt: skip


def _vector(element: ir.Type, value: Any, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _widen(builder: Any, values: Any, fp8: bool) -> list[Any]:
    """<16 n x i8> to n <16 x float>: int8 as it is; e4m3fn / 256, see `quantization.widen`.

    <16 n x i16>, bf16, as they are.
    """
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
        elif values.type.element == I16:
            part = builder.shl(builder.zext(part, ir.VectorType(I32, LANES)), _vector(I32, 16))
            wide.append(builder.bitcast(part, ir.VectorType(F32, LANES)))
        else:
            part = builder.sext(part, ir.VectorType(I32, LANES))
            wide.append(builder.sitofp(part, ir.VectorType(F32, LANES)))
    return wide


def _declared(module: ir.Module, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


class _Dots:
    """Emits the dot products of some rows of weights with some tokens' rows."""

    def __init__(self, builder: Any, kind: str, rows: int, tokens: int, arguments: Any) -> None:
        self.builder, self.rows, self.tokens = builder, rows, tokens
        self.fp8, self.pairs = kind in (FP8, FP8_PAIRS), kind == FP8_PAIRS
        self.weight = I16 if kind == BF16 else I8
        (weights, row_bytes, x, x_bytes, table, self.columns, self.ahead, self.out,
         self.out_bytes) = arguments  # fmt: skip
        self.room = builder.alloca(ir.VectorType(self.weight, LANES))
        self.weights = [self._plus(weights, row_bytes, row) for row in range(rows)]
        numbers = [self._load(self._plus(table, I64(8), t), I64, 8) for t in range(tokens)]
        self.x = [builder.add(x, builder.mul(x_bytes, number)) for number in numbers]
        # Sums of each (row, token), then the largest magnitude of each row's codes, if they are
        # e4m3fn: 0x7f is NaN.
        self.states = [_vector(F32, 0.0)] * (rows * tokens)
        if self.fp8:
            self.states += [_vector(I8, 0, STEP)] * rows

    def _plus(self, address: Any, stride: Any, times: int) -> Any:
        return self.builder.add(address, self.builder.mul(stride, I64(times)))

    def _place(self, row: Any, k: Any) -> Any:
        """Where number ``k`` of a row of weights is."""
        return self._plus(row, k, self.weight.width // 8)

    @property
    def columns_of_line(self) -> int:
        return STEP * 8 // self.weight.width

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
        """One line of each row; the line that comes ``ahead`` bytes later is asked for.

        Into the second cache: what waits for the first takes room there that the lines which are
        read now need, and halves the rate on AMD's Zen 4.
        """
        builder, pointer = self.builder, I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        prefetch = _declared(builder.module, "llvm.prefetch.p0", kind)
        addresses = [self._place(row, k) for row in self.weights]
        for address in addresses:
            there = builder.inttoptr(builder.add(address, self.ahead), pointer)
            builder.call(prefetch, [there, I32(0), I32(2), I32(1)])
        if self.pairs:
            self.multiply_pairs(k, addresses)
            return
        if self.fp8:
            for row, address in enumerate(addresses):
                self._remember(row, self._load(address, ir.VectorType(I8, STEP), 1))
        for offset in range(0, self.columns_of_line, 2 * LANES):
            at = builder.add(k, I64(offset))
            self.multiply(at, [self._bytes(row, at, 2 * LANES) for row in range(self.rows)])

    def lanes(self, k: Any) -> None:
        """16 weights of each row."""
        values = [self._bytes(row, k) for row in range(self.rows)]
        self._remember_all(values)
        self.multiply(k, values)

    def rest(self, k: Any) -> None:
        """Fewer than 16 weights of each row, zeros behind them; a token's row has zeros there."""
        builder, pointer = self.builder, I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, I64, ir.IntType(1)])
        copy = _declared(builder.module, "llvm.memcpy.p0.p0.i64", kind)
        count, values = self._place(I64(0), builder.sub(self.columns, k)), []
        for row in self.weights:  # bytes behind the row may not be ours to read
            source = builder.inttoptr(self._place(row, k), pointer)
            builder.store(_vector(self.weight, 0), self.room)
            builder.call(
                copy, [builder.bitcast(self.room, pointer), source, count, ir.IntType(1)(0)]
            )
            values.append(builder.load(self.room))
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

    def multiply_pairs(self, k: Any, addresses: list[Any]) -> None:
        """A line of each row, as `multiply`; its e4m3fn numbers / 256 are bf16 numbers, too."""
        builder, vector, line = self.builder, ir.VectorType(F32, LANES), ir.VectorType(I8, STEP)
        name, kind = "llvm.x86.avx512.vpermi2var.qi.512", ir.FunctionType(line, [line] * 3)
        look_up = _declared(builder.module, name, kind)
        name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", [vector, PAIRS, PAIRS]
        multiply = _declared(builder.module, name, ir.FunctionType(vector, kind))
        x = [self._row_in_pairs(k, token) for token in range(self.tokens)]
        for row, address in enumerate(addresses):
            codes = self._load(address, line, 1)
            low, high = (
                builder.call(look_up, [table[0], codes, table[1]]) for table in _bf16_tables()
            )
            high = builder.or_(high, builder.and_(codes, _vector(I8, -0x80, STEP)))
            for half, places in enumerate(_HALVES):
                mask = ir.Constant(ir.VectorType(I32, STEP), places)
                weights = builder.bitcast(builder.shuffle_vector(low, high, mask), PAIRS)
                for token in range(self.tokens):
                    i = token * self.rows + row
                    self.states[i] = builder.call(
                        multiply, [self.states[i], weights, x[token][half]]
                    )

    def _row_in_pairs(self, k: Any, token: int) -> list[Any]:
        """64 numbers of a token's row in bf16, in the order of `_HALVES`."""
        builder, vector = self.builder, ir.VectorType(F32, LANES)
        name, kind = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.FunctionType(PAIRS, [vector] * 2)
        narrow = _declared(builder.module, name, kind)
        eights = []
        for first in range(0, STEP, 8):
            place = builder.mul(builder.add(k, I64(first)), I64(4))
            address = builder.add(self.x[token], place)
            eights.append(self._load(address, ir.VectorType(F32, 8), 4))
        join = ir.Constant(ir.VectorType(I32, LANES), [*range(LANES)])
        found = []
        for half in (0, 1):
            sixteens = [
                builder.shuffle_vector(eights[i + half], eights[i + 2 + half], join) for i in (0, 4)
            ]
            found.append(builder.call(narrow, [sixteens[1], sixteens[0]]))
        return found

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
        address = self._place(self.weights[row], k)
        return self._load(address, ir.VectorType(self.weight, lanes), 1)

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


@lru_cache
def _bf16_tables() -> list[tuple[ir.Constant, ir.Constant]]:
    """The low and the high bytes of the 128 magnitudes of e4m3fn, divided by 256, in bf16."""
    codes = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = (codes.float() / 256).bfloat16().view(torch.uint8).view(-1, 2)
    kind = ir.VectorType(I8, STEP)
    return [
        (ir.Constant(kind, column[:STEP].tolist()), ir.Constant(kind, column[STEP:].tolist()))
        for column in values.t()
    ]


def assembly(blocks: Iterable[tuple[str, int, int]]) -> str:
    """Functions that multiply rows of weights with rows of fp32, named by `native.dots_name`.

    Their arguments are int64: the address of the first row of weights; the bytes from one to the
    next; the address of all tokens' rows, which are fp32, zeros behind the columns up to a multiple
    of 16; the bytes from one to the next; the address of a table of which of them are meant; the
    number of columns; how many bytes further on the weights are that come
    next; where the first token's sums go, one after the other; the bytes from a token's sums to the
    next one's. A sum adds 16 lanes of fp32, each in order; neither how many rows nor how many
    tokens there are changes a bit of it. Of e4m3fn a NaN gives NaN.

    Args:
        blocks: of each function its kind, rows of weights, and rows of tokens.
    """
    module = ir.Module()
    for kind, rows, tokens in blocks:
        nine = ir.FunctionType(ir.VoidType(), [I64] * 9)
        function = ir.Function(module, nine, dots_name(kind, rows, tokens))
        builder = ir.IRBuilder(function.append_basic_block("start"))
        emit = _Dots(builder, kind, rows, tokens, function.args)
        k = emit.loop(I64(0), emit.columns_of_line, emit.line)
        k = emit.loop(k, LANES, emit.lanes)
        emit.loop(k, LANES, emit.rest, whole=False)
        emit.finish()
        builder.ret_void()
    return str(module)
