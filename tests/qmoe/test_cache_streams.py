"""Who has to wait for whom, without a GPU: streams that only keep vector clocks.

Two accesses to the same memory, one of them a write, must be ordered by events, whatever the host
did first. The cache runs on the CPU with these streams in the place of torch's; each of its
accesses to a slot, a table or a list of copies is checked against the earlier ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qmoe.experts.pages import LayerPages
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore
from qmoe_kernels import mailbox
from qmoe_kernels.mailbox import Mailbox, Posts

Clock = dict["Stream", int]


class Stream:
    """What of every stream is finished when this one goes on."""

    def __init__(self) -> None:
        self.seen: Clock = {self: 0}

    def tick(self) -> Clock:
        self.seen[self] += 1
        return dict(self.seen)

    def wait(self, seen: Clock) -> None:
        for stream, time in seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait(other.tick())


class Event:
    def __init__(self) -> None:
        self.seen: Clock = {}

    def record(self, stream: Stream) -> None:
        self.seen = stream.tick()

    def wait(self, stream: Stream) -> None:
        stream.wait(self.seen)


class Streams:
    """Takes the place of torch.cpu's streams, and remembers who touched what."""

    def __init__(self) -> None:
        self.current = Stream()
        self.written: dict[Any, tuple[Stream, int]] = {}
        self.read_since: dict[Any, list[tuple[Stream, int]]] = {}
        self.num_accesses = 0
        self.races: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "Stream", Stream)
        monkeypatch.setattr(torch.cpu, "Event", Event)
        monkeypatch.setattr(torch.cpu, "stream", self.on)
        monkeypatch.setattr(torch.cpu, "current_stream", lambda device=None: self.current)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        previous, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = previous

    def read(self, what: Any) -> None:
        seen = self.current.tick()
        self._after(seen, what, [self.written.get(what)])
        self.read_since.setdefault(what, []).append((self.current, seen[self.current]))

    def write(self, what: Any, *, by: Stream | None = None, seen: Clock | None = None) -> None:
        stream = by or self.current
        seen = seen or stream.tick()
        self._after(seen, what, [self.written.get(what), *self.read_since.pop(what, [])])
        self.written[what] = stream, seen[stream]

    def _after(self, seen: Clock, what: Any, accesses: list[tuple[Stream, int] | None]) -> None:
        for access in accesses:
            self.num_accesses += 1
            if access is not None and seen.get(access[0], 0) < access[1]:
                self.races.append(what)


class WatchedCache(ExpertCache):
    """Tells `Streams` what is touched, where a GPU would do it."""

    streams: Streams

    def _admit(self, pool: Any, layer: int, topk_ids: Tensor, **options: Any) -> None:
        with self.admitting(pool.residency):
            super()._admit(pool, layer, topk_ids, **options)

    @contextmanager
    def admitting(self, residency: Any) -> Iterator[None]:
        before = residency.page_to_slot.clone()
        yield
        self.streams.write("stamps")
        self.streams.write("copies")
        for page in (before != residency.page_to_slot).nonzero().flatten().tolist():
            self.streams.write(("page", page))

    def _gather(self, pool: Any, layer: int) -> None:
        self.streams.read("copies")
        for _, slot in self._copies.listed():
            self.streams.write(("slot", slot))
        super()._gather(pool, layer)

    def _stage(self, pool: Any, layer: int, group: int, buffer: int) -> Any:
        staged = super()._stage(pool, layer, group, buffer)
        low, high = self._groups(pool, layer)[group]
        first = self.num_slots + buffer * self.num_staging
        for slot in range(first, first + high - low):
            # At the time of the event behind the copies, of what the copies had waited for.
            self.streams.write(("slot", slot), by=self._copy_stream, seen=staged.ready.seen)
        return staged

    def replay(self) -> None:
        """What a captured graph of one token does in every layer, unseen by the cache."""
        assert self._pool is not None
        for layer in range(3):
            ids = torch.tensor([[layer, 3 + layer]])
            self._admit(self._pool, layer, ids)
            self._gather(self._pool, layer)
            slots = self._pool.expert_to_slot[layer]
            self.compute(layer)(*self._pool.weights[layer], slots, ids, None)

    def compute(self, layer: int) -> Any:
        """Reads the slots of the routed experts and checks what they hold."""
        host_gate_up, _ = self.host.weights(layer)
        first_page, num_experts = self.host.first_page[layer], len(host_gate_up)

        def compute(gate_up, down, expert_to_slot, topk_ids, topk_weights) -> Tensor:
            for expert in topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)].unique().tolist():
                slot = int(expert_to_slot[expert])
                assert torch.equal(gate_up[slot], host_gate_up[expert])
                self.streams.read(("slot", slot))
                if slot < self.num_slots:
                    self.streams.read(("page", first_page + expert))
            return torch.zeros(*topk_ids.shape, 1)

        return compute


class Host:
    """Takes misses as `HostExperts` does, and computes nothing."""

    def __init__(self, cache: WatchedCache) -> None:
        self.cache = cache
        self.mailbox = Mailbox.empty(16, torch.device("cpu"))
        self.posts = Posts.empty(NUM_EXPERTS, 3, torch.device("cpu"))
        # Two thirds of the misses: both sources have some.
        self.posts.share.copy_((2 * torch.arange(NUM_EXPERTS + 1) + 2) // 3)

    def takes(self, num_tokens: int, top_k: int) -> bool:
        return True

    def begin(self, layers: Any = None) -> None:
        pass

    def admit(
        self, residency: Any, copies: Any, layer: int, x: Tensor, ids: Tensor, transfer: None
    ) -> Tensor:
        where = (layer, layer * NUM_EXPERTS, NUM_EXPERTS)
        with self.cache.admitting(residency):
            return mailbox.admit_and_post(x, ids, *where, residency, copies, self.posts,
                                          self.mailbox)  # fmt: skip

    def collect(self, layer: int, rows: Tensor, *others: Any) -> Tensor:
        return rows

    def read_counters(self) -> list[list[int]]:
        return self.posts.counters.tolist()


NUM_EXPERTS = 8
LAYERS = [LayerPages(f"layers.{i}", NUM_EXPERTS, torch.int8, (8, 8), (8, 8)) for i in range(3)]


def run(
    streams: Streams,
    num_slots: int,
    num_staging: int,
    *,
    num_users: int,
    replays: bool = False,
    shares: bool = False,
    **options: Any,
) -> WatchedCache:
    """Forwards of one to many tokens, on one stream or on several in turn, replays in between."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    host = HostStore(LAYERS, pin=False)
    for layer in range(3):
        host.pages(layer).copy_(torch.randint(0, 256, (NUM_EXPERTS, 128), generator=generator))

    WatchedCache.streams = streams
    sizes = {"num_slots": num_slots, "num_staging": num_staging}
    cache = WatchedCache(host, "cpu", **sizes, **options)
    if shares:
        cache.share_misses(Host(cache))
    users = [Stream() for _ in range(num_users)]
    for _ in range(30):
        tokens = draw.choice([1, 1, 2, 5, 20])
        forwards = [[0, 1, 2], [0, 1, 2]][: num_users if draw.random() < 0.5 else 1]
        while any(forwards):  # layers of several forwards, interleaved
            i = draw.choice([i for i, layers in enumerate(forwards) if layers])
            layer, user = forwards[i].pop(0), users[-1 - i]
            ids = torch.randint(-1, NUM_EXPERTS + 1, (tokens, 2), generator=generator)
            with streams.on(user):
                cache.run(layer, ids, None, cache.compute(layer), torch.zeros(tokens, 16))
            if replays and draw.random() < 0.3:
                with streams.on(users[0]), cache.lock:
                    cache.take_turn()
                    cache.replay()
    return cache


@pytest.mark.parametrize("num_users", [1, 2])
@pytest.mark.parametrize("num_slots, num_staging", [(2, 0), (5, 0), (9, 3), (16, 8)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shares", [False, True], ids=["link", "shares"])
def test_no_race(monkeypatch, num_slots, num_staging, overlap, num_users, shares) -> None:
    streams = Streams()
    streams.install(monkeypatch)
    options = {"overlap": overlap, "num_users": num_users, "shares": shares}
    cache = run(streams, num_slots, num_staging, **options)
    assert streams.num_accesses > 1000 and not streams.races
    stats = cache.read_counters()
    assert (0 < stats.host_misses < stats.misses) if shares else not stats.host_misses
    assert stats.misses and bool(num_staging) == any(x.streamed_bytes for x in stats.layers)


@pytest.mark.parametrize("num_slots, num_staging", [(5, 0), (9, 3), (16, 8)])
@pytest.mark.parametrize("shares", [False, True], ids=["link", "shares"])
def test_replays_between_layers(monkeypatch, num_slots, num_staging, shares) -> None:
    """On one stream, while forwards go on on another; other pages are resident afterwards."""
    streams = Streams()
    streams.install(monkeypatch)
    run(streams, num_slots, num_staging, num_users=2, replays=True, shares=shares)
    assert streams.num_accesses > 1000 and not streams.races


def test_a_replay_voids_what_was_copied_ahead(monkeypatch) -> None:
    """A pass that streams counts on what was resident; a replay in its middle evicts some."""
    host = HostStore(LAYERS, pin=False)
    for layer in range(3):
        host.pages(layer).copy_(torch.randint(0, 256, (NUM_EXPERTS, 128)))
    WatchedCache.streams = Streams()
    WatchedCache.streams.install(monkeypatch)
    cache = WatchedCache(host, "cpu", num_slots=4, num_staging=8)
    for experts in ([[0, 1]], [[2, 3]]):
        cache.run(1, torch.tensor(experts), None, cache.compute(1))
    everything = torch.arange(NUM_EXPERTS).repeat(4, 1)
    cache.run(0, everything, None, cache.compute(0))
    with cache.lock:
        cache.take_turn()
        cache.replay()
    cache.run(1, everything, None, cache.compute(1))


class Deaf(Event):
    def wait(self, stream: Stream) -> None:
        """Does not."""


def test_a_missing_wait_is_seen(monkeypatch) -> None:
    """The checks above can fail: nothing waits for events, or no stream for another."""
    for target, name, broken in (
        (torch.cpu, "Event", Deaf),
        (Stream, "wait_stream", lambda self, other: None),
    ):
        streams = Streams()
        with monkeypatch.context() as patch:
            streams.install(patch)
            patch.setattr(target, name, broken)
            run(streams, 9, 3, num_users=2, overlap=True)
        assert streams.races, name
