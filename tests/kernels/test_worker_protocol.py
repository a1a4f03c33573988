"""Every interleaving of the workers' own code: `worker_loops`, a step for each access to a word.

The functions are read from their source and made generators that stop at every atomic access, at
sleep and waking, and at both ends of what touches memory that is not atomic (the job, rows,
answers). A search goes through all states that they can come to together with a device that posts
and waits. Accesses are sequentially consistent, so that two that could race for plain memory stand
side by side in one of these states.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

numba = pytest.importorskip("numba")
if not sys.platform.startswith("linux"):
    pytest.skip("workers need Linux", allow_module_level=True)

from qmoe_kernels.cpu import worker_loops  # noqa: E402
from qmoe_kernels.cpu.worker_loops import (  # noqa: E402
    ANSWERED,
    BELL,
    POSTED,
    STOP,
)

STEPS = {"load", "swap", "add", "replace", "sleep_on", "wake", "pause", "yield_processor",
         "prepare", "work"}  # fmt: skip
FUNCTIONS = ("lead", "assist", "rest", "ring", "serve")
Process = Generator[tuple, Any, None]


class _Steps(ast.NodeTransformer):
    """Calls of steps become ``yield``, those of functions ``yield from``."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in STEPS:
            return ast.Yield(ast.Tuple([ast.Constant(name), *node.args], ast.Load()))
        return ast.YieldFrom(node) if name in FUNCTIONS else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list = []
        return node


def generators(fault: tuple[str, str] | None = None, **changed: Any) -> dict[str, Any]:
    """The functions of `worker_loops` as generators.

    Args:
        fault: a line of theirs, and what is to stand there instead.
        changed: globals of theirs.
    """
    module = {**vars(worker_loops), "now": lambda: 1, **changed}
    applied = 0
    for name in FUNCTIONS:
        function = getattr(worker_loops, name)
        source = inspect.getsource(getattr(function, "py_func", function))
        if fault is not None:
            applied += fault[0] in source
            source = source.replace(*fault)
        tree = ast.fix_missing_locations(_Steps().visit(ast.parse(source)))
        exec(compile(tree, name, "exec"), module)
    assert fault is None or applied == 1
    return module


@dataclass
class World:
    """Words, who sleeps, and who is inside of what touches plain memory.

    Attributes:
        words: by their place.
        asleep: processes that wait for a `wake`.
        working: processes inside of `work`, and on which post.
        preparing: whether the job is being filled in.
        job: the post that the job is of.
        rows: the post whose rows lie in the mailbox; None while they are written.
        answers: the processes that worked on the post in the job, and have ended.
        wrong: what must not have happened.
    """

    words: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(0, 1024, 128), 0))
    asleep: set[int] = field(default_factory=set)
    working: dict[int, int] = field(default_factory=dict)
    preparing: bool = False
    job: int = 0
    rows: int | None = 0
    claimed: bool = False
    done: bool = False
    wrong: list[str] = field(default_factory=list)

    def check(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence)

    def key(self) -> tuple:
        return (
            tuple(self.words.values()),
            frozenset(self.asleep),
            tuple(sorted(self.working.items())),
            (self.preparing, self.job, self.rows, self.claimed, self.done),
        )


@dataclass
class Run:
    """Processes, each stopped in front of its next step."""

    world: World
    processes: list[Process]
    pending: list[tuple | None] = field(default_factory=list)
    spinning: dict[int, tuple] = field(default_factory=dict)  # what words were since a pause
    half: dict[int, tuple] = field(default_factory=dict)  # begun, not ended

    def start(self) -> Run:
        self.pending = [next(process) for process in self.processes]
        return self

    def ready(self, who: int) -> bool:
        step, world = self.pending[who], self.world
        if step is None or who in world.asleep:
            return False
        if step[0] in ("pause", "yield_processor"):
            return self.spinning.get(who) != tuple(world.words.values())
        if step[0] == "await":
            return world.words[ANSWERED] >= step[1]
        return True

    def go(self, who: int) -> None:
        """One step of a process."""
        step = self.pending[who]
        assert step is not None
        if step[0] in ("prepare", "work", "write", "read") and who not in self.half:
            self.half[who] = step
            self.begin(who, step)
            return
        value = self.end(who, self.half.pop(who)) if who in self.half else self.do(who, step)
        self.advance(who, value)

    def advance(self, who: int, value: Any) -> None:
        try:
            self.pending[who] = self.processes[who].send(value)
        except StopIteration:
            self.pending[who] = None

    def time_out(self, who: int) -> None:
        self.world.asleep.discard(who)

    def do(self, who: int, step: tuple) -> Any:
        world, (name, *given) = self.world, step
        words = world.words
        if name in ("pause", "yield_processor"):
            self.spinning.pop(who, None)
        elif name == "load":
            self.spinning.setdefault(who, tuple(words.values()))
            return words[given[0]]
        elif name == "swap":
            before, words[given[0]] = words[given[0]], given[1]
            return before
        elif name == "add":
            words[given[0]] += given[1]
            return words[given[0]] - given[1]
        elif name == "replace":
            if words[given[0]] == given[1]:
                words[given[0]] = given[2]
                return True
            return False
        elif name == "sleep_on":
            if words[given[0]] == given[1]:
                world.asleep.add(who)
        elif name == "wake":
            world.asleep.clear()
        return None

    def begin(self, who: int, step: tuple) -> None:
        world, name = self.world, step[0]
        if name == "prepare":
            world.check(not world.working, "a job was changed while somebody worked on it")
            world.check(world.rows is not None, "rows were read while they were written")
            world.preparing, world.job = True, world.words[POSTED]
            world.claimed = world.done = False
        elif name == "work":
            world.check(not world.preparing, "somebody worked on a job that was not ready")
            world.working[who] = world.job
            # One part: whoever comes first has it. The others find nothing, or wait for it.
            if not world.claimed:
                world.claimed = True
                self.half[who] = ("work", "the part")
        elif name == "write":
            world.check(not world.working, "rows were written while somebody worked")
            world.check(not world.preparing, "a header was written while it was read")
            world.rows = None
        else:
            world.check(not world.working, "answers were read while somebody worked")
            world.check(world.done, "an answer was read that nobody had written")
            world.check(world.job == step[1], "another post's answer was read")

    def end(self, who: int, step: tuple) -> Any:
        world, name = self.world, step[0]
        if name == "prepare":
            world.preparing = False
            return True
        if name == "work":
            if world.working.pop(who) != world.job:
                world.wrong.append("a job changed under somebody who worked on it")
            if step[1] == "the part":
                world.done = True
        elif name == "write":
            world.rows = step[1]
        return None

    def key(self) -> tuple:
        frames = []
        for process, step in zip(self.processes, self.pending, strict=True):
            chain, inner = [], process
            while inner is not None and inner.gi_frame is not None:
                frame = inner.gi_frame
                local = tuple((k, v) for k, v in frame.f_locals.items() if isinstance(v, int))
                chain.append((frame.f_lasti, local))
                inner = inner.gi_yieldfrom
            frames.append((tuple(chain), _plain(step)))
        spinning = tuple(sorted((who, self.ready(who)) for who in self.spinning))
        half = tuple((who, _plain(step)) for who, step in sorted(self.half.items()))
        return self.world.key(), tuple(frames), half, spinning


def _plain(step: tuple | None) -> tuple:
    return tuple(part for part in step or () if isinstance(part, int | str))


def device(posts: int, rings: bool, stops: bool = True) -> Process:
    """Posts and waits, as `mailbox` does on a GPU or on the host, and ends the workers."""
    for number in range(1, posts + 1):
        yield ("write", number)
        yield ("swap", POSTED, number)
        if rings:
            yield ("add", BELL, 1)
            yield ("wake", BELL)
        yield ("await", number)
        yield ("read", number)
    if stops:
        yield ("swap", STOP, 1)
        yield ("add", BELL, 1)
        yield ("wake", BELL)


@dataclass
class Search:
    """All states that can be come to.

    Attributes:
        helpers: beside the leader.
        rings: whether who posts rings afterwards.
        spins: workers look once more before they sleep.
        dies: a process that may end at any step, as if it had been killed or hung.
        preemptions: only interleavings in which so many times, at most, a process is stopped that
            could have gone on; None: all.
        fault: see `generators`.
        states, ends, stuck: how many were found; those in which all processes have ended, and those
            in which the device waits for an answer that does not come.
    """

    posts: int = 2
    helpers: int = 1
    rings: bool = True
    spins: bool = False
    dies: int | None = None
    preemptions: int | None = None
    fault: tuple[str, str] | None = None
    states: int = 0
    ends: int = 0
    stuck: int = 0

    def make(self) -> Run:
        arguments = [0] * 8  # the words begin at 0, and nobody spins for long
        workers = [self.module["lead"](arguments)]
        workers += [self.module["assist"](arguments) for _ in range(self.helpers)]
        return Run(World(), [*workers, device(self.posts, self.rings)]).start()

    def choices(self, run: Run, dead: bool) -> list[tuple[str, int]]:
        found = [("go", who) for who in range(len(run.processes)) if run.ready(who)]
        if not found and not self.rings:
            # Sleepers wake by themselves in the end; here only where nothing else can happen, so
            # that what needs it is seen.
            found = [("time_out", who) for who in run.world.asleep if run.pending[who]]
        if self.dies is not None and not dead and run.pending[self.dies] is not None:
            found.append(("die", self.dies))
        return found

    def replay(self, path: list[tuple[str, int]]) -> Run:
        run = self.make()
        for kind, who in path:
            self.take(run, kind, who)
        return run

    def take(self, run: Run, kind: str, who: int) -> None:
        if kind == "go":
            run.go(who)
        elif kind == "time_out":
            run.time_out(who)
        else:
            run.pending[who] = None
            run.world.asleep.discard(who)

    def run(self) -> Search:
        self.module = generators(self.fault, CHECKS=int(self.spins))
        seen: set[tuple] = set()
        stack: list[tuple[list[tuple[str, int]], int]] = [([], 0)]
        while stack:
            path, used = stack.pop()
            run = self.replay(path)
            while True:  # on with the first choice; the others later
                assert not run.world.wrong, (run.world.wrong, path)
                dead = any(kind == "die" for kind, _ in path)
                last = path[-1][1] if path else 0
                key = (run.key(), dead, last if self.preemptions is not None else 0, used)
                if key in seen:
                    break
                seen.add(key)
                choices = [(c, used + self.cost(run, last, c)) for c in self.choices(run, dead)]
                choices.sort(key=lambda choice: choice[1])
                if not choices:
                    self.finished(run, path, dead)
                    break
                stack += [
                    ([*path, choice], cost)
                    for choice, cost in choices[1:]
                    if self.preemptions is None or cost <= self.preemptions
                ]
                (choice, used) = choices[0]
                path = [*path, choice]
                self.take(run, *choice)
        self.states = len(seen)
        return self

    def cost(self, run: Run, last: int, choice: tuple[str, int]) -> int:
        """1 where a process that could go on is kept from it, if that is counted."""
        kind, who = choice
        counts = self.preemptions is not None and kind == "go" and who != last and run.ready(last)
        return int(counts)

    def finished(self, run: Run, path: list[tuple[str, int]], dead: bool) -> None:
        left = [who for who, step in enumerate(run.pending) if step is not None]
        if not left:
            self.ends += 1
            return
        assert dead, f"processes {left} wait for ever: {path}"
        # The device's wait is bounded: it gives up, and ends the workers that there are.
        poster = len(run.processes) - 1
        assert run.pending[poster] is None or run.pending[poster][0] == "await", path
        self.stuck += 1
        run.world.words[STOP] = 1
        run.world.words[BELL] += 1
        run.world.asleep.clear()
        while going := [w for w in range(poster) if run.ready(w)]:
            run.go(going[0])
        assert not any(run.pending[:poster]), f"a worker does not end: {path}"
        assert not run.world.wrong


@pytest.mark.parametrize("spins", [False, True], ids=["sleepy", "spinning"])
@pytest.mark.parametrize("rings", [True, False], ids=["rung", "polled"])
@pytest.mark.parametrize("helpers, preemptions", [(0, None), (1, 1)], ids=["alone", "helped"])
def test_every_post_is_answered_and_everybody_ends(helpers, preemptions, rings, spins) -> None:
    search = Search(helpers=helpers, rings=rings, spins=spins, preemptions=preemptions).run()
    assert search.ends and not search.stuck


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"posts": 1}, {"posts": 2, "preemptions": 3}, {"posts": 1, "helpers": 2, "preemptions": 1}],
    ids=["all", "two-posts", "two-helpers"],
)
def test_more_interleavings(options) -> None:
    search = Search(**options).run()
    assert search.ends and not search.stuck


@pytest.mark.parametrize("helpers, dies", [(0, 0), (1, 0), (1, 1)])
def test_a_worker_that_dies_gives_no_wrong_answer_and_keeps_nobody_from_ending(
    helpers, dies
) -> None:
    search = Search(helpers=helpers, posts=1, dies=dies, preemptions=2 * helpers or None).run()
    assert search.ends and search.stuck


FAULTS = {
    "answers before helpers have left": ("while load(words + TEAM) & MEMBERS:", "while False:"),
    "leaves a job open": ("add(words + TEAM, -OPEN)", "pass"),
    "sleeps without another look": (
        "if load(watched) == value and load(words + STOP) == 0:",
        "if True:",
    ),
    "looks at the bell last": (
        "sleep_on(words + BELL, bell,",
        "sleep_on(words + BELL, load(words + BELL),",
    ),
    "works on what is closed": ("if team & OPEN:", "if True:"),
    "forgets who was late": ("& ~MEMBERS", ""),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_found(fault) -> None:
    """The search is no ornament: each of these changes of the workers' code fails it."""
    with pytest.raises(AssertionError, match=r"for ever|was|worked"):
        Search(helpers=1, preemptions=4, fault=fault).run()
