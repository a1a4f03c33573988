"""Several generations at once, one inside another, and Ctrl-C at any moment."""

from __future__ import annotations

import copy
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import qmoe.text
from qmoe.decoding.loop import decode
from qmoe.experts.guard import guard_of
from qmoe.generation import GenerationInterrupted, _Call, generate
from qmoe.seeds import Draws

OPTIONS = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 16}
BEAMS = {**OPTIONS, "num_beams": 2}


def as_torch_seeds(model, tokenizer, prompt, seed, **options):
    """What transformers generates where torch's own random state is seeded."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
        )
    return tokenizer.decode(rows[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class TestSeeds:
    @pytest.mark.parametrize("options", [OPTIONS, BEAMS], ids=["sample", "beams"])
    def test_as_if_torch_were_seeded(self, model, tokenizer, options):
        result = generate(model, tokenizer, "Hello", seed=5, **options)
        assert result.texts == [as_torch_seeds(model, tokenizer, "Hello", 5, **options)]

    def test_qmoe_s_loop_draws_the_same(self, model, tokenizer):
        draws = Draws(5)
        loop = partial(decode, generator=draws.generator(torch.device("cpu")))
        before = torch.random.get_rng_state()
        with draws:
            ids = torch.tensor([tokenizer("Hello")["input_ids"]])
            rows = model.generate(ids, custom_generate=loop, **OPTIONS)
        assert torch.equal(torch.random.get_rng_state(), before)
        text = tokenizer.decode(rows[0, 5:], skip_special_tokens=True)
        assert [text] == generate(model, tokenizer, "Hello", seed=5, **OPTIONS).texts

    @pytest.mark.parametrize("options", [OPTIONS, BEAMS], ids=["sample", "beams"])
    def test_torch_s_own_state_is_not_touched(self, model, tokenizer, options, monkeypatch):
        before = torch.random.get_rng_state()
        for setter in ("manual_seed", "set_rng_state", "seed"):
            monkeypatch.setattr(torch, setter, None)
            monkeypatch.setattr(torch.random, setter, None)
        generate(model, tokenizer, "Hello", seed=5, **options)
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize("options", [OPTIONS, BEAMS], ids=["sample", "beams"])
    def test_threads_do_not_mix_their_draws(self, model, tokenizer, options):
        def texts(seed):
            return [generate(model, tokenizer, "Hello", seed=seed, **options).texts for _ in "12"]

        seeds = [1, 2, 3, 1]
        in_turn = [texts(seed) for seed in seeds]
        with ThreadPoolExecutor(len(seeds)) as pool:
            together = list(pool.map(texts, seeds))
        assert together == in_turn
        assert in_turn[0] == in_turn[3] != in_turn[1]

    def test_draws_of_others_do_not_disturb(self, model, tokenizer):
        expected = generate(model, tokenizer, "Hello", seed=5, **OPTIONS).texts
        stop = threading.Event()

        def draw():
            while not stop.is_set():
                generate(model, tokenizer, "x", do_sample=True, max_new_tokens=2)
                torch.rand(3)

        other = threading.Thread(target=draw)
        other.start()
        try:
            for _ in range(5):
                assert generate(model, tokenizer, "Hello", seed=5, **OPTIONS).texts == expected
        finally:
            stop.set()
            other.join()

    @pytest.mark.parametrize(
        "draw",
        [
            lambda: torch.rand(5),
            lambda: torch.randn(5, dtype=torch.float64),
            lambda: torch.randint(100, (5,)),
            lambda: torch.randperm(5),
            lambda: torch.normal(torch.zeros(5)),
            lambda: torch.bernoulli(torch.full((5,), 0.5)),
            lambda: torch.multinomial(input=torch.ones(5), num_samples=3),
            lambda: torch.ones(5).multinomial(3),
            lambda: torch.empty(5).uniform_(),
            lambda: torch.empty(5).normal_(),
            lambda: torch.empty(5).exponential_(),
            lambda: torch.empty(5).bernoulli_(0.5),
        ],
    )
    def test_every_draw_is_that_of_torch(self, draw):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = [draw(), draw()]
        before = torch.random.get_rng_state()
        with Draws(3):
            drawn = [draw(), draw()]
        assert all(map(torch.equal, drawn, expected))
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_generator_that_is_given_is_used(self):
        with Draws(3):
            drawn = torch.rand(5, generator=torch.Generator().manual_seed(8))
        assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(8)))

    def test_dropout_knows_no_seed(self, model, tokenizer):
        training = copy.deepcopy(model).train()
        generate(training, tokenizer, "Hello", seed=5, **OPTIONS)  # its dropout is 0
        training.model.layers[0].input_layernorm.p = torch.ones(2)  # no rate of dropout
        training.model.layers[0].self_attn.attention_dropout = 0.1
        with pytest.raises(ValueError, match=r"seed=5: .* call model.eval\(\) first"):
            generate(training, tokenizer, "Hello", seed=5, **OPTIONS)
        generate(training, tokenizer, "Hello", **OPTIONS)


class TestOneInsideAnother:
    @pytest.mark.parametrize("inner", [{"seed": 9}, {}, {"num_beams": 2, "seed": 9}])
    def test_from_a_stream(self, model, tokenizer, inner):
        expected = generate(model, tokenizer, "Hello", seed=5, **OPTIONS)
        inner = {**OPTIONS, "max_new_tokens": 6, **inner}
        alone = generate(model, tokenizer, "x", **{**inner, "seed": 9})
        found = []
        pieces = []

        def stream(index, piece):
            pieces.append(piece)
            torch.rand(3)
            found.append(generate(model, tokenizer, "x", **inner))

        result = generate(model, tokenizer, "Hello", seed=5, stream=stream, **OPTIONS)
        assert result.texts == expected.texts == ["".join(pieces)]
        assert len(found) > 2
        if "seed" in inner:
            assert {text for one in found for text in one.texts} == set(alone.texts)
        else:  # not the outer one's draws again and again
            assert len({one.texts[0] for one in found}) > 2

    def test_what_a_stream_draws_is_torch_s(self, model, tokenizer):
        drawn = []

        def stream(index, piece):
            drawn.append(torch.rand(1))

        with torch.random.fork_rng():
            torch.manual_seed(2)
            generate(model, tokenizer, "Hello", seed=5, stream=stream, **OPTIONS)
            torch.manual_seed(2)
            assert torch.equal(torch.cat(drawn), torch.rand(len(drawn)))

    def test_an_inner_interrupt_ends_both(self, model, tokenizer):
        def interrupt(index, piece):
            raise KeyboardInterrupt

        def stream(index, piece):
            generate(model, tokenizer, "x", max_new_tokens=4, stream=interrupt)

        with pytest.raises(GenerationInterrupted) as caught:
            generate(model, tokenizer, "Hello", max_new_tokens=8, stream=stream)
        assert caught.value.result.prompt_tokens == [5]
        assert caught.value.result.new_tokens[0] >= 1

    def test_the_model_is_not_changed_meanwhile(self, model, tokenizer):
        own = copy.deepcopy(model)

        refused = []

        def change(index, piece):
            try:
                with guard_of(own).changing("qmoe.patch"):
                    pass
            except RuntimeError as error:
                refused.append(str(error))

        generate(own, tokenizer, "Hello", max_new_tokens=4, do_sample=False, stream=change)
        assert refused and refused[0].startswith("qmoe.patch: the model is generating")
        with guard_of(own).changing("qmoe.patch"):  # afterwards it may
            pass


class TestInterrupts:
    ROUNDS = 100

    def test_at_any_moment(self, model, tokenizer):
        """SIGVTALRM as Ctrl-C: it strikes in our code, in transformers' and in torch's."""
        options = {**OPTIONS, "max_new_tokens": 6, "stop_strings": ["\x00\x00"]}
        prompts = ["Hello", "naïve"]
        whole = generate(model, tokenizer, prompts, seed=5, **options)
        took = []
        for _ in range(3):  # once alone may be slow, and most interrupts would come too late
            started = time.process_time()
            generate(model, tokenizer, prompts, seed=5, **options)
            took.append(time.process_time() - started)
        seconds = min(took)
        before = torch.random.get_rng_state()
        depth = torch._C._len_torch_function_stack()
        randoms = random.Random(0)
        inside = False

        def interrupt(signum, frame):
            if inside:
                raise KeyboardInterrupt

        cut = 0
        old = signal.signal(signal.SIGVTALRM, interrupt)
        try:
            for _ in range(self.ROUNDS):
                signal.setitimer(signal.ITIMER_VIRTUAL, randoms.uniform(1e-5, 1.5 * seconds))
                result = None
                try:
                    inside = True
                    result = generate(
                        model, tokenizer, prompts, seed=5, stream=lambda i, p: None, **options
                    )
                    inside = False
                except KeyboardInterrupt as error:  # a plain one: before it began
                    inside = False
                    if isinstance(error, GenerationInterrupted):
                        cut += 1
                        self.check(error.result, whole)
                else:
                    assert result.texts == whole.texts
                assert torch.is_grad_enabled()
                assert torch._C._len_torch_function_stack() == depth
                assert torch.equal(torch.random.get_rng_state(), before)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, old)
        assert cut > self.ROUNDS // 5
        assert generate(model, tokenizer, prompts, seed=5, **options).texts == whole.texts

    def test_where_torch_has_taken_a_mode_off(self, model, tokenizer):
        """torch takes a mode off its stack while the mode looks at a function."""
        from torch.overrides import BaseTorchFunctionMode

        def cut(index, piece):
            torch._C._pop_torch_function_stack()
            raise KeyboardInterrupt

        with BaseTorchFunctionMode() as mode:
            with pytest.raises(GenerationInterrupted):
                generate(model, tokenizer, "Hello", seed=5, stream=cut, **OPTIONS)
            assert torch.overrides._get_current_function_mode_stack() == [mode]

    @staticmethod
    def check(result, whole):
        for text, full, count in zip(result.texts, whole.texts, result.new_tokens, strict=True):
            assert full.startswith(text.rstrip("\ufffd")), (text, full)
            assert count <= max(whole.new_tokens)
        statistics = result.statistics
        assert statistics.new_tokens == sum(result.new_tokens)
        assert statistics.prefill_seconds >= 0 and statistics.decode_seconds >= 0

    @pytest.mark.parametrize("name", ["run", "finish", "result"])
    @pytest.mark.parametrize("late", [False, True])
    def test_in_each_part(self, model, tokenizer, monkeypatch, name, late):
        original = getattr(_Call, name)
        calls = []

        def interrupted(self):
            calls.append(name)
            if len(calls) > 1:
                return original(self)
            if late:
                original(self)
            raise KeyboardInterrupt

        whole = generate(model, tokenizer, "Hello", max_new_tokens=4, do_sample=False)
        monkeypatch.setattr(_Call, name, interrupted)
        with pytest.raises(GenerationInterrupted) as caught:
            generate(model, tokenizer, "Hello", max_new_tokens=4, do_sample=False)
        done = name != "run" or late
        assert caught.value.result.texts == (whole.texts if done else [""])
        assert caught.value.result.new_tokens == (whole.new_tokens if done else [0])

    def test_in_the_middle_of_a_piece(self, model, tokenizer):
        """At every line of the streaming: a text never has a piece twice, or with a hole."""
        whole = generate(model, tokenizer, "Hello", max_new_tokens=8, do_sample=False).texts[0]

        def lines(at):
            count = [0]

            def trace(frame, event, argument):
                if frame.f_code.co_filename != qmoe.text.__file__:
                    return None
                if event == "line":
                    count[0] += 1
                    if count[0] == at:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                return trace

            return trace, count

        trace, total = lines(None)
        sys.settrace(trace)
        try:
            generate(model, tokenizer, "Hello", max_new_tokens=8, stream=lambda i, p: None)
        finally:
            sys.settrace(None)
        assert total[0] > 50
        for at in range(1, total[0] + 1, 3):
            trace, _ = lines(at)
            sys.settrace(trace)
            try:
                with pytest.raises(KeyboardInterrupt) as caught:
                    generate(model, tokenizer, "Hello", max_new_tokens=8, stream=lambda i, p: None)
            finally:
                sys.settrace(None)
            if isinstance(caught.value, GenerationInterrupted):
                assert whole.startswith(caught.value.result.texts[0].rstrip("\ufffd"))
