"""The loops as machine code: compiled once by numba, kept in the user's cache, run on many threads.

What is kept is an object file, so that only the first process of all imports numba; the others
take llvmlite alone, which is ready in some hundredths of a second. Its name is a hash of the loops'
source, of numba's version and of the processor: it is never wrong, only absent.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

# Compiled together, when the first of them is needed: a first token waits for no others.
GROUPS = {
    "products": ("layer",),
    "sums": ("weighted_sum",),
    "dense": ("linear",),
    "formats": ("quantize", "compare", "widen"),
    "workers": ("lead", "assist", "store_word", "load_word", "ring_bell"),
    "reading": ("read",),
    "threads": ("spread",),
}
# Kinds of dot products: by weights, and whether rows are bf16 numbers that are multiplied in pairs.
INT8, FP8, FP8_PAIRS, BF16 = "int8", "fp8", "fp8_pairs", "bf16"
# Of the C library; anything else that machine code asks for would end the process.
KNOWN_SYMBOLS = {
    *("erff", "tanhf", "memset", "memcpy"),
    *("sched_yield", "syscall", "clock_gettime", "__errno_location"),
    *("pthread_create", "pthread_join"),
}
COUNTERS = 7  # of a loop; what it has claimed and how many threads there are come first
DIGEST_BYTES = hashlib.sha256().digest_size
# What GOMP_parallel does, on threads that end with the call. No line of Python runs before they
# have ended: an interrupt could fall on it, and free the memory that they write to. (A thread's
# function returns an address, which nobody reads: a loop may return nothing instead.)
SPREAD = """
    declare i32 @pthread_create(ptr, ptr, ptr, ptr)
    declare i32 @pthread_join(i64, ptr)
    define void @spread(ptr %function, ptr %data, i32 %threads, i32 %flags) {
        %ids = alloca i64, i32 %threads
        %helpers = sub i32 %threads, 1
        br label %ask
    ask:
        %started = phi i32 [0, %0], [%one_more, %start]
        %all = icmp uge i32 %started, %helpers
        br i1 %all, label %work, label %start
    start:
        %id = getelementptr i64, ptr %ids, i32 %started
        %status = call i32 @pthread_create(ptr %id, ptr null, ptr %function, ptr %data)
        %one_more = add i32 %started, 1
        %refused = icmp ne i32 %status, 0
        br i1 %refused, label %work, label %ask
    work:
        call void %function(ptr %data)
        br label %wait
    wait:
        %left = phi i32 [%started, %work], [%one_less, %join]
        %none = icmp eq i32 %left, 0
        br i1 %none, label %end, label %join
    join:
        %one_less = sub i32 %left, 1
        %last = getelementptr i64, ptr %ids, i32 %one_less
        %ended = load i64, ptr %last
        call i32 @pthread_join(i64 %ended, ptr null)
        br label %wait
    end:
        ret void
    }"""

_lock = threading.Lock()
_loaded: dict[str, dict[str, int] | None] = {}
# Whether the next forked child will miss the threads that OpenMP kept, and whether this one does.
_loses_team = _has_lost_team = False


class Machine(NamedTuple):
    """The processor as LLVM names it, and what it can.

    Attributes:
        wide: it has 32 registers for vectors.
        pairs: it multiplies pairs of bf16, and looks up bytes in tables of 128.
    """

    triple: str
    cpu: str
    features: str
    wide: bool
    pairs: bool

    @property
    def dots(self) -> list[tuple[str, int, int]]:
        """(kind, rows of weights, tokens) of the dot products.

        Blocks of many are smaller on a processor with 16 registers of 8 lanes, which cannot hold
        more sums.
        """
        kinds = [INT8, FP8, FP8_PAIRS, BF16] if self.pairs else [INT8, FP8, BF16]
        blocks = [(4, 1), (4, 2), (4, 4)] if self.wide else [(4, 1), (2, 2), (1, 4)]
        return [(kind, *block) for kind in kinds for block in [(1, 1), *blocks]]


def dots_name(kind: str, rows: int, tokens: int) -> str:
    """What `address_of` knows a dot product by."""
    return f"dots_{kind}_{rows}_{tokens}"


def address_of(name: str) -> int | None:
    """Where the machine code of a loop is, or of ``dots_<kind>_<rows>_<tokens>``.

    None where there is none, of which the first call warns.
    """
    group = _group_of(name)
    if group not in _loaded:
        with _lock:
            if group not in _loaded:
                _loaded[group] = _load_or_warn(group)
    found = _loaded[group]
    return None if found is None else found.get(name)


@lru_cache
def _group_of(name: str) -> str:
    if name.startswith("dots_"):
        return "dense" if name.startswith(f"dots_{BF16}") else "products"
    return next(group for group, loops in GROUPS.items() if name in loops)


def run(name: str, arguments: Sequence[int], items: int, threads: int | None = None) -> array[int]:
    """Run a loop on torch's threads until all items are done.

    Args:
        name: of the loop.
        arguments: what it takes after its counters.
        items: how many there are; more threads would find nothing to do.
        threads: at most so many; None: as many as torch takes.

    Returns:
        the loop's counters, behind the two that all have.
    """
    function = address_of(name)
    assert function is not None
    threads = max(1, min(torch.get_num_threads() if threads is None else threads, items))
    given = array("q", [0, 0, *arguments, *[0] * COUNTERS])
    address, count = given.buffer_info()
    begin = count - COUNTERS
    given[0], given[1] = address + 8 * begin, address + 8 * (begin + 1)
    _run(function, address, threads)
    return given[begin + 2 :]


def _run(function: int, address: int, threads: int) -> None:
    # Threads that torch has anyway: others of our own would compete with these for the
    # processor. Two Python threads that call at once have a team each.
    openmp = None if _has_lost_team else _openmp()
    parallel = None if threads == 1 else openmp or _own_threads()
    if parallel is None:
        callable_at(function)(address)
    else:
        parallel(function, address, threads, 0)


@lru_cache
def _own_threads() -> Any:
    """`SPREAD`, to be called as GOMP_parallel is; None where there is no machine code of it."""
    address = address_of("spread")
    if address is None:
        return None
    kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    return ctypes.CFUNCTYPE(None, *kinds)(address)


@lru_cache
def callable_at(function: int) -> Callable[[int], None]:
    """What calls the loop at an address with that of its arguments, without Python's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@lru_cache
