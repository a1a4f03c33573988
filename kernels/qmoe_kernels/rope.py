"""Rotary position embedding: pairs of a head's numbers, turned by their token's angles.

    first'  = first * cos - second * sin
    second' = second * cos + first * sin

Products and sums are rounded one by one, as torch rounds them: results have the bits of
transformers' functions. Those differ in which numbers are a pair, and in how many angles
``cos`` and ``sin`` hold. In transformers 5.17 and 5.23:

- ``apply_rotary_pos_emb`` of qwen3_moe, mixtral, olmoe, deepseek_v3, granitemoe: number i is with
  number i + rotary_dim / 2, and ``cos`` has a value for each number
- of glm4_moe, qwen3_next: likewise, and numbers from rotary_dim on stay as they are
- of gpt_oss: likewise, and ``cos`` has one value for both of a pair: ``half_angles``
- ``apply_rotary_pos_emb_interleave`` of deepseek_v3: number 2 i is with number 2 i + 1, and in the
  result with number i + rotary_dim / 2; of ``cos`` the first half is read: ``interleaved``

All eight models' ``cos`` and ``sin`` have the dtype of the hidden states.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qmoe_kernels.tensors import is_plain

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = None


def rotate(
    query: Tensor,  # (num_rows, num_heads, num_tokens, head_dim) bf16 | fp16 | fp32
    key: Tensor,  # (num_rows, num_kv_heads, num_tokens, head_dim), same dtype
    cos: Tensor,  # (num_rows or 1, num_tokens, rotary_dim) float; rotary_dim / 2 if half_angles
    sin: Tensor,  # as cos
    *,
    interleaved: bool = False,
    half_angles: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions; the module's docstring has the formula.

    One launch on a GPU for both. The last dimensions are contiguous, other strides are free.
    There is no gradient.

    Args:
        interleaved: pairs are neighbours; in the result they are half of rotary_dim apart.
        half_angles: ``cos`` and ``sin`` have one value for each pair instead of two. Their shape
            does not tell: half as many values as head_dim may also mean that half of a head is
            rotated.

    Returns:
        query and key rotated, new and of the same shapes. In memory a token's heads are next to
        each other: ``(num_rows, num_tokens, heads, head_dim)`` is contiguous, and transposed. The
        dtype is what torch promotes that of ``query`` and of ``cos`` to.

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit.
    """
    _check(query, key, cos, sin, half_angles)
    if triton is None or not (query.is_cuda and is_plain(query, key, cos, sin)):
        return (
            _rotate(query, cos, sin, interleaved, half_angles),
            _rotate(key, cos, sin, interleaved, half_angles),
        )
    with torch.cuda.device_of(query):
        return launch_rotate(query, key, cos, sin, interleaved, half_angles)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, half_angles: bool) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query has {query.ndim} dimensions and key has {key.ndim}; 4 work")
    num_rows, _, num_tokens, head_dim = query.shape
    if key.shape != (num_rows, key.shape[1], num_tokens, head_dim):
        raise ValueError(
            f"key has shape {tuple(key.shape)} and query {tuple(query.shape)}; only the number of "
            "heads may differ"
        )
    if cos.ndim != 3 or cos.shape[0] not in (1, num_rows) or cos.shape[1] != num_tokens:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; expected ({num_rows} or 1, {num_tokens}, "
            "rotary_dim)"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin is {sin.dtype} of shape {tuple(sin.shape)}; cos is {cos.dtype} of shape "
            f"{tuple(cos.shape)}"
        )
    rotary_dim = cos.shape[2] * (2 if half_angles else 1)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim={rotary_dim} for head_dim={head_dim}; even numbers up to that work"
        )
    if query.dtype != key.dtype or not (query.is_floating_point() and cos.is_floating_point()):
        raise ValueError(
            f"query is {query.dtype}, key {key.dtype} and cos {cos.dtype}; one float dtype for "
            "query and key works, and a float dtype for cos"
        )
    if not query.device == key.device == cos.device == sin.device:
        raise ValueError(
            f"query is on {query.device}, key on {key.device}, cos on {cos.device} and sin on "
            f"{sin.device}; one device works"
        )
    if not query.stride(3) == key.stride(3) == 1:
        raise ValueError(
            f"query's and key's last dimensions have strides {query.stride(3)} and "
            f"{key.stride(3)}; contiguous ones work"
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, half_angles: bool) -> Tensor:
    """`rotate` in torch, of one tensor."""
    pairs = cos.shape[2] if half_angles else cos.shape[2] // 2
    last = slice(0, pairs) if interleaved or half_angles else slice(pairs, None)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, passed = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :pairs], rotated[..., pairs:]
    out = torch.cat(
        (
            first * cos[..., :pairs] - second * sin[..., :pairs],
            second * cos[..., last] + first * sin[..., last],
            passed,
        ),
        dim=-1,
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def launch_rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, half_angles: bool
) -> tuple[Tensor, Tensor]:
    """Run `rotate_kernel`; arguments and result as those of `rotate`."""
    num_rows, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[1]
    device = query.device
    dtype = query.dtype
    if cos.dtype != dtype:
        dtype = torch.promote_types(dtype, cos.dtype)
    query_out = torch.empty((num_rows, num_tokens, num_heads, head_dim), dtype=dtype, device=device)
    key_out = torch.empty(
        (num_rows, num_tokens, num_kv_heads, head_dim), dtype=dtype, device=device
    )
    if query_out.numel() or key_out.numel():
        if cos.stride(2) != 1 or sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        pairs = cos.shape[2] if half_angles else cos.shape[2] // 2
        parts, heads, kv_heads, num_warps = _parts(
            num_heads, num_kv_heads, head_dim, pairs, num_rows * num_tokens > FEW_TOKENS
        )
        rotate_kernel[(num_tokens, num_rows, parts)](
            query,
            key,
            cos,
            sin,
            query_out,
            key_out,
            *query.stride()[:3],
            *key.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PAIRS=pairs,
            HEADS=heads,
            KV_HEADS=kv_heads,
            INTERLEAVED=interleaved,
            ONE_ANGLE=interleaved or half_angles,
            PDL=has_dependent_launch(device),
            num_warps=num_warps,
            enable_fp_fusion=False,  # in fp32 too a product is rounded before it is added
            **launch_options(True, device),
        )
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


# Up to so many tokens a program has some heads of one, in one warp: more programs end earlier.
FEW_TOKENS = 256


@functools.cache
def _parts(
    num_heads: int, num_kv_heads: int, head_dim: int, pairs: int, many: bool
) -> tuple[int, int, int, int]:
    """Return programs per token, the heads and kv heads that each has, and its warps."""
    width = triton.next_power_of_2(max(pairs, head_dim - 2 * pairs))
    most = max(1, (2048 if many else 256) // width)
    parts = max(1, triton.cdiv(max(num_heads, num_kv_heads), most))
    heads, kv_heads = (
        triton.next_power_of_2(max(1, triton.cdiv(n, parts))) for n in (num_heads, num_kv_heads)
    )
    return parts, heads, kv_heads, 4 if many else 1


if triton is not None:
    from qmoe_kernels.launching import has_dependent_launch, launch_options

    @triton.jit
    def rotate_kernel(
        query_ptr,  # (num_rows, NUM_HEADS, num_tokens, HEAD_DIM), strides below
        key_ptr,  # (num_rows, NUM_KV_HEADS, num_tokens, HEAD_DIM), strides below
        cos_ptr,  # (num_rows or 1, num_tokens, 2 * PAIRS), or PAIRS of them; strides below
        sin_ptr,  # as cos
        query_out_ptr,  # (num_rows, num_tokens, NUM_HEADS, HEAD_DIM)
        key_out_ptr,  # (num_rows, num_tokens, NUM_KV_HEADS, HEAD_DIM)
        query_stride_row,
        query_stride_head,
        query_stride_token,
        key_stride_row,
        key_stride_head,
        key_stride_token,
        cos_stride_row,
        cos_stride_token,
        NUM_HEADS: tl.constexpr,
        NUM_KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        PAIRS: tl.constexpr,
        HEADS: tl.constexpr,  # per program, powers of two
        KV_HEADS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        ONE_ANGLE: tl.constexpr,  # for both of a pair
        PDL: tl.constexpr,
    ):
        """Grid: (num_tokens, num_rows, parts of the heads)."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        token = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1).to(tl.int64)
        part = tl.program_id(2)
        angles = row * cos_stride_row + token * cos_stride_token
        place = row * tl.num_programs(0) + token
        heads = part * HEADS + tl.arange(0, HEADS)[:, None]
        kv_heads = part * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]
        # All is loaded before anything is stored: a load does not pass a store.
        first, second, rest = _turned(
            query_ptr + row * query_stride_row + token * query_stride_token,
            query_stride_head,
            heads,
            NUM_HEADS,
            cos_ptr + angles,
            sin_ptr + angles,
            query_out_ptr.dtype.element_ty,
            HEAD_DIM,
            PAIRS,
            INTERLEAVED,
            ONE_ANGLE,
        )
        key_first, key_second, key_rest = _turned(
            key_ptr + row * key_stride_row + token * key_stride_token,
            key_stride_head,
            kv_heads,
            NUM_KV_HEADS,
            cos_ptr + angles,
            sin_ptr + angles,
            key_out_ptr.dtype.element_ty,
            HEAD_DIM,
            PAIRS,
            INTERLEAVED,
            ONE_ANGLE,
        )
        query_out_ptr += place * (NUM_HEADS * HEAD_DIM)
        key_out_ptr += place * (NUM_KV_HEADS * HEAD_DIM)
        _store_heads(query_out_ptr, heads, NUM_HEADS, first, second, rest, HEAD_DIM, PAIRS)
        _store_heads(
            key_out_ptr, kv_heads, NUM_KV_HEADS, key_first, key_second, key_rest, HEAD_DIM, PAIRS
        )

    @triton.jit
    def _turned(
        x_ptr,  # one token's heads
        stride_head,
        heads,  # (HEADS, 1), some beyond NUM_HEADS
        NUM_HEADS: tl.constexpr,
        cos_ptr,  # that token's angles
        sin_ptr,
        dtype: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        PAIRS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        ONE_ANGLE: tl.constexpr,
    ):
        """Return the first and the second of pairs, turned, and the rest of the heads."""
        BLOCK: tl.constexpr = triton.next_power_of_2(PAIRS)
        x_ptrs = x_ptr + heads.to(tl.int64) * stride_head
        exists = heads < NUM_HEADS
        pairs = tl.arange(0, BLOCK)[None, :]
        mask = exists & (pairs < PAIRS)
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK)[None, :]
            x = tl.load(x_ptrs + both, mask=exists & (both < 2 * PAIRS), other=0.0)
            first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
        else:
            first = tl.load(x_ptrs + pairs, mask=mask, other=0.0)
            second = tl.load(x_ptrs + PAIRS + pairs, mask=mask, other=0.0)
        # Each head its own, so that angles come in the layout of x.
        angles = pairs + 0 * heads
        cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
        first_turned = _product(first, cos, dtype) - _product(second, sin, dtype)
        if not ONE_ANGLE:
            cos = tl.load(cos_ptr + PAIRS + angles, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + PAIRS + angles, mask=mask, other=0.0)
        second_turned = _product(second, cos, dtype) + _product(first, sin, dtype)
        rest = second
        if 2 * PAIRS < HEAD_DIM:
            columns = (
                2 * PAIRS + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * PAIRS))[None, :]
            )
            rest = tl.load(x_ptrs + columns, mask=exists & (columns < HEAD_DIM), other=0.0)
        return first_turned.to(dtype), second_turned.to(dtype), rest.to(dtype)

    @triton.jit
    def _store_heads(
        out_ptr,  # (NUM_HEADS, HEAD_DIM)
        heads,
        NUM_HEADS: tl.constexpr,
        first,
        second,
        rest,
        HEAD_DIM: tl.constexpr,
        PAIRS: tl.constexpr,
    ):
        out_ptrs = out_ptr + heads * HEAD_DIM
        exists = heads < NUM_HEADS
        pairs = tl.arange(0, first.shape[1])[None, :]
        mask = exists & (pairs < PAIRS)
        tl.store(out_ptrs + pairs, first, mask=mask)
        tl.store(out_ptrs + PAIRS + pairs, second, mask=mask)
        if 2 * PAIRS < HEAD_DIM:
            columns = 2 * PAIRS + tl.arange(0, rest.shape[1])[None, :]
            tl.store(out_ptrs + columns, rest, mask=exists & (columns < HEAD_DIM))

    @triton.jit
    def _product(a, b, dtype: tl.constexpr):
        """Round ``a * b`` to ``dtype``; in fp32 for what comes next."""
        return (a.to(tl.float32) * b.to(tl.float32)).to(dtype).to(tl.float32)
