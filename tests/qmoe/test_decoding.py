"""qmoe.decode beside transformers' own loop, on the same patched model.

In fp32 the two give the same tokens. In 16 bit, on a GPU, kernels that sum in another order make
near ties of experts and of tokens fall the other way now and then; there each token is compared
with what transformers would have chosen after the same text.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import re
import traceback
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, prompts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import qmoe
from qmoe.decoding import decoder
from qmoe.decoding.decoder import decoder_of
from qmoe.decoding.graph import Graphed
from qmoe.decoding.pieces import PIECES, find_pieces
from qmoe.decoding.selection import CAPTURED_PROCESSORS
from qmoe.decoding.step import DecodeStep, step_of

NEW_TOKENS = 12  # beyond a window of 8, together with a prompt or without
LENGTHS = (13, 3, 20)
GPU = pytest.mark.gpu
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
# fp16 goes where bf16 goes; once for each way of attention is enough.
IN_FP16 = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
CASES = [
    pytest.param((family, device, dtype), id=f"{family}-{device}-{name}", marks=marks)
    for device, dtype, name, marks in (
        ("cpu", FP32, "fp32", ()),
        ("cuda", FP32, "fp32", GPU),
        ("cuda", BF16, "bf16", GPU),
        ("cuda", FP16, "fp16", GPU),
    )
    for family in FAMILIES
    if dtype != FP16 or family in IN_FP16
]


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Where a fallback is expected, a test says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".* decodes (by|without)")
        yield


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each family in turn."""
    return families.build(*request.param)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def qwen3(device: str) -> PreTrainedModel:
    """In fp32; a test that changes it takes a copy."""
    return families.build("qwen3_moe", device)


@pytest.fixture
def own(qwen3: PreTrainedModel) -> PreTrainedModel:
    """A copy to change."""
    return families.copy_of(qwen3)


def batch(model: PreTrainedModel, *lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = prompts(*lengths, seed=seed)
    return ids.to(model.device), mask.to(model.device)


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """transformers' own loop, unless options say otherwise; greedy, and without an end."""
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False) | options
    return model.generate(ids, attention_mask=mask, **options)