def _openmp() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP that torch runs on, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _end_team() -> bool:
    """End the threads that this thread's OpenMP keeps for its next call; False where it cannot."""
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all  # since OpenMP 5.0
    except (AttributeError, OSError, TypeError):
        return False
    pause.argtypes, pause.restype = [ctypes.c_int], ctypes.c_int
    soft = 1
    return bool(pause(soft) == 0)


def _before_fork() -> None:
    """A child has none of its parent's threads, and OpenMP would wait for them for ever.

    Not only in loops: torch's own operators run on them, too. So there are none to wait for.
    """
    global _loses_team
    _loses_team = not _end_team()


def _after_fork() -> None:
    global _lock, _has_lost_team
    _lock, _has_lost_team = threading.Lock(), _has_lost_team or _loses_team


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


# ---- compiling ---------------------------------------------------------------------------------


def _load_or_warn(group: str) -> dict[str, int] | None:
    try:
        return _load(group)
    except Exception as error:
        # Once for all groups: they fail for one reason.
        if not any(found is None for found in _loaded.values()):
            logger.warning(
                "experts run on the CPU by torch alone, some ten times slower: the native loops "
                "are missing (%s)",
                f"{type(error).__name__}: {error}".rstrip(": "),
            )
        return None


def _load(group: str) -> dict[str, int]:
    machine = this_machine()
    digest = hashlib.sha256(repr((group, _versions(), machine)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    file = cache_folder() / f"{group}-{digest.hexdigest()[:32]}.o"
    code = _read(file)
    if code is None:
        code = _compile(group, machine)
        _write(file, code)
    return _link(code, machine)


def cache_folder() -> Path:
    """Where machine code is kept: ``qmoe`` in the user's cache.

    Nothing can be read or written there for a user who has no home.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no such user
        base = os.devnull
    return Path(base) / "qmoe"


def _versions() -> list[str]:
    found = []
    for package in ("numba", "llvmlite"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            raise RuntimeError(f"{package} is not installed") from None
    return found


@lru_cache
def this_machine() -> Machine:
    """The processor that this runs on.

    Raises:
        RuntimeError: there is no way on it that is quicker than torch.
    """
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    triple = llvm.get_process_triple()
    on_x86 = triple.startswith(("x86_64", "amd64"))
    needed = [name for name in ("avx2", "fma", "f16c") if not features.get(name)]
    if (on_x86 and needed) or not triple.startswith(("x86_64", "amd64", "aarch64", "arm64")):
        raise RuntimeError(f"{llvm.get_host_cpu_name()} lacks {', '.join(needed) or 'known lanes'}")
    wide = not on_x86 or bool(features.get("avx512f") and features.get("avx512bw"))
    pairs = on_x86 and wide and bool(features.get("avx512bf16") and features.get("avx512vbmi"))
    return Machine(triple, llvm.get_host_cpu_name(), features.flatten(), wide, pairs)


def _target_machine(machine: Machine) -> Any:
    from llvmlite import binding as llvm

    return llvm.Target.from_triple(machine.triple).create_target_machine(
        cpu=machine.cpu,
        features=machine.features,
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _compile(group: str, machine: Machine) -> bytes:
    """Return an object file with the loops of a group."""
    from llvmlite import binding as llvm

    module = llvm.parse_assembly(f'target triple = "{machine.triple}"')
    for code in _assembly(group):
        module.link_in(llvm.parse_assembly(code))
    names = set(GROUPS[group])
    blocks = [block for block in machine.dots if _group_of(dots_name(*block)) == group]
    if blocks:
        from qmoe_kernels.cpu import dots

        module.link_in(llvm.parse_assembly(dots.assembly(blocks)))
        names |= {dots_name(*block) for block in blocks}
    target = _target_machine(machine)
    _drop_all_but(names, module, target)
    unknown = {
        f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")
    } - KNOWN_SYMBOLS
    if unknown:
        raise RuntimeError(f"numba's loops need {', '.join(sorted(unknown))}")
    machine_code: bytes = target.emit_object(module)
    return machine_code


def _assembly(group: str) -> Iterator[str]:
    """Modules in LLVM's language that have the loops of a group."""
    if group == "threads":  # without numba
        yield SPREAD
        return
    from qmoe_kernels.cpu import loops, read_loops, worker_loops

    source = {"workers": worker_loops, "reading": read_loops}.get(group, loops)
    for name in GROUPS[group]:
        code, inner = getattr(source, f"make_{name}")()
        yield code
        yield f"""declare i32 @{inner}(ptr, ptr, ptr)
            define void @{name}(ptr %arguments) {{
                %result = alloca ptr
                %error = alloca ptr
                %status = call i32 @{inner}(ptr %result, ptr %error, ptr %arguments)
                ret void
            }}"""


def _drop_all_but(names: set[str], module: Any, target: Any) -> None:
    from llvmlite import binding as llvm

    for value in [*module.functions, *module.global_variables]:
        if not value.is_declaration and value.name not in names:
            value.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))


class _Linked(dict[str, int]):
    """Addresses by name; keeps the code in memory."""

    engine: Any


def _link(code: bytes, machine: Machine) -> dict[str, int]:
    from llvmlite import binding as llvm

    file = llvm.ObjectFileRef.from_data(code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(machine))
    engine.add_object_file(file)
    engine.finalize_object()
    names = [name for loops in GROUPS.values() for name in loops]
    names += [dots_name(*block) for block in machine.dots]
    found = _Linked({name: a for name in names if (a := engine.get_function_address(name))})
    found.engine = engine
    return found


def _read(file: Path) -> bytes | None:
    """What `_write` wrote, or None if it is not there or not whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(file: Path, code: bytes) -> None:
    """Keep machine code for later processes; without a folder to write to, these compile again."""
    try:
        write_whole(file, hashlib.sha256(code).digest() + code)
    except OSError as error:
        logger.info("native loops are compiled anew in every process: %s", error)


def write_whole(file: Path, data: bytes) -> None:
    """Write a file of `cache_folder`; readers see all of it or what was there before.

    Raises:
        OSError: there is no folder to write to, or no room.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise
