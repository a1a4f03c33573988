"""The host's share of misses: which experts, what is posted, what is summed, and what may go wrong.

Workers are real in all of it; on a machine without a GPU the device is Triton's interpreter, or
plain Python over the same tensors.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib.metadata import version

import pytest
import torch
from compiling import run_compiler
from graphs import capture, no_synchronization
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layer import DEVICE, random_layer
from test_paging import aligned_slots, host_pages

from qmoe_kernels import fused_moe, mailbox, mailbox_kernels
from qmoe_kernels.claims import FIRST_RATE
from qmoe_kernels.cpu import workers
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.mailbox import SERVED, WAITED_NS, Mailbox, Posts
from qmoe_kernels.paging import CopyList, Residency, Transfer
from qmoe_kernels.reference import fused_moe_reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

IMPLEMENTATIONS = ["cpu", "triton"]
NUM_EXPERTS, TOP_K, HIDDEN = 8, 3, 40
NUM_SLOTS, PAGE_BYTES = 4, 640


def device_of(implementation: str) -> torch.device:
    return DEVICE if implementation == "triton" else torch.device("cpu")


def on_cpu(layer) -> Experts:
    layer = layer.to("cpu")
    return Experts(
        Projection(layer.gate_up_proj, layer.gate_up_proj_scale, layer.gate_up_proj_bias),
        Projection(layer.down_proj, layer.down_proj_scale, layer.down_proj_bias),
        layer.activation,
    )


def make_layers(weights: str = "int8", *, bias: bool = False, dtype=torch.float32) -> list:
    """Two layers of the same sizes, one token each."""
    return [
        random_layer(
            num_tokens=5, num_experts=NUM_EXPERTS, top_k=TOP_K, hidden_size=HIDDEN,
            intermediate_size=24, weights=weights, bias=bias, dtype=dtype, seed=seed,
        )
        for seed in (0, 1)
    ]  # fmt: skip


@dataclass
class Host:
    """A mailbox with workers, and the device's side of it.

    With Triton the first layer's pages are copied by the launch that admits, as they are in short
    calls; the other layer's by nobody.
    """

    implementation: str
    layers: list
    num_threads: int = 2

    def __post_init__(self) -> None:
        device = device_of(self.implementation)
        # The last pages are of nothing that is asked for here.
        num_pages = NUM_EXPERTS * len(self.layers) + NUM_SLOTS
        self.residency = Residency.empty(num_pages, NUM_SLOTS, len(self.layers), device)
        self.copies = CopyList.empty(NUM_EXPERTS, device)
        if self.implementation == "triton":
            self.pages, addresses = host_pages(num_pages, PAGE_BYTES)
            self.slots = aligned_slots(NUM_SLOTS, PAGE_BYTES)
            self.transfer = Transfer(addresses, self.slots, PAGE_BYTES)
        self.mailbox = Mailbox.empty(HIDDEN, device)
        self.posts = Posts.empty(NUM_EXPERTS, len(self.layers), device)
        self.workers = workers.Workers(
            [on_cpu(layer) for layer in self.layers],
            *(self.mailbox.words, self.mailbox.ids, self.mailbox.rows, self.mailbox.answers),
            self.num_threads,
            spin_ns=200_000,
        )
        self.workers.start()

    def fill_slots(self) -> None:
        """All slots hold pages that nobody asks for, used at the clock's 10; claims end there."""
        r = self.residency
        r.clear()
        r.page_to_slot[-NUM_SLOTS:] = torch.arange(NUM_SLOTS, device=r.clock.device)
        r.slot_to_page.copy_(torch.arange(NUM_SLOTS, device=r.clock.device))
        r.slot_to_page.add_(len(r.page_to_slot) - NUM_SLOTS)
        r.last_used.fill_(10)
        r.slot_claims.fill_(10)
        r.claims[-NUM_SLOTS:].fill_(10)
        r.clock.fill_(10)
        r.last_admitted.fill_(10)

    def hold(self, page: int, slot: int) -> None:
        """Put a page into a slot in another one's place; it was used as that one was."""
        r = self.residency
        before = int(r.slot_to_page[slot])
        r.page_to_slot[before], r.page_to_slot[page] = -1, slot
        r.slot_to_page[slot] = page
        r.claims[page] = r.claims[before]

    def admit(self, number: int, layer) -> torch.Tensor:
        where = (layer.hidden_states, layer.topk_ids, number, number * NUM_EXPERTS, NUM_EXPERTS)
        arguments = (*where, self.residency, self.copies, self.posts, self.mailbox)
        if self.implementation == "cpu":
            return mailbox._admit_and_post_cpu(*arguments)
        transfer = self.transfer if number == 0 else None
        return mailbox_kernels.launch_admit_and_post(*arguments, transfer)

    def check_contents(self) -> None:
        """After an admission of the first layer: what it listed was copied."""
        if self.implementation == "triton":
            for page, slot in self.copies.listed():
                assert torch.equal(self.slots[slot].cpu(), self.pages[page])
            assert len(set(self.copies.signal.tolist())) == 1

    def combine(self, number: int, layer, link_ids, weights=None, seconds: float = 5.0):
        skipped = replace(layer, topk_ids=link_ids, topk_weights=None)
        rows = fused_moe(**skipped.arguments())
        triton = self.implementation == "triton"
        run = mailbox_kernels.launch_combine if triton else mailbox._combine_cpu
        return run(rows, layer.topk_ids, link_ids, weights, number, NUM_EXPERTS, self.posts,
                   self.mailbox, seconds)  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Hosts whose workers end with the test."""
    made: list[Host] = []
    yield made
    for host in made:
        host.workers.close()


def make_host(hosts: list[Host], implementation: str, layers: list, **options) -> Host:
    host = Host(implementation, layers, **options)
    hosts.append(host)
    return host


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("share", [0, 2, NUM_EXPERTS])
def test_sums_what_link_and_host_computed(hosts, implementation, weights, bias, share) -> None:
    device = device_of(implementation)
    layers = [x.to(device) for x in make_layers(weights, bias=bias)]
    host = make_host(hosts, implementation, layers)
    host.posts.share.fill_(share).clamp_(max=torch.arange(NUM_EXPERTS + 1, device=device))
    for number, layer in enumerate(layers):
        host.fill_slots()
        link_ids = host.admit(number, layer)
        diverted = layer.topk_ids[link_ids != layer.topk_ids].unique().numel()
        assert diverted == min(share, layer.topk_ids.unique().numel())
        assert host.posts.counters[number, SERVED] == diverted
        out = host.combine(number, layer, link_ids, layer.topk_weights)
        expected = fused_moe_reference(**layer.to("cpu").arguments())
        assert (out.cpu().double() - expected).norm() <= 1e-5 * expected.norm()
        rows = host.combine(number, layer, link_ids)
        expected = fused_moe(**replace(layer, topk_weights=None).arguments())
        torch.testing.assert_close(rows, expected)
    waited = host.posts.counters[:, WAITED_NS]
    assert (waited == 0).all() if share == 0 else (waited >= 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_the_activations_dtype(hosts, implementation, dtype) -> None:
    if implementation == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bf16 otherwise")
    (layer, _) = make_layers(dtype=dtype)
    layer = layer.to(device_of(implementation))
    host = make_host(hosts, implementation, [layer])
    host.posts.share.copy_(torch.arange(NUM_EXPERTS + 1))
    host.fill_slots()
    rows = host.combine(0, layer, host.admit(0, layer))
    alone = fused_moe(**replace(layer.to("cpu"), topk_weights=None).arguments())
    assert torch.equal(rows.cpu(), alone), "all of it is the host's, whose loops these are"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_one_expert_has_the_same_bits_in_every_company(hosts, num_threads) -> None:
    layers = make_layers()
    host = make_host(hosts, "cpu", layers, num_threads=num_threads)
    host.posts.share.copy_(torch.arange(NUM_EXPERTS + 1))
    host.fill_slots()
    together = host.combine(0, layers[0], host.admit(0, layers[0]))
    for token in range(len(layers[0].topk_ids)):
        for k in range(TOP_K):
            alone = replace(
                layers[0],
                hidden_states=layers[0].hidden_states[token : token + 1],
                topk_ids=layers[0].topk_ids[token : token + 1, k : k + 1],
            )
            host.fill_slots()
            rows = host.combine(0, alone, host.admit(0, alone))
            assert torch.equal(rows[0, 0], together[token, k])


# ---- which experts -----------------------------------------------------------------------------


def ids_of(*experts: int) -> torch.Tensor:
    return torch.tensor([experts])


def asked_for(layer, *experts: int):
    """The layer with one token, which is routed to these experts."""
    return replace(layer, hidden_states=layer.hidden_states[:1], topk_ids=ids_of(*experts))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestChoice:
    """A token, whose experts are absent; the table says of how many the host takes."""

    def run(self, hosts, implementation: str, share: int, *experts: int, before=None) -> Host:
        layers = make_layers()
        self.host = host = make_host(hosts, implementation, layers)
        most = torch.arange(NUM_EXPERTS + 1, device=host.posts.share.device)
        host.posts.share.copy_(most.clamp(max=share))
        host.fill_slots()
        if before is not None:
            before(host)
        layer = asked_for(layers[0], *experts)
        layer = layer.to(device_of(implementation))
        link_ids = host.admit(0, layer)
        if int(host.posts.pending):
            assert workers.wait_for_answer(host.mailbox.words, int(host.posts.number), 5)
        self.taken = layer.topk_ids[link_ids != layer.topk_ids].tolist()
        self.copied = [page for page, _ in host.copies.listed()]
        residency = host.residency
        there = residency.slot_to_page.tolist()
        assert set(self.copied) <= set(there)
        for page, slot in host.copies.listed():
            assert (residency.page_to_slot[page], residency.slot_to_page[slot]) == (slot, page)
        assert host.posts.counters[0, SERVED] == len(self.taken)
        host.check_contents()
        return host

    def test_last_choices_of_those_never_asked_for(self, hosts, implementation) -> None:
        self.run(hosts, implementation, 2, 3, 1, 6)
        assert (self.taken, self.copied) == ([1, 6], [3])

    def test_the_smallest_claim_first(self, hosts, implementation) -> None:
        def before(host: Host) -> None:
            host.residency.claims[3], host.residency.claims[6] = 2, 5

        self.run(hosts, implementation, 1, 3, 6, before=before)
        assert (self.taken, self.copied) == ([3], [6])

    def test_what_is_warm_is_the_links(self, hosts, implementation) -> None:
        """Its claim is half a horizon above that of the slot that would go first, 10."""

        def before(host: Host) -> None:
            host.residency.miss_rate.fill_(NUM_SLOTS << 13)  # a horizon of 16 ticks
            host.residency.claims[3], host.residency.claims[5] = 17, 18

        self.run(hosts, implementation, 8, 3, 6, 5, before=before)
        assert (self.taken, self.copied) == ([3, 6], [5])

    def test_at_most_so_many_of_what_is_cold(self, hosts, implementation) -> None:
        def before(host: Host) -> None:
            host.residency.claims[3], host.residency.claims[5] = 10, 9

        self.run(hosts, implementation, 1, 3, 6, 5, before=before)
        assert (self.taken, self.copied) == ([6], [3, 5])

    def test_an_empty_slot_is_filled(self, hosts, implementation) -> None:
        """Though no claim is half a horizon above that of an empty slot, 0."""

        def before(host: Host) -> None:
            host.residency.miss_rate.fill_(NUM_SLOTS << 13)  # a horizon of 16 ticks
            host.residency.page_to_slot[host.residency.slot_to_page[2].long()] = -1
            host.residency.slot_to_page[2] = -1
            host.residency.last_used[2] = host.residency.slot_claims[2] = 0

        host = self.run(hosts, implementation, 8, 3, 6, before=before)
        assert (self.taken, self.copied) == ([], [3, 6])
        assert host.residency.page_to_slot[3] == 2, "the empty one first"

    def test_a_slot_of_this_call_is_not_the_coldest(self, hosts, implementation) -> None:
        def before(host: Host) -> None:
            host.hold(3, 1)
            host.residency.claims[3] = host.residency.slot_claims[1] = 4
            host.residency.claims[6] = 9

        self.run(hosts, implementation, 8, 3, 6, before=before)
        assert (self.taken, self.copied) == ([6], []), "all others have larger claims"

    def test_all_is_cold_where_slots_are_kept_for_the_cycle(self, hosts, implementation) -> None:
        """All of them were used since the layer's last admission: the latest would go first."""

        def before(host: Host) -> None:
            host.residency.last_admitted.fill_(5)
            host.residency.claims[3] = 60  # far ahead, and still no more than theirs

        self.run(hosts, implementation, 8, 3, 6, before=before)
        assert (self.taken, self.copied) == ([3, 6], [])

    def test_all_slots_in_use(self, hosts, implementation) -> None:
        def before(host: Host) -> None:
            for slot in range(4):
                host.hold(slot, slot)

        self.run(hosts, implementation, 8, 0, 1, 2, 3, 6, before=before)
        assert (self.taken, self.copied) == ([6], [])

    def test_what_is_there_is_no_miss(self, hosts, implementation) -> None:
        def before(host: Host) -> None:
            host.hold(3, 1)

        self.run(hosts, implementation, 8, 3, 6, before=before)
        assert (self.taken, self.copied) == ([6], [])

    def test_ids_outside_are_skipped(self, hosts, implementation) -> None:
        self.run(hosts, implementation, 8, NUM_EXPERTS, 6, -1)
        assert (self.taken, self.copied) == ([6], [])

    def test_after_a_failure_nothing_is_posted(self, hosts, implementation) -> None:
        self.run(hosts, implementation, 8, 3, before=lambda h: h.posts.failed.fill_(1))
        assert (self.taken, self.copied) == ([], [3])

    def test_several_tokens_have_a_table_of_their_own(self, hosts, implementation) -> None:
        layers = [x.to(device_of(implementation)) for x in make_layers()]
        host = make_host(hosts, implementation, layers)
        host.posts.share[1].copy_(torch.arange(NUM_EXPERTS + 1))
        for layer, taken in ((asked_for(layers[0], 3, 1).to(layers[0].topk_ids.device), False),
                             (layers[0], True)):  # fmt: skip
            host.fill_slots()
            assert torch.equal(host.admit(0, layer), layer.topk_ids) != taken


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_implementations_choose_the_same(data) -> None:
    layers = make_layers()
    num_pages, numbers = 2 * NUM_EXPERTS + NUM_SLOTS, st.integers(0, 3)
    claims = numbers | st.integers(0, 3 + 64 * 2)
    held = st.lists(st.integers(-1, num_pages - 1), min_size=4, max_size=4, unique=True)
    state = {
        "claims": data.draw(st.lists(claims, min_size=num_pages, max_size=num_pages)),
        "used": data.draw(st.lists(numbers, min_size=4, max_size=4)),
        "pages": data.draw(held),
        "last": data.draw(numbers),
        "rate": data.draw(st.sampled_from([0, 1 << 13, FIRST_RATE])),
        "share": [data.draw(st.lists(st.integers(0, 9), min_size=9, max_size=9)) for _ in range(2)],
    }
    num_tokens = data.draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, NUM_EXPERTS), min_size=TOP_K, max_size=TOP_K)
    ids = torch.tensor(data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens)))
    found = []
    for implementation in IMPLEMENTATIONS:
        host = Host(implementation, layers)
        try:
            host.residency.clock.fill_(3)
            host.residency.last_admitted.fill_(state["last"])
            host.residency.miss_rate.fill_(state["rate"])
            host.residency.claims.copy_(torch.tensor(state["claims"]))
            host.residency.slot_to_page.copy_(torch.tensor(state["pages"]))
            for slot, page in enumerate(state["pages"]):
                if page >= 0:
                    host.residency.page_to_slot[page] = slot
                    host.residency.last_used[slot] = state["used"][slot]
                    host.residency.slot_claims[slot] = state["claims"][page]
            host.posts.share.copy_(torch.tensor(state["share"]))
            layer = replace(layers[1], hidden_states=layers[1].hidden_states[:num_tokens])
            layer = replace(layer, topk_ids=ids)
            layer = layer.to(device_of(implementation))
            link_ids = host.admit(1, layer)
            posted = int(host.posts.pending) > 0
            mail = host.mailbox
            found.append(
                (
                    link_ids.tolist(),
                    host.posts.counters.tolist(),
                    {f.name: getattr(host.residency, f.name).tolist() for f in fields(Residency)},
                    host.copies.listed(),
                    int(host.posts.number),
                    workers.load_word(mail.words, workers.POSTED),
                    mail.words[workers.HEADER].tolist() if posted else None,
                    mail.ids[: ids.numel()].tolist() if posted else None,
                    mail.rows[:num_tokens].tolist() if posted else None,
                )
            )
        finally:
            host.workers.close()
    assert found[0] == found[1]


