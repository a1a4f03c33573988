"""What Python cannot say to numba: raw memory, the bits of a float, halves, an atomic sum."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I64, F32 = ir.IntType(64), ir.FloatType()


def pointer_to(numba_type: types.Type) -> Any:
    """A function from an address, an int64, to a pointer that can be indexed."""

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), generate

    return pointer


@intrinsic
def claim(_: Any, counter: Any) -> Any:
    """Add 1 to the int64 at an address, for all threads at once, and return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", where, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def advance(_: Any, counter: Any) -> Any:
    """Add 1 to the int64 at an address; who reads that sees all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], I64.as_pointer())
        builder.atomic_rmw("add", where, ir.Constant(I64, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def read_counter(_: Any, counter: Any) -> Any:
    """The int64 at an address, to which others `advance`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(where, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def yield_processor(_: Any) -> Any:
    """Let another thread run, if one is ready to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        name = "sched_yield"
        builder.call(
            builder.module.globals.get(name) or ir.Function(builder.module, kind, name), []
        )
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(_: Any, function: Any, *arguments: Any) -> Any:
    """Call the function at an address with nine int64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 9)
        given = [builder.extract_value(values[1], i) for i in range(9)]
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple([types.int64] * 9)), generate


def _bits(given: types.Type, returned: types.Type, kind: ir.Type) -> Any:
    @intrinsic
    def same_bits(_: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], kind)

        return returned(given), generate

    return same_bits


bits_of_float = _bits(types.float32, types.int32, ir.IntType(32))
float_of_bits = _bits(types.int32, types.float32, F32)


@intrinsic
def float_of_half_bits(_: Any, bits: Any) -> Any:
    """The fp32 number that the half with these bits, an int16, is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), F32)

    return types.float32(types.int16), generate


@intrinsic
def nearest_half(_: Any, value: Any) -> Any:
    """The half that is nearest to an fp32 number, in fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.fptrunc(arguments[0], ir.HalfType()), F32)

    return types.float32(types.float32), generate