def decode(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    return generate(model, ids, mask, custom_generate=qmoe.decode, **options)


def steps(model: Any) -> dict[tuple[int, int], DecodeStep]:
    """The kept steps, by rows and columns, the latest used last."""
    return {(step.rows, step.length): step for step in decoder_of(model).idle}


def last_step(model: Any) -> DecodeStep:
    return decoder_of(model).idle[-1]


@torch.no_grad()
def assert_greedy(found: Tensor, model: Any, ids: Tensor, mask: Tensor, **options: Any) -> None:
    columns = ids.shape[1]
    if model.dtype == FP32:
        assert found.tolist() == generate(model, ids, mask, **options).tolist()
        return
    assert torch.equal(found[:, :columns], ids)
    mask = F.pad(mask, (0, found.shape[1] - columns), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=found, attention_mask=mask, position_ids=positions, use_cache=False)
    choice = logits.logits[:, columns - 1 : -1].argmax(-1)
    # What an expert that another one has replaced leaves in the cache, later tokens see too.
    assert (choice == found[:, columns:]).float().mean() > 0.6


def count(model: Any, tokens: int) -> dict[str, int]:
    """An option: so many tokens, or enough for the share that `assert_greedy` looks at."""
    return dict(max_new_tokens=tokens if model.dtype == FP32 else 24)


def has_graph(graphed: Graphed) -> bool:
    assert graphed.trouble is None
    return graphed._graph is not None


def assert_captured(model: Any) -> None:
    assert has_graph(last_step(model)._step) == (model.device.type == "cuda")


class TestFamilies:
    def test_which_pieces_are_found(self, model, request):
        family = request.node.callspec.params["model"][0]
        found = {kind: len(find_pieces(model, [kind]).forwards) for kind in PIECES}
        linears = found.pop("linears")
        assert linears == sum(type(m) is nn.Linear for m in model.modules())
        assert {kind: n for kind, n in found.items() if n} == FAMILIES[family].found
        # All at once: one must not keep another from being recognized. Of the linears are qkv.
        together = len(find_pieces(model).forwards)
        assert together == linears + sum(n for kind, n in found.items() if kind != "qkv")
        # Qwen3-Next does not say that its attention may be any function.
        assert find_pieces(model, ["attention"]).attention == (family != "qwen3_next")

    def test_one_prompt(self, model):
        ids, mask = batch(model, 11)
        found = decode(model, ids, mask, **count(model, NEW_TOKENS))
        assert len(set(found[0, 11:].tolist())) > 3
        assert_greedy(found, model, ids, mask)
        assert_captured(model)

    def test_left_padded_batches_on_one_step(self, model):
        """Nothing of the first batch, nor its padding, is there in the second."""
        for seed, lengths in enumerate((LENGTHS, (2, 1, 7))):
            ids, mask = batch(model, *lengths, seed=seed)
            found = decode(model, ids, mask, **count(model, NEW_TOKENS))
            assert_greedy(found, model, ids, mask)
            assert_captured(model)
        assert sum(rows == 3 for rows, _ in steps(model)) == 1

    @pytest.mark.parametrize("chunk", [7, 19])
    def test_prompts_in_chunks(self, model, chunk):
        """As transformers' own chunks; one is padding only, one a single column."""
        ids, mask = batch(model, *LENGTHS, seed=3)
        options = dict(prefill_chunk_size=chunk) | count(model, 5)
        assert_greedy(decode(model, ids, mask, **options), model, ids, mask, **options)

    def test_prompts_are_rounded_up(self, model):
        """What they are rounded up with leaves no trace; a CPU does it when it is told to."""
        ids, mask = batch(model, 9, 9)
        decode(model, ids, mask, max_new_tokens=1)
        step = last_step(model)
        assert step.rounds_prompts == (step.cache.has_columns_only and model.device.type == "cuda")
        step.rounds_prompts = step.cache.has_columns_only
        for seed, columns in enumerate((32, 7, 33)):
            ids, mask = batch(model, columns, columns, seed=seed)
            options = count(model, 5)
            found = decode(model, ids, mask, **options)
            assert_greedy(found, model, ids, mask, **options)
            assert last_step(model) is step
        assert sorted(step._prompts) == ([32, 40] if step.cache.has_columns_only else [])
        if step.rounds_prompts and model.device.type == "cuda":
            run = step._prompts[32].graphed
            if model.config._attn_implementation == "eager":  # whose masks come from the host
                assert run.trouble is not None and "masking_utils" in run.trouble
            else:
                assert has_graph(run)
        step.rounds_prompts &= model.device.type == "cuda"

    def test_without_pieces(self, model):
        """Masks over all columns of the cache, as a model without an interface makes them."""
        ids, mask = batch(model, *LENGTHS)
        step = step_of(model, 3, 64, pieces=())
        step.read(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
        tokens = [step.logits.argmax(-1, keepdim=True)]
        for _ in range(NEW_TOKENS - 1):
            step.input_ids.copy_(tokens[-1])
            step.advance()
            tokens.append(step.logits.argmax(-1, keepdim=True))
        assert_greedy(torch.cat((ids, *tokens), 1), model, ids, mask)

    def test_nothing_in_a_step_asks_the_device(self, model):
        """What a graph cannot hold; on a CPU, as far as PyTorch's operations show it."""
        ids, mask = batch(model, *LENGTHS)
        step = step_of(model, 3, 64)
        step.read(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
        step.run()
        with _NoQuestions():
            step.run()

    @GPU
    def test_a_replay_equals_a_run(self, model):
        if model.device.type == "cpu":
            pytest.skip("no graphs")
        ids, mask = batch(model, *LENGTHS)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step = step_of(model, 3, 64)
        logits = {}
        for way in ("run", "replay"):
            step.read(ids, mask, positions, None)
            for token in range(4):
                step.input_ids.fill_(token + 1)
                if way == "run":
                    step.run()
                else:
                    if not has_graph(step._step):
                        step.capture()
                    step.replay()
            assert int(step.cache.columns.column) == 24
            logits[way] = step.logits.clone()
        torch.testing.assert_close(logits["replay"], logits["run"])


class _NoQuestions(TorchDispatchMode):
    """Fails where an operation's result, or its size, must be known to the host."""

    QUESTIONS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.lift_fresh.default,  # torch.tensor(...): a copy from the host
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.QUESTIONS:
            frames = traceback.extract_stack()
            # The fallback of a kernel may ask: it is not what runs on a GPU.
            if not any("qmoe_kernels" in frame.filename for frame in frames):
                where = [f"{f.filename}:{f.lineno}" for f in frames if "models" in f.filename]
                raise AssertionError(f"{function} in {where[-1:]}")
        return function(*args, **(kwargs or {}))


class Favour(LogitsProcessor):
    """Prefers tokens near a row's last one: of another class than any that is captured."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        distance = torch.arange(scores.shape[1], device=scores.device) - input_ids[:, -1:]
        return scores - distance.abs() / 20


PROCESSORS = LogitsProcessorList([Favour()])
# Of processors, by the name of the parameter.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.5,),
    "top_k": (4,),
    "top_p": (0.5,),
    "min_p": (0.1,),
    "mass": (0.5,),
    "epsilon": (0.03,),
    "suppress_tokens": (list(range(60)),),
}
OPTIONS = {
    "plain": dict(do_sample=True),
    "temperature": dict(do_sample=True, temperature=0.6),
    "top_k": dict(do_sample=True, top_k=4),
    "top_p": dict(do_sample=True, top_p=0.5),
    "min_p": dict(do_sample=True, min_p=0.2),
    "typical_p": dict(do_sample=True, typical_p=0.5),
    "cutoffs": dict(do_sample=True, epsilon_cutoff=0.03, eta_cutoff=0.03),
    "penalty": dict(do_sample=True, repetition_penalty=3.0),
    "all of them": dict(
        do_sample=True, temperature=1.5, top_k=30, top_p=0.9, repetition_penalty=1.3
    ),
    "greedy penalty": dict(repetition_penalty=3.0),
    "suppressed": dict(do_sample=True, suppress_tokens=list(range(1, 60))),
    "no bigram twice": dict(no_repeat_ngram_size=1),
    "bad words": dict(do_sample=True, bad_words_ids=[[t] for t in range(1, 50)] + [[60, 61]]),
    "own processor": dict(do_sample=True, logits_processor=PROCESSORS),
    "own and others": dict(
        do_sample=True, logits_processor=PROCESSORS, temperature=0.5, repetition_penalty=2.0
    ),
    "several of each": dict(do_sample=True, num_return_sequences=2),
}


@pytest.fixture(scope="module")
def text(qwen3: PreTrainedModel) -> tuple[Tensor, Tensor]:
    return batch(qwen3, *LENGTHS)


@pytest.fixture(scope="module")
def greedy(qwen3: PreTrainedModel, text: tuple[Tensor, Tensor]) -> Tensor:
    return generate(qwen3, *text)


@pytest.fixture(scope="module")
def plain(qwen3: PreTrainedModel, text: tuple[Tensor, Tensor]) -> Tensor:
    torch.manual_seed(1)
    return generate(qwen3, *text, **OPTIONS["plain"])


class TestOptions:
    @pytest.mark.parametrize("name", OPTIONS)
    def test_the_same_seed_gives_the_same_tokens(self, qwen3, text, greedy, plain, name):
        options = OPTIONS[name] | dict(max_new_tokens=8)
        torch.manual_seed(1)
        expected = generate(qwen3, *text, **options)
        torch.manual_seed(1)
        assert decode(qwen3, *text, **options).tolist() == expected.tolist()
        if name != "plain":  # the option matters
            without = plain if options.get("do_sample") else greedy
            assert not torch.equal(expected, without[:, : expected.shape[1]])
        assert_captured(qwen3)

    @pytest.mark.parametrize(
        "processor", CAPTURED_PROCESSORS, ids=lambda processor: processor.__name__
    )
    def test_what_is_captured_asks_the_device_nothing(self, processor):
        """On a CPU, the operations below the operations show it; a graph would refuse them."""
        takes = inspect.signature(processor.__init__).parameters
        given = next((v for k, v in ARGUMENTS.items() if k in takes), ())
        scores = torch.randn(3, 264)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            processor(*given)(prompts(3, 9, 5)[0], scores)
        ran = {event.key for event in profiled.key_averages()}
        assert ran
        assert not ran & {"aten::_local_scalar_dense", "aten::_unique", "aten::nonzero"}

    @pytest.mark.parametrize("tokens", [1, 2, 4])
    def test_the_next_call_goes_on_where_this_one_ended(self, qwen3, text, plain, tokens):
        """Though the device is a token ahead of the host when a text ends."""
        eos = plain[:, 20 : 20 + tokens].unique().tolist()
        options = dict(do_sample=True, eos_token_id=eos, pad_token_id=0)
        found = []
        for loop in (None, qmoe.decode):
            torch.manual_seed(1)
            ended = generate(qwen3, *text, custom_generate=loop, **options)
            found.append((ended.tolist(), generate(qwen3, *text, do_sample=True).tolist()))
        assert found[0] == found[1]
        assert len(found[0][0][0]) < 20 + NEW_TOKENS

    def test_a_generator_of_one_s_own(self, qwen3, text, plain, device):
        generator = torch.Generator(device).manual_seed(1)
        state = torch.random.get_rng_state()
        loop = functools.partial(qmoe.decode, generator=generator)
        assert (
            generate(qwen3, *text, do_sample=True, custom_generate=loop).tolist() == plain.tolist()
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        if device == "cuda":
            loop = functools.partial(qmoe.decode, generator=torch.Generator("cpu"))
            with pytest.raises(ValueError, match="generator is for cpu, and the model is on cuda"):
                generate(qwen3, *text, do_sample=True, custom_generate=loop)

    def test_another_seed_gives_others(self, qwen3, text, plain):
        torch.manual_seed(2)
        assert not torch.equal(decode(qwen3, *text, **OPTIONS["plain"]), plain)

    @pytest.mark.parametrize("ends", [1, 2, 3])
    def test_texts_end(self, qwen3, text, greedy, ends):
        """The ends of as many texts; a text that has ended is padded while others go on."""
        eos = [int(greedy[row, 20 + at]) for row, at in ((0, 3), (1, 5), (2, 4))][:ends]
        options = dict(eos_token_id=eos, pad_token_id=95)
        expected = generate(qwen3, *text, **options)
        assert (expected == 95).any()
        assert expected.shape[1] < 20 + NEW_TOKENS or ends < 3
        assert decode(qwen3, *text, **options).tolist() == expected.tolist()
        options |= dict(min_new_tokens=7)
        later = generate(qwen3, *text, **options)
        assert later.shape[1] >= 27
        assert decode(qwen3, *text, **options).tolist() == later.tolist()

    def test_processors_see_padding_where_a_text_has_ended(self, qwen3, text, greedy):
        class Across(LogitsProcessor):
            """Draws the second text to what stands last in the first."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                scores = scores.clone()
                scores[1, (input_ids[0, -1] * 5) % scores.shape[1]] += 300
                return scores

        options = dict(
            eos_token_id=int(greedy[0, 21]),
            pad_token_id=7,
            logits_processor=LogitsProcessorList([Across()]),
        )
        expected = generate(qwen3, *text, **options)
        assert (expected[0, 23:] == 7).all() and expected.shape[1] > 25
        assert decode(qwen3, *text, **options).tolist() == expected.tolist()

    @pytest.mark.parametrize("at", [0, 1, 4])
    @pytest.mark.parametrize("way", ["processor", "allowed tokens"])
    def test_the_caller_s_code_sees_no_text_beyond_its_end(self, qwen3, text, greedy, way, at):
        """A grammar has nothing to say there, and fails."""
        ids, mask = (tensor[:1] for tensor in text)
        eos = int(greedy[0, 20 + at])
        lengths: list[int] = []

        def allowed(row: int, tokens: Tensor) -> list[int]:
            lengths.append(len(tokens))
            return [] if eos in tokens[20:] else list(range(96))

        class Grammar(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                if not allowed(0, input_ids[0]):
                    raise RuntimeError("the text has ended")
                return scores

        options: dict[str, Any] = dict(eos_token_id=eos, pad_token_id=95)
        if way == "processor":
            options["logits_processor"] = LogitsProcessorList([Grammar()])
        else:
            options["prefix_allowed_tokens_fn"] = allowed
        expected = generate(qwen3, ids, mask, **options)
        seen = lengths.copy()
        lengths.clear()
        assert decode(qwen3, ids, mask, **options).tolist() == expected.tolist()
        assert lengths == seen

    def test_prompts_that_a_length_criterion_ends(self, qwen3, text):
        """transformers gives one token then."""
        options = dict(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(20)]))
        options |= dict(max_new_tokens=None, max_length=30)
        expected = generate(qwen3, *text, **options)
        assert expected.shape[1] == 21
        with pytest.warns(UserWarning, match="MaxLengthCriteria was given that its prompt"):
            assert decode(qwen3, *text, **options).tolist() == expected.tolist()

    def test_sampling_ends(self, qwen3, text, plain):
        options = dict(do_sample=True, eos_token_id=int(plain[1, 22]), pad_token_id=95)
        torch.manual_seed(1)
        expected = generate(qwen3, *text, **options)
        assert (expected == 95).any()
        torch.manual_seed(1)
        assert decode(qwen3, *text, **options).tolist() == expected.tolist()

    def test_stopping_criteria(self, qwen3, text):
        class Long(StoppingCriteria):
            """Row 0 ends at once, the others at 26 tokens."""

            def __call__(self, input_ids, scores, **kwargs):
                done = torch.full((len(input_ids),), input_ids.shape[1] >= 26)
                done[0] = True
                return done.to(input_ids.device)

        for criterion in (Long(), MaxTimeCriteria(0.0)):
            options = dict(stopping_criteria=StoppingCriteriaList([criterion]))
            expected = generate(qwen3, *text, **options)
            assert expected.shape[1] == (26 if isinstance(criterion, Long) else 21)
            assert decode(qwen3, *text, **options).tolist() == expected.tolist()

    @pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
    def test_few_tokens(self, qwen3, text, greedy, new_tokens):
        found = decode(qwen3, *text, max_new_tokens=new_tokens)
        assert found.tolist() == greedy[:, : 20 + new_tokens].tolist()

    def test_without_a_mask(self, qwen3):
        ids, mask = batch(qwen3, 9)
        found = qwen3.generate(ids, custom_generate=qmoe.decode, max_new_tokens=NEW_TOKENS)
        assert found.tolist() == generate(qwen3, ids, mask).tolist()

    def test_stop_strings(self, tokenizer, device):
        model = families.build("mixtral", device)
        options: dict[str, Any] = dict(max_new_tokens=30, do_sample=False)
        free = qmoe.generate(model, tokenizer, ["Hello", "a longer prompt"], **options)
        whole = free.texts[0]
        stop = next(c for i, c in enumerate(whole) if i >= 3 and c.isascii() and c not in whole[:i])
        stopped = qmoe.generate(
            model, tokenizer, ["Hello", "a longer prompt"], stop_strings=[stop], **options
        )
        assert stopped.texts[0] == whole[: whole.index(stop) + 1]
        assert stopped.new_tokens[0] < free.new_tokens[0]


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu" and not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class Interrupt(StoppingCriteria):
    """Ctrl-C when there are so many columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] == self.columns:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TestTheLoop:
    def test_streams_tokens(self, qwen3):
        ids, mask = batch(qwen3, *LENGTHS)
        streamer = Collector()
        loop = functools.partial(qmoe.decode, streamer=streamer)
        sequences = generate(qwen3, ids, mask, custom_generate=loop)
        assert streamer.puts == sequences[:, 20:].T.tolist()
        assert streamer.ended

    def test_streams_text(self, qwen3, tokenizer, capsys):
        """transformers hands the prompt to a streamer of its own; both get the same."""
        ids, mask = batch(qwen3, 9)
        printed = []
        for loop in (None, qmoe.decode):
            streamer = TextStreamer(tokenizer, skip_prompt=True)
            custom = None if loop is None else functools.partial(loop, streamer=streamer)
            generate(qwen3, ids, mask, streamer=streamer, custom_generate=custom)
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] != ""

    def test_pieces_are_the_text(self, qwen3, tokenizer):
        pieces: list[list[str]] = [[], []]
        result = qmoe.generate(
            qwen3,
            tokenizer,
            ["Hello", "a longer prompt"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stream=lambda index, piece: pieces[index].append(piece),
        )
        assert ["".join(p) for p in pieces] == result.texts
        assert all(len(p) > 3 for p in pieces)

    def test_an_interrupt_leaves_a_usable_model(self, qwen3, tokenizer):
        ids, mask = batch(qwen3, *LENGTHS)
        expected = generate(qwen3, ids, mask).tolist()
        before = decode(qwen3, ids, mask)
        for columns in (21, 22, 25):
            criteria = StoppingCriteriaList([Interrupt(columns)])
            with pytest.raises(KeyboardInterrupt):
                decode(qwen3, ids, mask, stopping_criteria=criteria)
            assert decode(qwen3, ids, mask).tolist() == expected == before.tolist()

        pieces: list[str] = []

        def stream(index: int, piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == 4:
                raise KeyboardInterrupt

        with pytest.raises(qmoe.GenerationInterrupted) as caught:
            qmoe.generate(qwen3, tokenizer, "Hello", do_sample=False, stream=stream)
        assert caught.value.result.texts == ["".join(pieces)]
        assert decode(qwen3, ids, mask).tolist() == expected
        assert_captured(qwen3)

    @pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
    def test_rows_are_rounded_up(self, family, device):
        model = families.build(family, device)
        ids, mask = batch(model, *range(1, 10))
        for do_sample in (False, True):
            options = dict(max_new_tokens=6, do_sample=do_sample)
            torch.manual_seed(1)
            expected = generate(model, ids, mask, **options)
            torch.manual_seed(1)
            assert decode(model, ids, mask, **options).tolist() == expected.tolist()
        assert [rows for rows, _ in steps(model)] == [16]

    @pytest.mark.parametrize(
        "rows, bucket", [(1, 1), (8, 8), (9, 16), (16, 16), (64, 64), (65, 128), (130, 192)]
    )
    def test_buckets(self, rows, bucket):
        assert decoder._bucket(rows) == bucket


class TestKeptSteps:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoder, "SHORTEST", 32)

    def expect(self, model: Any, *lengths: int, **options: Any) -> DecodeStep:
        """Right tokens; the step that made them."""
        ids, mask = batch(model, *lengths, seed=sum(lengths))
        expected = generate(model, ids, mask, **options).tolist()
        assert decode(model, ids, mask, **options).tolist() == expected
        assert_captured(model)
        return last_step(model)

    def test_a_step_serves_what_fits(self, own):
        step = self.expect(own, 9)
        assert (step.rows, step.length) == (1, 32)
        assert self.expect(own, 14) is step
        longer = self.expect(own, 21)
        assert (longer.rows, longer.length) == (1, 64)
        assert self.expect(own, 40) is longer
        assert self.expect(own, 9) is step
        assert self.expect(own, 9, 5) not in (step, longer)

    def test_a_length_has_a_limit(self, own):
        own.config.max_position_embeddings = 40
        assert self.expect(own, 25).length == 40
        # transformers generates beyond it, and so does the step.
        assert self.expect(own, 30).length == 42

    def test_others_make_room(self, own, monkeypatch):
        """For the cache of a prompt, or for the step after it; once, and then the error is told."""
        other, last = self.expect(own, 9, 5), self.expect(own, 9)
        for method in ("read", "advance"):
            calls = self.run_scarce(own, monkeypatch, method, other)
            assert self.expect(own, 9) is last
            monkeypatch.undo()
            assert calls[:2] == [last, last] and decoder_of(own).idle == [last]
            monkeypatch.setattr(decoder, "SHORTEST", 32)
            other = self.expect(own, 9, 5)

        def hopeless(step: DecodeStep, *arguments: Any, **options: Any) -> None:
            raise torch.OutOfMemoryError("far too little")

        with monkeypatch.context() as patched:
            patched.setattr(DecodeStep, "read", hopeless)
            with pytest.raises(torch.OutOfMemoryError, match="far too little"):
                decode(own, *batch(own, 9))
        self.expect(own, 9)

    def run_scarce(
        self, model: Any, monkeypatch: Any, method: str, other: DecodeStep
    ) -> list[DecodeStep]:
        """Let steps fail as long as ``other`` is kept; the calls, as they come."""
        works, calls = getattr(DecodeStep, method), []

        def scarce(step: DecodeStep, *arguments: Any, **options: Any) -> None:
            calls.append(step)
            if any(step is other for step in decoder_of(model).idle):
                raise torch.OutOfMemoryError("too little")
            works(step, *arguments, **options)

        monkeypatch.setattr(DecodeStep, method, scarce)
        return calls

    def test_kept_bytes_are_bounded(self, own, monkeypatch):
        for rows in range(1, 5):
            self.expect(own, *[5] * rows, max_new_tokens=4)
        assert [rows for rows, _ in steps(own)] == [1, 2, 3, 4]
        sizes = [step.num_bytes for step in steps(own).values()]
        assert sizes == sorted(sizes) and sizes[0] > 0
        self.expect(own, 5, 5, max_new_tokens=4)  # now the latest
        monkeypatch.setattr(decoder, "_bound", lambda device: sizes[1] + sizes[3])
        self.expect(own, 5, 5, 5, 5, max_new_tokens=4)
        assert [rows for rows, _ in steps(own)] == [2, 4]
        monkeypatch.setattr(decoder, "_bound", lambda device: sizes[0] - 1)
        ids, mask = batch(own, 5)
        decode(own, ids, mask, max_new_tokens=4)
        assert not steps(own)

    def test_release(self, own):
        """Without the help of the garbage collector."""
        step = weakref.ref(self.expect(own, 9))
        keys = weakref.ref(last_step(own).cache.layers[0].keys)
        gc.disable()
        try:
            qmoe.release(own)
            assert step() is None and keys() is None
        finally:
            gc.enable()
        assert decoder_of(own).known is None
        self.expect(own, 9)

    def test_release_while_a_text_comes(self, own):
        """The step in use goes on, and is not kept."""
        ids, mask = batch(own, 9)
        expected = generate(own, ids, mask).tolist()

        class Releasing(BaseStreamer):
            def put(self, value: Tensor) -> None:
                qmoe.release(own)

            def end(self) -> None:
                pass

        loop = functools.partial(qmoe.decode, streamer=Releasing())
        assert generate(own, ids, mask, custom_generate=loop).tolist() == expected
        assert not steps(own)

    def test_unpatched(self, own):
        before = self.expect(own, 9)
        qmoe.unpatch(own)
        ids, mask = batch(own, 9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' experts need not be captured
            found = decode(own, ids, mask)
        assert found.tolist() == generate(own, ids, mask).tolist()
        assert last_step(own) is not before
        assert len(steps(own)) == 1

    def test_moved_parameters(self, own):
        before = self.expect(own, 9)
        for parameter in own.parameters():
            parameter.data = parameter.data.clone()
        assert self.expect(own, 9) is not before
        assert len(steps(own)) == 1

    def test_changed_parameters(self, own):
        """In place: what was captured reads them where they are."""
        before = self.expect(own, 9)
        with torch.no_grad():
            for parameter in own.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1.05)
        assert self.expect(own, 9) is before

    def test_adapters(self, own):
        peft = pytest.importorskip("peft")
        ids, mask = batch(own, 9)
        without = decode(own, ids, mask)
        before = last_step(own)
        adapted = peft.get_peft_model(
            own,
            peft.LoraConfig(
                target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights=False
            ),
        )
        expected = generate(adapted, ids, mask)
        assert not torch.equal(expected, without)
        assert decode(adapted, ids, mask).tolist() == expected.tolist()
        assert last_step(own) is not before
        assert decode(adapted.unload(), ids, mask).tolist() == without.tolist()

    def test_a_forgotten_model_is_freed(self, qwen3):
        model = copy.deepcopy(qwen3)
        self.expect(model, 9)
        kept = last_step(model), last_step(model).cache.layers[0].keys, model.lm_head.weight
        references = [weakref.ref(thing) for thing in (model, *kept)]
        gc.collect()  # of what came before
        gc.disable()
        try:
            del model, kept
            assert [reference() for reference in references] == [None] * 4
        finally:
            gc.enable()

    def test_copies(self, own):
        before = self.expect(own, 9)
        twin = copy.deepcopy(own)
        assert not steps(twin)
        assert self.expect(twin, 9) is not before
        with torch.no_grad():
            twin.model.layers[0].self_attn.q_proj.weight.zero_()
        self.expect(twin, 9)
        assert self.expect(own, 9) is before

    def test_pickle_and_save(self, own, tmp_path):
        """Of the merged products each part is saved, with its own name."""
        self.expect(own, 9)
        again = pickle.loads(pickle.dumps(own))
        assert not steps(again)
        self.expect(again, 9)

        own.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=FP32).to(own.device)
        saved = own.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        ids, mask = batch(own, 9)
        assert decode(loaded, ids, mask).tolist() == decode(own, ids, mask).tolist()


def smallest(model: Any, **sizes: Any) -> int:
    """Bytes of the smallest budget that works."""
    with pytest.raises(ValueError, match="smallest that works") as refusal:
        qmoe.resize(model, hbm_budget=1, **sizes)
    return int(re.search(r"\((\d+) bytes\)", str(refusal.value))[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def paged(device: str) -> PreTrainedModel:
    model = families.build("qwen3_moe", device)
    sizes = dict(context=48, batch_size=4)
    qmoe.resize(model, hbm_budget=smallest(model, **sizes), **sizes)
    assert not model.qmoe_paging.budget.all_resident
    return model


class TestBudgets:
    @pytest.mark.parametrize("lengths", [LENGTHS, (9,), (5, 9)])
    def test_a_paged_model(self, paged, qwen3, lengths):
        ids, mask = batch(paged, *lengths)
        assert decode(paged, ids, mask).tolist() == generate(qwen3, ids, mask).tolist()
        assert_captured(paged)

    def test_bounds_the_tokens_held(self, paged):
        for rows in (1, 2, 4, 3, 5, 1):
            ids, mask = batch(paged, *[4] * rows)
            found = decode(paged, ids, mask, max_new_tokens=3)
            assert found.tolist() == generate(paged, ids, mask, max_new_tokens=3).tolist()
            assert sum(r * c for r, c in steps(paged)) <= 4 * 48
        # Rounded up, nine rows would be sixteen.
        ids, mask = batch(paged, *[4] * 9)
        decode(paged, ids, mask, max_new_tokens=10)
        assert list(steps(paged)) == [(9, 21)]

    def test_a_thread_waits_for_room(self, paged, monkeypatch):
        """The budget holds one of these calls at a time; a call inside one is refused."""
        ids, mask = batch(paged, *LENGTHS, 7)
        expected = generate(paged, ids, mask).tolist()
        waits, wait = [], decoder.Decoder._wait
        monkeypatch.setattr(
            decoder.Decoder, "_wait", lambda *args: (waits.append(args), wait(*args))
        )
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(decode, paged, ids, mask) for _ in range(3)]
            assert [call.result(timeout=60).tolist() for call in calls] == [expected] * 3
        assert waits

        class Nesting(Collector):
            def put(self, value: Tensor) -> None:
                with pytest.raises(ValueError, match="inside another generation: the budget has"):
                    decode(paged, ids, mask)
                super().put(value)

        streamer = Nesting()
        loop = functools.partial(qmoe.decode, streamer=streamer)
        assert generate(paged, ids, mask, custom_generate=loop).tolist() == expected
        assert len(streamer.puts) == NEW_TOKENS

    def test_resized_between_calls(self, device):
        model = families.build("qwen3_moe", device)
        ids, mask = batch(model, *LENGTHS)
        expected = generate(model, ids, mask).tolist()
        sizes = dict(context=48, batch_size=4)
        little = smallest(model, **sizes)
        seen = []
        for budget in (little, "1GiB", little):
            qmoe.resize(model, hbm_budget=budget, **sizes)
            assert decode(model, ids, mask).tolist() == expected
            assert_captured(model)
            seen.append(last_step(model))
            assert len(steps(model)) == 1
        assert len(set(map(id, seen))) == 3

    def test_resized_while_tokens_come(self, device, tokenizer):
        model = families.build("qwen3_moe", device)
        options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False)
        expected = qmoe.generate(model, tokenizer, "Hello", **options).texts
        sizes = dict(context=64, batch_size=1)
        little = smallest(model, **sizes)
        qmoe.resize(model, hbm_budget=little, **sizes)
        budgets = {4: "1GiB", 8: little, 9: "1GiB", 10: little}
        pieces: list[str] = []

        def stream(index: int, piece: str) -> None:
            pieces.append(piece)
            if len(pieces) in budgets:
                qmoe.resize(model, hbm_budget=budgets[len(pieces)], **sizes)

        assert qmoe.generate(model, tokenizer, "Hello", stream=stream, **options).texts == expected
        assert len(pieces) > 10
        assert "".join(pieces) == expected[0]
        assert qmoe.generate(model, tokenizer, "Hello", **options).texts == expected


class TestFallbacks:
    def expect(self, model: Any, match: str, **options: Any) -> None:
        """transformers' tokens, and a warning the first time only."""
        ids, mask = batch(model, *LENGTHS)
        for times in (1, 0):
            given = {k: v() if callable(v) else v for k, v in options.items()}
            expected = generate(model, ids, mask, **given)
            given = {k: v() if callable(v) else v for k, v in options.items()}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = decode(model, ids, mask, **given)
            told = [str(w.message) for w in caught if "decodes" in str(w.message)]
            assert len(told) == times
            assert all(re.search(match, text) for text in told), told
            assert type(found) is type(expected)
            if not isinstance(found, Tensor):
                found, expected = found.sequences, expected.sequences
            assert found.tolist() == expected.tolist()

    def test_offloaded(self, own):
        if own.device.type == "cpu":
            cpu_offload(own, execution_device=torch.device("cpu"))
        else:
            cpu_offload(own, execution_device=own.device)
        ids, mask = prompts(*LENGTHS)
        device = own.model.embed_tokens._hf_hook.execution_device
        ids, mask = ids.to(device), mask.to(device)
        expected = generate(own, ids, mask)
        with pytest.warns(UserWarning, match="several devices or offloaded"):
            assert decode(own, ids, mask).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        "match, options",
        [
            ("past_key_values were given", dict(past_key_values=DynamicCache)),
            ("use_cache=False", dict(use_cache=False)),
            (
                "return_dict_in_generate=True",
                dict(return_dict_in_generate=True, output_scores=True),
            ),
            (
                "cache_implementation='static'",
                dict(cache_implementation="static", disable_compile=True),
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_options(self, own, match, options):
        self.expect(own, match, **options)

    def test_embeddings(self, own):
        ids, mask = batch(own, *LENGTHS)
        embeddings = own.get_input_embeddings()(ids)
        options: dict[str, Any] = dict(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=NEW_TOKENS
        )
        expected = own.generate(**options)
        with pytest.warns(UserWarning, match="inputs_embeds were given"):
            found = own.generate(**options, custom_generate=qmoe.decode)
        assert found.tolist() == expected.tolist()

    @pytest.mark.parametrize("place", [lambda m: m, type], ids=["model", "class"])
    def test_inputs_prepared_in_a_way_of_one_s_own(self, own, monkeypatch, place):
        """As PEFT's adapters of prompts do, on the model and while it generates only."""
        before = decode(own, *batch(own, *LENGTHS))
        prepare = GenerationMixin.prepare_inputs_for_generation

        def prepared(*args: Any, **kwargs: Any) -> Any:
            args = args if place is type else (own, *args)
            inputs = prepare(*args, **kwargs)
            return inputs | {"input_ids": (inputs["input_ids"] + 1) % 264}

        monkeypatch.setattr(place(own), "prepare_inputs_for_generation", prepared)
        self.expect(own, "prepares its inputs in a way of its own")
        monkeypatch.undo()
        assert decode(own, *batch(own, *LENGTHS)).tolist() == before.tolist()

    def test_prompt_tuning(self, own):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        tuned = peft.get_peft_model(own, config).eval()
        with torch.no_grad():
            for parameter in tuned.prompt_encoder.parameters():
                parameter.normal_()
        ids, mask = batch(own, 9)
        expected = generate(tuned, ids, mask).tolist()
        with pytest.warns(UserWarning, match="prepares its inputs in a way of its own"):
            assert decode(tuned, ids, mask).tolist() == expected

    def test_a_class_that_updates_its_inputs(self, own):
        class Apart(type(own)):  # type: ignore[misc]
            """Leaves places free between new tokens."""

            def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
                updated = super()._update_model_kwargs_for_generation(*args, **kwargs)
                updated["position_ids"] = updated["position_ids"] + 3
                return updated

        ids, mask = batch(own, *LENGTHS)
        before = generate(own, ids, mask).tolist()
        own.__class__ = Apart
        expected = generate(own, ids, mask).tolist()
        assert expected != before
        with pytest.warns(UserWarning, match="updates its inputs in a way of its own"):
            assert decode(own, ids, mask).tolist() == expected

    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_a_processor_s_own_error_is_the_caller_s(self, own, at):
        class Failing(LogitsProcessor):
            calls = 0

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                self.calls += 1
                if self.calls == at + 1:
                    raise RuntimeError("cancelled")
                return scores

        ids, mask = batch(own, *LENGTHS)
        failing = Failing()
        with pytest.raises(RuntimeError, match="cancelled"):
            decode(own, ids, mask, logits_processor=LogitsProcessorList([failing]))
        assert failing.calls == at + 1
        assert decode(own, ids, mask).tolist() == generate(own, ids, mask).tolist()

    def test_beams_are_refused(self, qwen3):
        ids, mask = batch(qwen3, 5)
        with pytest.raises(ValueError, match=r"ask for .*BEAM.*leave custom_generate out"):
            decode(qwen3, ids, mask, num_beams=2)

    def test_attention_with_more_than_ours(self, own):
        """A tensor that ours would not see; noticed in the second layer of the first step."""
        attention = own.model.layers[1].self_attn

        def add(module, args, kwargs):
            return args, kwargs | {"bias_of_positions": torch.zeros(1)}

        handle = attention.register_forward_pre_hook(add, with_kwargs=True)
        ids, mask = batch(own, *LENGTHS)
        expected = generate(own, ids, mask).tolist()
        with warnings.catch_warnings():  # a GPU says that a step with hooks is not captured
            warnings.filterwarnings("ignore", message=".* a hook on Qwen3MoeAttention")
            assert decode(own, ids, mask).tolist() == expected
        assert decoder_of(own).known.shadows.steps is None
        assert decode(own, ids, mask).tolist() == expected
        handle.remove()
        assert decode(own, ids, mask).tolist() == expected

    def test_a_window_that_only_the_mask_knows(self, device):
        """Qwen2-MoE's attention calls a function that is told nothing of it."""
        sizes = families.SIZES | families.GATED
        config = Qwen2MoeConfig(
            **sizes,
            num_experts=8,
            shared_expert_intermediate_size=32,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
        torch.manual_seed(0)
        model = qmoe.patch(Qwen2MoeForCausalLM(config).eval().to(device), activations="bf16")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        ids, mask = batch(model, *LENGTHS)
        expected = generate(model, ids, mask).tolist()
        assert decode(model, ids, mask).tolist() == expected
        assert decoder_of(model).known.shadows.steps is None

    @GPU
    def test_a_model_that_waits_for_the_device(self, own, monkeypatch):
        if own.device.type == "cpu":
            pytest.skip("never waits")
        family = type(own.model.layers[1].mlp)
        forward = family.forward

        def waiting(self, hidden_states):
            return forward(self, hidden_states) * (hidden_states.sum().item() * 0 + 1)

        monkeypatch.setattr(family, "forward", waiting)
        self.expect(own, r"without a CUDA graph: test_decoding\.py:\d+ waits for the device")
        step = last_step(own)
        assert "waits for the device" in str(step.trouble)
        monkeypatch.undo()
        ids, mask = batch(own, *LENGTHS)
        assert decode(own, ids, mask).tolist() == generate(own, ids, mask).tolist()
        assert_captured(own)

    @GPU
    def test_a_model_that_cannot_be_captured(self, own, monkeypatch):
        """What no watch sees, a capture refuses: the model goes on without, and is not harmed."""
        if own.device.type == "cpu":
            pytest.skip("no graphs")
        family = type(own.model.layers[1].mlp)
        forward = family.forward

        def refusing(self, hidden_states):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("not in a graph")
            return forward(self, hidden_states)

        monkeypatch.setattr(family, "forward", refusing)
        self.expect(own, "without a CUDA graph: not in a graph")