# ---- what may go wrong -------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qmoe-host-")]


def posted(host: Host, layer) -> torch.Tensor:
    host.posts.share.copy_(torch.arange(NUM_EXPERTS + 1))
    host.fill_slots()
    return host.admit(0, layer)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_answer_that_does_not_come_is_seen(hosts, implementation) -> None:
    (layer, _) = make_layers()
    layer = layer.to(device_of(implementation))
    host = make_host(hosts, implementation, [layer])
    host.workers.close()  # as if they had died
    link_ids = posted(host, layer)
    out = host.combine(0, layer, link_ids, layer.topk_weights, seconds=0.05)
    assert not out.any(), "finite, so that drawing a token does not fail on the device"
    assert mailbox.has_failed(host.mailbox)
    link_ids = host.admit(0, layer)
    assert torch.equal(link_ids, layer.topk_ids), "nothing more is posted"
    assert not host.combine(0, layer, link_ids, seconds=60).any(), "nor waited for"


def test_posts_while_workers_sleep(hosts) -> None:
    (layer, _) = make_layers()
    host = make_host(hosts, "cpu", [layer], num_threads=3)
    expected = host.combine(0, layer, posted(host, layer))
    for pause in (0.0, 0.001, 0.02, 0.05):
        for ring in (False, True):
            time.sleep(pause)
            if ring:
                host.workers.ring()
            assert torch.equal(host.combine(0, layer, posted(host, layer)), expected)


