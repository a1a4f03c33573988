"""8-bit weights to wider numbers, in a kernel's registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen_weights(weight, dtype: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """Convert a tile of weights to ``dtype``; e4m3fn comes as int8 and leaves as 2**-8 of itself.

    The bits ``seeeemmm`` put into a half as ``s0eeeemmm0000000`` are the number times 2**-8,
    exactly and subnormals included (the biases are 7 and 15). No architecture needs an
    instruction for it. ASM does four values at a time, without the conversion instructions,
    which run at a quarter of the speed of others.
    """
    if weight.dtype == dtype:
        return weight
    if ASM and dtype == tl.bfloat16:
        if FP8:
            return tl.inline_asm_elementwise(
                _E4M3_TO_BF16, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            _INT8_TO_BF16, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    if ASM and dtype == tl.float16:
        if FP8:
            return tl.inline_asm_elementwise(
                _E4M3_TO_FP16, "=r,=r,r", [weight], dtype=tl.float16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            _INT8_TO_FP16, "=r,=r,r", [weight], dtype=tl.float16, is_pure=True, pack=4
        )
    if FP8:
        # Sign extension puts copies of the sign into bits 15 and 14; the mask clears bit 14.
        weight = (weight.to(tl.int16) << 7) & -0x4001
        weight = weight.to(tl.float16, bitcast=True)
    return weight.to(dtype)


@triton.jit
def widen_words(words, dtype: tl.constexpr, FP8: tl.constexpr):
    """Convert words of two 8-bit weights each to two tensors, of first and of second ones.

    In a thread's registers, words of an even and the next number become neighbours in ``dtype``,
    bf16 or fp16; as `widen_weights` does it by inline assembly, and with as many instructions.
    """
    if dtype == tl.bfloat16:
        BF16: tl.constexpr = _E4M3_WORDS_TO_BF16 if FP8 else _INT8_WORDS_TO_BF16
        even, odd = tl.inline_asm_elementwise(
            BF16, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        FP16: tl.constexpr = _E4M3_WORDS_TO_FP16 if FP8 else _INT8_WORDS_TO_FP16
        even, odd = tl.inline_asm_elementwise(
            FP16, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return even, odd


# Bytes b0..b3 to two pairs of halves. Digits of prmt's selector count from the lowest byte of the
# result; 0-3 are bytes of $2, 4-7 of the constant.

# 0x43 above the byte s_uuuuuuu: without s it is 128 + u, of which s alone takes 128 (s = 0) or,
# read as 0x4380, 256: u or u - 128.
_INT8_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, minus_one;
mov.b32 minus_one, 0xBF80BF80;
prmt.b32 a, $2, 0x43434343, 0x4140;
prmt.b32 b, $2, 0x43434343, 0x4342;
and.b32 c, a, 0xFF80FF80;
and.b32 d, b, 0xFF80FF80;
and.b32 a, a, 0xFF7FFF7F;
and.b32 b, b, 0xFF7FFF7F;
fma.rn.bf16x2 $0, c, minus_one, a;
fma.rn.bf16x2 $1, d, minus_one, b;
}""")

# s0000eeeemmm0000 is the number times 2**-120 (the biases are 7 and 127); times 2**112.
_E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, factor, zero;
mov.b32 factor, 0x77807780;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
and.b32 c, c, 0x07F007F0;
and.b32 d, d, 0x07F007F0;
lop3.b32 a, a, 0x80008000, c, 0xEA;
lop3.b32 b, b, 0x80008000, d, 0xEA;
fma.rn.bf16x2 $0, a, factor, zero;
fma.rn.bf16x2 $1, b, factor, zero;
}""")

# 0x64 above the byte with its sign flipped is 1024 + 128 + the number.
_INT8_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, c, offset, one;
mov.b32 offset, 0xE480E480;
mov.b32 one, 0x3C003C00;
xor.b32 c, $2, 0x80808080;
prmt.b32 a, c, 0x64646464, 0x4140;
prmt.b32 b, c, 0x64646464, 0x4342;
fma.rn.f16x2 $0, a, one, offset;
fma.rn.f16x2 $1, b, one, offset;
}""")

_E4M3_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 1;
shr.b32 d, b, 1;
and.b32 c, c, 0x3F803F80;
and.b32 d, d, 0x3F803F80;
lop3.b32 $0, a, 0x80008000, c, 0xEA;
lop3.b32 $1, b, 0x80008000, d, 0xEA;
}""")


def _of_words(asm: tl.constexpr) -> tl.constexpr:
    """The same for bytes 0 and 2, and for 1 and 3."""
    text = asm.value
    for pair, word in (("4140", "4240"), ("4342", "4341"), ("1404", "2404"), ("3424", "3414")):
        text = text.replace(f"0x{pair};", f"0x{word};")
    return tl.constexpr(text)


_INT8_WORDS_TO_BF16 = _of_words(_INT8_TO_BF16)
_E4M3_WORDS_TO_BF16 = _of_words(_E4M3_TO_BF16)
_INT8_WORDS_TO_FP16 = _of_words(_INT8_TO_FP16)
_E4M3_WORDS_TO_FP16 = _of_words(_E4M3_TO_FP16)
