"""The ranks that hold a model's experts between them, and what they say to each other.

Two connections, which nobody else uses: one for the layers' tensors (NCCL on GPUs, gloo on CPUs;
few rows go over `peers` where they can), one for short words between hosts (gloo).
torch.distributed knows of neither, so that they end where their owner does. Every rank does the
same in the same order. What is said carries what it is about, so that ranks which are not in the
same place notice, and fail, rather than add up what does not belong together.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    ReduceScatterOptions,
)

from qmoe.parallel.failure import Notes, RankFailed, Watch
from qmoe.parallel.peers import Peers
from qmoe_kernels import QuantizedRows, quantize_activations
from qmoe_kernels.quantization import WeightFormat

# Seconds that a rank waits for another in an exchange.
TIMEOUT_VARIABLE = "QMOE_RANK_TIMEOUT"
# "0": few rows go by NCCL as well, rather than over memory that the GPUs share.
PEERS_VARIABLE = "QMOE_PEERS"
_TIMEOUT = 60.0
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Bytes of what a rank says that fly at once; longer words need a second exchange.
_WORD = 512
_LENGTH = 8
# Seconds that the end of NCCL's connections may take. It waits for graphs that hold them.
_CLOSING = 5.0
_NO_EXPERT = -1
# Bytes of all ranks' parts, up to which each rank gets them all and adds them up: one exchange is
# quicker than two of less.
_ALL_PARTS = 2 << 20

# What a layer is given: rows, ids and weights.
Routed: TypeAlias = "tuple[Tensor | QuantizedRows, Tensor, Tensor]"


class RankGroup:
    """The ranks of one model, as one of them sees them.

    Attributes:
        rank: this process's number in the group.
        size: how many ranks there are.
        device: where the layers' tensors are.
        timeout: seconds that a rank waits for another in an exchange.
        peers: the quicker way for few rows, between GPUs of one host; None where there is none.
        adds_parts: whether ranks exchange their parts of a sum and add them up themselves, as more
            than two do. NCCL or gloo adds on the way in the model's dtype, which rounds once with
            two ranks; with more it would round every time. (Adding in fp32 there takes up to twice
            as long on four GPUs: docs/expert-parallel.md.)
        steps: what has graphs with exchanges in them. NCCL closes its connections only when these
            are gone.
        own_texts: the `OwnTexts` of a call in which each rank has texts of its own, if one is under
            way.
    """

    def __init__(self, processes: dist.ProcessGroup, device: torch.device) -> None:
        """Make groups of our own among ``processes``; every one of these calls this.

        Args:
            processes: of torch.distributed, or its default group.
            device: where the model is going to be.

        Raises:
            ValueError: a timeout in the environment that is no number.
            RankFailed: another rank failed meanwhile, or does not make this call.
        """
        self.rank, self.size = dist.get_rank(processes), dist.get_world_size(processes)
        self.device, self.timeout = device, _timeout()
        store = _store_for(dist.get_process_group_ranks(processes))
        self._notes = Notes(dist.PrefixStore("notes", store), self.rank, self.size)
        try:
            self._notes.pulse(0)
            # The only references, and torch.distributed has none: connections close with the last.
            self._groups = [
                _gloo(dist.PrefixStore("words", store), self.rank, self.size, self.timeout),
                (_nccl if device.type == "cuda" else _gloo)(
                    dist.PrefixStore("layers", store), self.rank, self.size, self.timeout
                ),
            ]
        except RuntimeError as error:  # all that torch says of ranks that do not come
            raise self._notes.who_is_missing(self.timeout) from error
        self._ended: str | None = None  # why, once the ranks are no group any more
        self.own_texts: Any = None  # a call in which each rank has texts of its own
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that is in a call of all ranks
        self._outside = False  # a caller's function is, in that call
        self._passing: int | None = None  # the thread that runs model(...), outside of calls
        self.peers: Peers | None = None
        self.adds_parts = self.size > 2
        self.steps: weakref.WeakSet[Any] = weakref.WeakSet()
        if device.type == "cuda":
            weakref.finalize(self, _closer(self._groups[1].shutdown, self.steps))
            if self.size > 1 and os.environ.get(PEERS_VARIABLE) != "0":
                self.peers = self._try_peers(processes)

    # A copy of a model, or of its configuration, belongs to the same ranks.
    def __deepcopy__(self, memo: Any) -> RankGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a model whose experts are spread over ranks cannot be pickled")

    # ---- tensors of layers ---------------------------------------------------------------------

    @torch.compiler.disable
    def sum(self, output: Tensor) -> Tensor:
        """Add up the ranks' outputs of a layer; all ranks get the same bits.

        In fp32, first rank to last, and rounded once.

        Args:
            output: (num_tokens, hidden_size) of this rank's experts; it may be written to.

        Returns:
            (num_tokens, hidden_size) in the dtype of ``output``.

        Raises:
            RankFailed: another rank failed, or is gone.
        """
        self.check_open()
        self._check_thread()
        if self.size == 1 or not output.numel():
            return output
        if self.peers is not None and self.peers.takes_sum(output):
            return self.peers.sum(output)
        if self.adds_parts:
            return self._sum_of_parts(output)
        total = output.contiguous()
        with self._exchanging():
            _finish(self._groups[1].allreduce([total], _options(AllreduceOptions)))
        return total

    @torch.compiler.disable
    def gather(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        most_rows: int,
        row_format: WeightFormat | None = None,
    ) -> Routed:
        """Bring together what the ranks give to a layer, one rank's behind the other's.

        Args:
            rows: (num_rows, hidden_size), this rank's.
            topk_ids, topk_weights: (num_rows, top_k), of the layer's experts.
            most_rows: that each rank has in the result; those that it lacks have the id -1.
            row_format: what the products take rows in, the same on all ranks; None: as they are.

        Returns:
            rows (size * most_rows, hidden_size), ids int32 and weights fp32 (size * most_rows,
            top_k). With a ``row_format`` rows are in it, but for few, which fly as they are.

        Raises:
            RankFailed: another rank failed, or is gone.
        """
        self.check_open()
        if self.peers is not None and self.peers.takes_gather(rows, topk_ids, most_rows):
            return self.peers.gather(rows, topk_ids, topk_weights, most_rows)
        mine, fill = [topk_ids.int(), topk_weights.float()], [_NO_EXPERT, 0]
        if row_format is None:
            mine.append(rows)
        else:
            quantized = quantize_activations(rows, row_format)
            mine += quantized.q.view(torch.uint8), quantized.scale[:, None]  # gloo sends no FP8
        if missing := most_rows - len(rows):
            fill += [0] * (len(mine) - len(fill))
            mine = [
                torch.nn.functional.pad(tensor, (0, 0, 0, missing), value=value)
                for tensor, value in zip(mine, fill, strict=True)
            ]
        mine = [tensor.contiguous() for tensor in mine]
        gathered = [t.new_empty(self.size * most_rows, t.shape[1]) for t in mine]
        layers, options = self._groups[1], _options(AllgatherOptions)
        with self._exchanging():
            if layers.supports_coalescing:  # one launch for all
                layers._start_coalescing()
            works = [
                layers._allgather_base(all_of_it, tensor, options)
                for all_of_it, tensor in zip(gathered, mine, strict=True)
            ]
            if layers.supports_coalescing:
                works = [layers._end_coalescing()]
            _finish(*works)
        ids, weights, all_rows, *scales = gathered
        if not scales:
            return all_rows, ids, weights
        q = all_rows.view(quantized.q.dtype)
        return QuantizedRows(q, scales[0].view(-1), rows.dtype), ids, weights

    @torch.compiler.disable
    def sum_and_scatter(self, output: Tensor) -> Tensor:
        """Add up the ranks' outputs as `sum` does, and keep the rows that are this rank's.

        Args:
            output: (size * num_rows, hidden_size) of this rank's experts, rows as `gather` has
                them.

        Returns:
            (num_rows, hidden_size) in the dtype of ``output``.

        Raises:
            RankFailed: another rank failed, or is gone.
        """
        self.check_open()
        if self.peers is not None and self.peers.takes_sum(output, scatter=True):
            return self.peers.sum(output, scatter=True)
        if self.adds_parts:
            return self._own_sum(output.contiguous())
        total = output.contiguous()
        own = total.new_empty(len(output) // self.size, *output.shape[1:])
        with self._exchanging():
            options = _options(ReduceScatterOptions)
            _finish(self._groups[1]._reduce_scatter_base(own, total, options))
        return own

    def _sum_of_parts(self, output: Tensor) -> Tensor:
        """Each rank adds up all parts of a small sum, or a slice of a large one for all."""
        if output.nbytes * self.size <= _ALL_PARTS:
            return _add(self._gather_parts(output.contiguous()))
        numbers = output.reshape(-1)
        if over := len(numbers) % self.size:
            numbers = torch.nn.functional.pad(numbers, (0, self.size - over))
        total = self._gather_parts(self._own_sum(numbers)).view(-1)
        return total[: output.numel()].view(output.shape)

    def _gather_parts(self, part: Tensor) -> Tensor:
        """(size, *part.shape): every rank's."""
        parts = part.new_empty(self.size * len(part), *part.shape[1:])
        with self._exchanging():
            options = _options(AllgatherOptions)
            _finish(self._groups[1]._allgather_base(parts, part, options))
        return parts.view(self.size, *part.shape)

    def _own_sum(self, output: Tensor) -> Tensor:
        """The sum over the ranks of the slice that is this rank's, of as many as there are ranks.

        Each rank sends every other its part of that one's slice.
        """
        parts = torch.empty_like(output)
        with self._exchanging():
            # No sizes: all slices are as long.
            options = _options(AllToAllOptions)
            _finish(self._groups[1].alltoall_base(parts, output, [], [], options))
        return _add(parts.view(self.size, len(output) // self.size, *output.shape[1:]))

    def _try_peers(self, processes: dist.ProcessGroup) -> Peers | None:
        """The quicker way for few rows, where it gives on every rank what NCCL gives."""
        try:
            found = Peers(processes, self.device, self.timeout)
        except Exception:  # no peer access, several hosts, a torch that has it otherwise
            found = None
        if not self._all(found is not None):
            return None
        assert found is not None
        rows = torch.arange(64 * self.size, dtype=torch.float32, device=self.device)
        rows = rows.add_(self.rank).view(self.size, 64)
        routed = (rows, rows[:, :2].long(), rows[:, :2].clone())
        expected: Any = (
            *self.gather(*routed, self.size + 1),
            self.sum_and_scatter(rows),
            self.sum(rows.clone()),
        )
        works = True
        try:
            for _ in range(3):
                actual = (
                    *found.gather(*routed, self.size + 1),
                    found.sum(rows, scatter=True),
                    found.sum(rows),
                )
                works &= all(map(torch.equal, actual, expected))
        except Exception:  # a kernel that does not compile
            works = False
        return found if self._all(works) else None

    def _all(self, this_rank: bool) -> bool:
        """Whether it is so on every rank."""
        every = torch.tensor([float(this_rank)], device=self.device)
        self._groups[1].allreduce([every]).wait()
        return int(every) == self.size

    # ---- words ---------------------------------------------------------------------------------

    def exchange(self, what: str, **said: Any) -> list[dict[str, Any]]:
        """Tell all ranks something, and hear what they tell.

        Args:
            what: where this rank is; all must be in the same place.
            said: anything that JSON can hold.

        Returns:
            what each rank said, in the order of ranks.

        Raises:
            RankFailed: ranks are in different places, or one failed or is gone.
        """
        self.check_open()
        word = json.dumps({"what": what, **said}).encode()
        heard = [json.loads(other) for other in self._exchange_bytes(word)]
        for rank, other in enumerate(heard):
            if other["what"] != what:
                raise RankFailed(
                    f"rank {rank} is at {other['what']}, and rank {self.rank} at {what}; every "
                    "rank must make the same calls in the same order",
                    (rank,),
                )
        return heard

    def wait(self, what: str, **said: Any) -> list[dict[str, Any]]:
        """As `exchange`, for what may take some ranks much longer than others: loading.

        It waits as long as the others live, rather than for `timeout`.
        """
        self.check_open()
        self._notes.store.set(f"{what}/{self.rank}", "")
        places = [f"{what}/{rank}" for rank in range(self.size)]
        try:
            while not self._notes.store.check(places) and not self._notes.failures():
                time.sleep(0.02)
        except Exception as error:  # whatever a store says whose keeper is gone
            raise _Cut from error
        if self._notes.failures():
            raise _Cut
        return self.exchange(what, **said)

    def _exchange_bytes(self, word: bytes) -> list[bytes]:
        first = len(word).to_bytes(_LENGTH, "little") + word
        heard = self._all_gather(first, _WORD)
        lengths = [int.from_bytes(other[:_LENGTH], "little") for other in heard]
        longest = max(lengths) + _LENGTH
        if longest > _WORD:
            rest = self._all_gather(first[_WORD:], longest - _WORD)
            heard = [a + b for a, b in zip(heard, rest, strict=True)]
        return [other[_LENGTH : _LENGTH + n] for other, n in zip(heard, lengths, strict=True)]

    def _all_gather(self, mine: bytes, size: int) -> list[bytes]:
        sent = torch.frombuffer(bytearray(mine[:size].ljust(size, b"\0")), dtype=torch.uint8)
        heard = [torch.empty_like(sent) for _ in range(self.size)]
        with self._exchanging():
            self._groups[0].allgather([heard], [sent]).wait()
        return [bytes(other.numpy()) for other in heard]

    # ---- together, to the end ------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do what all ranks do, and end on all of them where it fails on one.

        After that the ranks are no group any more: what was under way between them is lost.

        Args:
            what: the call, for messages: ``"qmoe.generate"``.

        Raises:
            RankFailed: another rank failed or is gone; the message names it.
            ValueError: this thread is in such a call already: the other ranks know nothing of a
                second.
        """
        self.check_open()
        if self.in_call:
            raise _nested(what)
        with self._lock:
            # gloo ends by itself where a rank is gone.
            watch = None
            if self.device.type == "cuda":
                watch = Watch(self._notes, self.timeout, self._abort)
            try:
                self._owner = threading.get_ident()
                if watch is not None:
                    watch.start()
                yield
            except KnownToAll as known:  # all ranks are where they were before
                raise known.error from None
            except BaseException as error:
                failed = self._end(error, what)
                if failed is error:
                    raise
                raise failed from None
            finally:
                self._owner = self.own_texts = None
                if watch is not None:
                    watch.stop()

    @property
    def in_call(self) -> bool:
        """Whether this thread is in a call that all ranks make together."""
        return self._owner == threading.get_ident()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Run a caller's function in a call `together`; the other ranks know nothing of it."""
        self._outside = True
        try:
            yield
        finally:
            self._outside = False

    def check_inside(self, what: str) -> None:
        """Raise ValueError for what a caller's function does within a call of all ranks."""
        if self.in_call and self._outside:
            raise _nested(what)

    def begin_pass(self) -> None:
        """Let this thread be the one that runs layers, outside of a call `together`."""
        self._passing = threading.get_ident()
        self._check_thread()

    def end_pass(self) -> None:
        """The pass is over, or has failed."""
        if self._passing == threading.get_ident():
            self._passing = None

    @torch.compiler.disable
    def check_rows(self, rows: Tensor) -> None:
        """Compare a layer's rows, where nobody has compared what its pass was given.

        So it is where ``model(...)`` is gone past, as ``model.model(...)`` does.

        Raises:
            RankFailed: they are not the same on every rank.
        """
        if self.size == 1 or self.in_call or self._passing is not None:
            return
        self.compare("a layer outside of model(...)", {"hidden_states": rows})

    def compare(self, what: str, tensors: dict[str, Tensor]) -> None:
        """Raise RankFailed where tensors are not the same on every rank, by their bits.

        Args:
            what: as `exchange`.
            tensors: by their names; on any device, which is waited for.
        """
        looks = {name: _checksum(tensor) for name, tensor in tensors.items()}
        for rank, other in enumerate(self.exchange(what, inputs=looks)):
            if other["inputs"] != looks:
                names = sorted({*looks, *other["inputs"]})
                differ = [name for name in names if other["inputs"].get(name) != looks.get(name)]
                raise RankFailed(
                    f"rank {rank} runs the model on other inputs than rank {self.rank} "
                    f"({', '.join(differ)}); every rank must be given the same, or use "
                    "qmoe.generate",
                    (rank,),
                )

    def _check_thread(self) -> None:
        """Raise ValueError, and end the group, where layers of two threads would be mixed."""
        me = threading.get_ident()
        if self._owner == me or (self._owner is None and self._passing in (None, me)):
            return
        error = ValueError(
            "two threads run this model at a time, and its experts are spread over ranks, which "
            "cannot tell their layers apart; call it from one thread, or qmoe.generate, whose "
            "calls wait for one another"
        )
        raise self._end(error, "model(...)")

    def check_open(self) -> None:
        """Raise RankFailed if the ranks are no group any more, or gave up an exchange."""
        if self._ended is not None:
            raise RankFailed(f"the ranks have ended ({self._ended}); start all of them again")
        if self.peers is not None and self.peers.failed:
            raise self._cut()

    def agree(self, what: str, error: Exception | None, **said: Any) -> list[dict[str, Any]]:
        """Go on where every rank can; where one cannot, none does, and the ranks stay a group.

        To be called in a call `together`, before anything else in it.

        Args:
            what: as `exchange`.
            error: why this rank cannot; None where it can.

        Raises:
            error, where it was given.
            RankFailed: another rank cannot.
        """
        why = None if error is None else str(error)
        heard = self.exchange(what, error=why, **said)
        if error is not None:
            raise KnownToAll(error)
        for rank, other in enumerate(heard):
            if other["error"] is not None:
                raise KnownToAll(RankFailed(f"rank {rank} failed: {other['error']}", (rank,)))
        return heard

    def _end(self, error: BaseException, what: str) -> BaseException:
        """Let the others know, and end the group; what is to be raised here."""
        if isinstance(error, RankFailed):
            self._notes.hear()
            cut = isinstance(error, _Cut)
            failed: BaseException = self._notes.who_failed() if cut else error
        else:
            name = type(error).__name__
            self._notes.fail(f"{name}: {error}"[:2000] if str(error) else name)
            failed = error
        self._ended = f"{what}: {failed}" if str(failed) else f"{what}: {type(failed).__name__}"
        if self.device.type == "cuda":
            self._abort()  # NCCL would wait for what is in flight
        self._groups.clear()
        return failed

    def _abort(self) -> None:
        """End the layers' exchange that this or another thread waits in."""
        if self.peers is not None:
            with suppress(Exception):
                self.peers.stop()
        if not self._groups:
            return
        # Not for long: NCCL waits for graphs that hold its connections.
        ending = threading.Thread(target=_abort, args=(self._groups[1],), daemon=True)
        ending.start()
        ending.join(_CLOSING)

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch says of an exchange that failed
            if self.device.type == "cuda":
                self._abort()  # what is queued on the device waits for a rank that is gone
            raise self._cut() from error

    def _cut(self) -> BaseException:
        # In no call nobody else turns it into a sentence.
        return _Cut() if self._owner is not None else self._end(_Cut(), "a layer")


class _Cut(RankFailed):
    """An exchange ended before its time; which rank it was is found out later."""

    def __init__(self) -> None:
        super().__init__("an exchange between the ranks was cut off")


class KnownToAll(Exception):
    """An error that all ranks raise in the same place, so that they stay a group."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def _checksum(tensor: Tensor) -> int:
    """Of what a tensor is, and of its bits: NaN equals itself, and the order counts."""
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(bits.numpy(), zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def _nested(what: str) -> ValueError:
    return ValueError(
        f"{what} inside another call of this model: its experts are spread over ranks, and the "
        "others do not know of it; make one call after the other"
    )


def rank_group(expert_parallel: Any, device: torch.device) -> RankGroup:
    """The ranks that ``expert_parallel`` stands for.

    Args:
        expert_parallel: True for all processes that torchrun started, a process group, or a device
            mesh of one dimension.
        device: where the model is going to be on this rank.

    Raises:
        ValueError: none of these, or a process that torchrun did not start.
    """
    if expert_parallel is True:
        return RankGroup(_world(), device)
    if isinstance(expert_parallel, dist.DeviceMesh):
        if expert_parallel.ndim != 1:
            raise ValueError(
                f"expert_parallel: a device mesh of {expert_parallel.ndim} dimensions; give one "
                "dimension of it, as mesh['ep']"
            )
        return RankGroup(expert_parallel.get_group(), device)
    if isinstance(expert_parallel, dist.ProcessGroup):
        return RankGroup(expert_parallel, device)
    raise ValueError(
        f"expert_parallel={expert_parallel!r}; give True, a process group of torch.distributed or "
        "a device mesh of one dimension"
    )


def _world() -> dist.ProcessGroup:
    if not dist.is_initialized():
        missing = [name for name in _TORCHRUN if name not in os.environ]
        if missing:
            raise ValueError(
                f"expert_parallel=True: {missing[0]} is not set, so torchrun did not start this "
                "process; `torchrun --nproc-per-node 2 script.py` starts two ranks"
            )
        # gloo, for words; layers get a group of their own kind.
        dist.init_process_group("gloo", timeout=timedelta(seconds=max(300.0, _timeout())))
        weakref.finalize(_world, dist.destroy_process_group)
    world = dist.group.WORLD
    assert world is not None
    return world


def _timeout() -> float:
    value = os.environ.get(TIMEOUT_VARIABLE) or str(_TIMEOUT)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds >= 1:
        raise ValueError(f"{TIMEOUT_VARIABLE}={value!r}: not a number of seconds, at least 1")
    return seconds


# How many groups each set of ranks has made: all of them have made as many.
_made: Counter[tuple[int, ...]] = Counter()


def _store_for(ranks: list[int]) -> Any:
    """A part of torch.distributed's store that is only this group's."""
    _made[tuple(ranks)] += 1
    name = f"qmoe/{'-'.join(map(str, ranks))}/{_made[tuple(ranks)]}"
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def _gloo(store: Any, rank: int, size: int, timeout: float) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))


def _nccl(store: Any, rank: int, size: int, timeout: float) -> Any:
    # A rank may replay a graph while another runs the same exchange without one: each registers
    # buffers of graphs in its own way otherwise.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _abort(layers: Any) -> None:
    with suppress(Exception):
        layers.abort()


def _options(kind: type[Any]) -> Any:
    """Options of an exchange that takes its turn in the stream that asks for it."""
    options = kind()
    options.asyncOp = False
    return options


def _add(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in fp32, first to last, and rounded once."""
    if parts.device.type == "cuda":
        # Here, so that a CPU needs no Triton.
        from qmoe_kernels.rows import launch_add_rows

        with torch.cuda.device(parts.device):
            return launch_add_rows(parts)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


def _finish(*works: Any) -> None:
    """Wait for exchanges, where they have not taken their turn in a stream."""
    for work in works:
        if work is not None:
            work.wait()


def _closer(shutdown: Callable[[], None], steps: Iterable[Any]) -> Callable[[], None]:
    """What drops graphs and ends NCCL's connections, for which NCCL waits until graphs are gone.

    Its thread waits from the start on, since none can be started while Python ends.
    """
    asked = threading.Event()

    def wait() -> None:
        asked.wait()
        with suppress(Exception):  # it has been aborted
            shutdown()

    thread = threading.Thread(target=wait, name="qmoe-nccl-end", daemon=True)
    thread.start()

    def close() -> None:
        for step in list(steps):
            with suppress(Exception):  # connections close, whatever a device says by then
                step.forget_graphs()
        asked.set()
        # A collector of cycles calls this before it frees graphs in the same cycles: whoever waited
        # here would wait in vain.
        _closing.append(thread)
        if not threading.main_thread().is_alive():
            _end_closing()

    return close


# Threads that close connections of groups that are gone.
_closing: list[threading.Thread] = []


@atexit.register
def _end_closing() -> None:
    """Wait, where Python ends, until connections are closed; end the process where they are not.

    A thread that came back from NCCL after Python has ended would end in SIGABRT.
    """
    if _closing:
        gc.collect()  # graphs in cycles
    end = time.monotonic() + _CLOSING
    while _closing:
        thread = _closing.pop()
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            print(
                f"qmoe: NCCL's connections did not close within {_CLOSING:.0f} s; this rank ends",
                file=sys.stderr,
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