def test_a_thousand_posts_in_a_row(hosts) -> None:
    layers = make_layers()
    host = make_host(hosts, "cpu", layers, num_threads=3)
    rows = []
    for number, layer in enumerate(layers):
        posted(host, layer)
        workers.wait_for_answer(host.mailbox.words, number + 1, 5)
    for turn in range(1000):
        number = turn % 2
        layer = layers[number]
        host.mailbox.rows[:5, :HIDDEN] = layer.hidden_states
        host.mailbox.ids[:15] = layer.topk_ids.flatten()
        host.mailbox.words[workers.HEADER, 0] = number
        host.posts.number.add_(1)
        workers.store_word(host.mailbox.words, workers.POSTED, int(host.posts.number))
        assert workers.wait_for_answer(host.mailbox.words, int(host.posts.number), 5)
        rows.append(host.mailbox.answers[:15].clone())
    for turn in range(2, 1000):
        assert torch.equal(rows[turn], rows[turn % 2]), turn


def test_a_header_that_cannot_be_is_not_answered(hosts) -> None:
    (layer, _) = make_layers()
    host = make_host(hosts, "cpu", [layer])
    for header in ([7, 1, 1, 2], [0, 1, 1, 3], [0, 1000, 1000, 2], [0, 0, 3, 2], [-1, 1, 1, 0]):
        host.mailbox.words[workers.HEADER, :4] = torch.tensor(header)
        host.posts.number.add_(1)
        workers.store_word(host.mailbox.words, workers.POSTED, int(host.posts.number))
        assert not workers.wait_for_answer(host.mailbox.words, int(host.posts.number), 0.05)
    link_ids = posted(host, layer)
    assert host.combine(0, layer, link_ids).any(), "later posts are answered"


