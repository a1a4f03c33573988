"""Numbers by which a kernel tells another processor, or hears from it, that memory is written.

What comes before a number that is released to the whole system is there for whoever acquired it:
the host, or another GPU. Programs of one launch tell each other in the same way (`publish`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_released(ptr, value, ON_GPU: tl.constexpr):
    """Store an int64 that others see, after all that this program has written before."""
    tl.debug_barrier()
    if ON_GPU:
        # One thread is enough: the barrier has put the others' writes before its fence.
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys;
            @first st.release.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [ptr.to(tl.int64), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(ptr, value)


@triton.jit
def wait_until(ptr, value, nanoseconds, pause_ns, ON_GPU: tl.constexpr):
    """Wait until the int64 there is at least ``value``; how long it took, -1: too long."""
    if ON_GPU:
        waited = tl.inline_asm_elementwise(
            """{
            .reg .pred there, late;
            .reg .u64 begin, time, now;
            mov.u64 begin, %globaltimer;
            again:
            ld.acquire.sys.global.u64 now, [$1];
            mov.u64 time, %globaltimer;
            sub.u64 time, time, begin;
            setp.ge.s64 there, now, $2;
            @there bra done;
            setp.gt.u64 late, time, $3;
            @late bra give_up;
            nanosleep.u32 $4;
            bra again;
            give_up:
            mov.u64 time, -1;
            done:
            mov.u64 $0, time;
            }""",
            "=l,l,l,l,r",
            [ptr.to(tl.int64), value, nanoseconds, pause_ns],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        # The interpreter has no clock: so many looks take longer there.
        looks = nanoseconds // 10000
        while (tl.load(ptr, volatile=True) < value) & (looks > 0):
            looks -= 1
        waited = tl.where(tl.load(ptr, volatile=True) < value, -1, 0).to(tl.int64)
    return waited


@triton.jit
def publish(ptr, word, RELEASED: tl.constexpr, ON_GPU: tl.constexpr):
    """Store an int64 that other programs of this launch wait for.

    RELEASED: they also see all that this program has written before, which takes longer.
    """
    if RELEASED:
        tl.debug_barrier()
    if ON_GPU:
        # One thread is enough: the barrier has put the others' writes before its store.
        STORE: tl.constexpr = "release" if RELEASED else "relaxed"
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st."""
            + STORE
            + """.gpu.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [ptr.to(tl.int64), word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(ptr, word)


@triton.jit
def wait_for_word(ptr, seen, ON_GPU: tl.constexpr):
    """Wait until another program of this launch has published a word that is not ``seen``.

    Every warp looks for itself, so that all of them have the word at once. There is no limit of
    time: programs of one launch end together or not at all.
    """
    if ON_GPU:
        word = tl.inline_asm_elementwise(
            """{
            .reg .pred same;
            again:
            ld.acquire.gpu.global.u64 $0, [$1];
            setp.eq.u64 same, $0, $2;
            @same bra again;
            }""",
            "=&l,l,l",
            [ptr.to(tl.int64), seen],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        word = tl.load(ptr)  # the interpreter runs one program after the other
    return word
