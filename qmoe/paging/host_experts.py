"""The host's share of one cache's misses: its mailbox, its workers, and when it is given up.

`qmoe_kernels.mailbox` is the protocol on the device, `qmoe_kernels.cpu.workers` the threads. Here
is who owns both: the cache, for as long as it is open.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qmoe_kernels.cpu import workers
from qmoe_kernels.experts import Experts
from qmoe_kernels.mailbox import (
    ANSWER_SECONDS,
    Mailbox,
    Posts,
    admit_and_post,
    combine,
    has_failed,
    has_room,
)
from qmoe_kernels.paging import CopyList, Residency, Transfer

logger = logging.getLogger(__name__)


class HostExperts:
    """What computes missed experts on the host, for one expert cache.

    Used under the cache's lock. Threads start with the first call, again in a forked child, and
    again where scales or biases have changed; `close` ends them.

    Attributes:
        posts: the device's tables; ``posts.share`` says how many of so many misses the host takes.
        kinds: whether it takes any of calls of one token, and of several. If not, such a call goes
            as if nothing were shared.
        working: whether anything is left to the host; False after a failure, for good.
    """

    def __init__(
        self,
        experts_of: Callable[[int], Experts],
        watched: Sequence[Sequence[tuple[Mapping[str, Tensor | None], str]]],
        first_page: Sequence[int],
        device: torch.device,
        *,
        num_threads: int | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Take the mailbox's memory; nothing is left to the host until ``posts.share`` says so.

        Args:
            experts_of: layer -> its experts on the host, for `workers.Workers`.
            watched: of each layer, what these are copies of: a module's parameters, and a name
                among them. If one changes, copies are made again.
            first_page: page of each layer's expert 0.
            device: of the cache.
            num_threads: see `workers.Workers`.
            seconds: how long an answer may take.

        Raises:
            ValueError: the host cannot compute these experts; the message says why.
        """
        self._experts_of = experts_of
        self._watched = [list(layer) for layer in watched]
        self._first_page, self._num_threads, self._seconds = first_page, num_threads, seconds
        self._experts = [experts_of(layer) for layer in range(len(first_page))]
        if (reason := workers.unavailable(self._experts)) is not None:
            raise ValueError(reason)
        self._seen = [self._state(layer) for layer in range(len(first_page))]
        self._mailbox = Mailbox.empty(self._experts[0].hidden_size, device)
        most = max(layer.num_experts for layer in self._experts)
        self.posts = Posts.empty(most, len(first_page), device)
        self.kinds = (True, True)
        self._workers: workers.Workers | None = None
        self._stale = False  # the workers have copies of what has changed
        self._pid = os.getpid()
        self.working = True

    def _state(self, layer: int) -> list[tuple[Tensor | None, int]]:
        found = [parameters.get(name) for parameters, name in self._watched[layer]]
        return [(tensor, _version(tensor)) for tensor in found]

    def _is_seen(self, layer: int) -> bool:
        # Of all layers before each step, therefore without a list.
        for (parameters, name), (tensor, version) in zip(
            self._watched[layer], self._seen[layer], strict=True
        ):
            now = parameters.get(name)
            if now is not tensor or _version(now) != version:
                return False
        return True

    def takes(self, num_tokens: int, top_k: int) -> bool:
        """Whether a call of this size may be shared."""
        return self.working and self.kinds[num_tokens > 1] and has_room(num_tokens, top_k)

    def begin(self, layers: Sequence[int] | None = None) -> None:
        """Before something is posted: there are workers, they are awake, and nothing has failed.

        Args:
            layers: that are going to be posted; None: all.

        Raises:
            RuntimeError: see `check`.
        """
        self.check()
        if not self.working:
            return
        for layer in range(len(self._seen)) if layers is None else layers:
            if not self._is_seen(layer):
                now, self._stale = self._state(layer), True
                self._experts[layer] = self._experts_of(layer)
                self._seen[layer] = now
        if self._stale or self._workers is None or not self._workers.alive:
            self._start()
        if self._workers is not None:
            self._workers.ring()

    def _start(self) -> None:
        """Start workers, on a mailbox in which nothing is under way."""
        if self._pid == os.getpid():
            self.drain()
        self.stop()
        if not self.working:
            return
        self._pid, words = os.getpid(), self._mailbox.words
        posted = workers.load_word(words, workers.POSTED)
        for word in (workers.STOP, workers.TEAM, workers.SLEEPERS):
            workers.store_word(words, word, 0)
        workers.store_word(words, workers.ANSWERED, posted)
        box = self._mailbox
        self._workers = workers.Workers(
            self._experts, words, box.ids, box.rows, box.answers, self._num_threads
        )
        self._workers.start()
        self._stale = False

    def admit(
        self,
        residency: Residency,
        copies: CopyList,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        transfer: Transfer | None,
    ) -> Tensor:
        """Admit a layer and leave some misses to the host; see `mailbox.admit_and_post`."""
        return admit_and_post(
            hidden_states,
            topk_ids,
            layer,
            self._first_page[layer],
            self._experts[layer].num_experts,
            residency,
            copies,
            self.posts,
            self._mailbox,
            transfer=transfer,
        )

    def collect(
        self,
        layer: int,
        rows: Tensor,
        topk_ids: Tensor,
        link_ids: Tensor,
        topk_weights: Tensor | None,
    ) -> Tensor:
        """Add what the host computed; see `qmoe_kernels.mailbox.combine`.

        Outside of a capture it waits for the device: what follows is not computed with what is not
        valid. Who replays a graph calls `check` before results are given out.

        Raises:
            RuntimeError: see `check`.
        """
        num_experts = self._experts[layer].num_experts
        given = (rows, topk_ids, link_ids, topk_weights, layer, num_experts)
        output = combine(*given, self.posts, self._mailbox, seconds=self._seconds)
        if rows.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return output
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()
        self.check()
        return output

    def check(self) -> None:
        """Give the host up if an answer did not come. Does not wait for the device.

        Raises:
            RuntimeError: it did not; what was computed since is not valid. Later calls work, with
                the link alone.
        """
        if has_failed(self._mailbox):
            self._give_up()
            raise RuntimeError(
                f"the host did not compute its share of the experts within {self._seconds:g} s, "
                "and what the model computed meanwhile is thrown away; from now on all misses "
                "come over the link (misses='link'), until the model is loaded again"
            )

    def _give_up(self) -> None:
        self.working = False
        if self.posts.share.is_cuda:
            torch.cuda.synchronize(self.posts.share.device)
        # In place: graphs that were captured go on, and leave everything to the link.
        self.posts.share.zero_()
        self.posts.pending.zero_()
        self.posts.failed.zero_()
        workers.store_word(self._mailbox.words, workers.FAILED, 0)
        self.stop()

    def drain(self) -> None:
        """Wait until nothing is under way, after a step that was cut off.

        Raises:
            RuntimeError: see `check`.
        """
        if self._workers is None or not self._workers.alive:
            return
        words = self._mailbox.words
        posted = workers.load_word(words, workers.POSTED)
        if not workers.wait_for_answer(words, posted, self._seconds):
            workers.store_word(words, workers.FAILED, 1)
            self.check()

    def stop(self) -> None:
        """End the threads; the next call starts others."""
        if self._workers is None:
            return
        ended = self._workers.close()  # cut off here, they are told again the next time
        self._workers = None
        if not ended:
            # They may write to the mailbox at any time: it cannot be used again.
            self.working = False
            self.posts.share.zero_()

    def read_counters(self) -> list[list[int]]:
        """Of each layer, the columns of `mailbox.Posts`' counters."""
        counters: list[list[int]] = self.posts.counters.tolist()
        return counters


def _version(tensor: Tensor | None) -> int:
    # Tensors of inference mode have none; nobody changes them outside of it, either.
    return 0 if tensor is None or tensor.is_inference() else int(tensor._version)