def test_two_models_at_once(hosts) -> None:
    layers = make_layers()
    pair = [make_host(hosts, "cpu", [layer]) for layer in layers]
    expected = [h.combine(0, x, posted(h, x)) for h, x in zip(pair, layers, strict=True)]
    wrong = []

    def use(i: int) -> None:
        for _ in range(50):
            out = pair[i].combine(0, layers[i], posted(pair[i], layers[i]))
            if not torch.equal(out, expected[i]):
                wrong.append(i)

    users = [threading.Thread(target=use, args=(i,)) for i in (0, 1)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong


def test_no_thread_is_left(hosts) -> None:
    before = threads()
    (layer, _) = make_layers()
    host = Host("cpu", [layer], num_threads=3)
    assert len(threads()) == len(before) + 3
    host.combine(0, layer, posted(host, layer))
    began = time.monotonic()
    host.workers.close()
    assert time.monotonic() - began < 1
    assert threads() == before and not host.workers.alive
    host.workers.close()  # again does nothing
    host = Host("cpu", [layer])
    del host  # nobody's use of it ends them too
    assert threads() == before


def test_ctrl_c_while_waiting_leaves_the_mailbox_usable(hosts) -> None:
    (layer, _) = make_layers()
    host = make_host(hosts, "cpu", [layer])
    expected = host.combine(0, layer, posted(host, layer))
    number = int(host.posts.number)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        workers.wait_for_answer(host.mailbox.words, number + 1, 10)
    timer.join()
    assert torch.equal(host.combine(0, layer, posted(host, layer)), expected)


def test_ctrl_c_while_a_thread_starts_leaves_none(hosts, monkeypatch) -> None:
    """A thread that has not begun by then finds that it is not wanted, and takes no posts."""
    before, late = threads(), []

    def interrupted(*given) -> None:
        late.append(given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading, "_start_new_thread", interrupted)
        Host("cpu", make_layers()[:1])
    begin, arguments = late.pop()
    begin(*arguments)  # does not end, or reads memory that is gone, if it does what it was to do
    assert threads() == before


def test_ctrl_c_while_threads_are_told_to_end(hosts, monkeypatch) -> None:
    before = threads()
    host = Host("cpu", make_layers()[:1], num_threads=3)

    def interrupted(*given) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "store_word", interrupted)
        host.workers.close()
    assert not host.workers.alive, "nobody posts to them any more"
    assert host.workers.close() and threads() == before


PROCESS = """
import os, sys, time
import torch
sys.path += {path!r}
from test_mailbox import Host, make_layers, posted, threads
(layer, _) = make_layers()
host = Host("cpu", [layer])
expected = host.combine(0, layer, posted(host, layer))
if not (child := os.fork()):
    assert not host.workers.alive
    host.workers.close()  # not its own: the parent's go on
    mine = Host("cpu", [layer])
    assert torch.equal(mine.combine(0, layer, posted(mine, layer)), expected)
    mine.workers.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(host.combine(0, layer, posted(host, layer)), expected)
print("well")
"""


def test_processes_end_and_fork() -> None:
    """A process that closes nothing ends at once; a forked child has workers of its own."""
    import subprocess

    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROCESS.format(path=sys.path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.gpu
def test_a_graph_is_replayed_while_workers_sleep(hosts) -> None:
    """The same numbers of posts and answers in every replay, awake or asleep, rung for or not."""
    (layer, _) = make_layers(dtype=torch.bfloat16)
    layer = layer.to(DEVICE)
    host = make_host(hosts, "triton", [layer], num_threads=3)
    expected = host.combine(0, layer, posted(host, layer), layer.topk_weights)

    def step() -> torch.Tensor:
        host.fill_slots()
        return host.combine(0, layer, host.admit(0, layer), layer.topk_weights)

    step()
    graph, output = capture(step)
    number = int(host.posts.number)
    for pause in (0.0, 0.0, 0.0, 0.02, 0.05):
        time.sleep(pause)
        output.zero_()
        with no_synchronization():
            graph.replay()
        torch.cuda.synchronize()
        number += 1
        assert int(host.posts.number) == number
        assert workers.load_word(host.mailbox.words, workers.ANSWERED) == number
        assert torch.equal(output, expected)


@pytest.mark.gpu
def test_a_graph_does_not_wait_for_ever(hosts) -> None:
    (layer, _) = make_layers(dtype=torch.bfloat16)
    layer = layer.to(DEVICE)
    host = make_host(hosts, "triton", [layer])
    host.combine(0, layer, posted(host, layer), layer.topk_weights)

    def step() -> torch.Tensor:
        host.fill_slots()
        link_ids = host.admit(0, layer)
        return host.combine(0, layer, link_ids, layer.topk_weights, seconds=0.2)

    step()
    graph, output = capture(step)
    host.workers.close()
    began = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()
    assert 0.1 < time.monotonic() - began < 2
    assert not output.any() and mailbox.has_failed(host.mailbox)
    began = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()
    assert time.monotonic() - began < 0.1, "it waits once"


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
from compiling import compiling_for, spilled_bytes

with compiling_for(CAPABILITY) as compiled:
    import torch
    from qmoe_kernels.mailbox import Mailbox, Posts
    from qmoe_kernels.mailbox_kernels import launch_admit_and_post, launch_combine
    from qmoe_kernels.paging import CopyList, Residency, Transfer
    experts, hidden = 128, 2048
    residency = Residency.empty(6144, 3072, 48, "cpu")
    copies = CopyList.empty(experts, "cpu")
    posts = Posts.empty(experts, 48, torch.device("cpu"))
    box = Mailbox.empty(hidden, torch.device("cpu"))
    memory = torch.zeros(3072, 128, dtype=torch.uint8)
    transfer = Transfer(torch.zeros(6144, dtype=torch.int64), memory, 128)
    for dtype in (torch.bfloat16, torch.float32):
        x, ids = torch.zeros(1, hidden, dtype=dtype), torch.zeros(1, 8, dtype=torch.int64)
        tables = (residency, copies, posts, box)
        link = launch_admit_and_post(x, ids, 0, 0, experts, *tables)
        launch_admit_and_post(x, ids, 0, 0, experts, *tables, transfer)
        rows = torch.zeros(1, 8, hidden, dtype=dtype)
        for weights in (torch.zeros(1, 8), None):
            launch_combine(rows, ids, link, weights, 0, experts, posts, box, 5.0)
for kernel in compiled:
    ptx = kernel.asm["ptx"]
    print(json.dumps({
        "name": kernel.metadata.name, "spilled": spilled_bytes(kernel.asm["cubin"]),
        "released": "st.release.sys" in ptx, "acquired": "ld.acquire.sys" in ptx,
        "published": "st.release.gpu" in ptx, "seen": "ld.acquire.gpu" in ptx,
        "timed": "globaltimer" in ptx, "volatile": "ld.volatile.global" in ptx,
    }))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    kernels = run_compiler(f"CAPABILITY = {capability}\n{COMPILE}")
    names = [kernel["name"] for kernel in kernels]
    assert names == 2 * [*2 * ["admit_and_post_kernel"], *2 * ["combine_kernel"]]
    assert [kernel["published"] for kernel in kernels] == 2 * [False, True, False, False]
    # Triton 3.6 spills in one case, for GPUs that it was not measured on.
    most = 24 if version("triton").startswith("3.6.") and capability == 80 else 0
    for kernel in kernels:
        assert kernel["spilled"] <= most, kernel
        assert kernel["released"] and kernel["published"] == kernel["seen"], kernel
        if kernel["name"] == "combine_kernel":
            assert kernel["acquired"] and kernel["timed"] and kernel["volatile"], kernel
