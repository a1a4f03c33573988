from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qmoe.generation import (
    GenerationInterrupted,
    expert_bytes,
    generate,
    peak_resident_bytes,
)
from qmoe.text import Text
from qmoe.tools.perplexity import perplexity

PROMPTS = ["Hello", "a much longer prompt, naïve café", "x"]
TEXT = "Zoë said: 日本語 and 🤖🎉, naïve — ok\n\tdone.  Two spaces"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: a mark for spaces, single bytes for what it does not know."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abdeikmnopstwZ:,."]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: the decoder puts spaces between words and none before ## and punctuation."""
    symbols = ["[UNK]", "Two", "space", "##s", "said", ":", "ok", ",", "done", "."]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def plainly(model, tokenizer, prompt, n):
    """What transformers generates without us."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class TestTexts:
    def test_as_transformers_does(self, model, tokenizer):
        result = generate(model, tokenizer, "Hello", max_new_tokens=20, do_sample=False)
        assert result.texts == [plainly(model, tokenizer, "Hello", 20)]
        assert result.prompt_tokens == [5]

    def test_a_batch_equals_single_prompts(self, model, tokenizer):
        result = generate(model, tokenizer, PROMPTS, max_new_tokens=12, do_sample=False)
        assert result.texts == [plainly(model, tokenizer, p, 12) for p in PROMPTS]
        assert result.prompt_tokens == [len(p.encode()) for p in PROMPTS]

    def test_a_text_ends_where_its_end_of_text_stands(self, model, tokenizer):
        free = [
            generate(model, tokenizer, p, max_new_tokens=12, do_sample=False, eos_token_id=262)
            for p in PROMPTS
        ]
        # Let a token that the first text reaches early be the end of text, for all of them.
        tokens = model.generate(
            **{
                k: v
                for k, v in tokenizer(PROMPTS[0], return_tensors="pt").items()
                if k != "token_type_ids"
            },
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=262,
            pad_token_id=0,
        )[0, 5:].tolist()
        end = tokens[3]
        batch = generate(
            model, tokenizer, PROMPTS, max_new_tokens=12, do_sample=False, eos_token_id=end
        )
        assert batch.new_tokens[0] == tokens.index(end) + 1 < 12
        assert free[0].new_tokens == [12]
        assert free[0].texts[0].startswith(batch.texts[0].rstrip("\ufffd"))
        assert batch.statistics.new_tokens == sum(batch.new_tokens)

    def test_a_stop_string_ends_its_text_only(self, model, tokenizer):
        pieces: dict[int, str] = {0: "", 1: ""}

        def stream(index, piece):
            pieces[index] += piece

        # Every letter stops, so both end at different places and the batch goes on for the other.
        letters = [chr(c) for c in range(33, 80)]
        result = generate(
            model,
            tokenizer,
            PROMPTS[:2],
            max_new_tokens=40,
            do_sample=False,
            stop_strings=letters,
            stream=stream,
        )
        alone = [
            generate(model, tokenizer, p, max_new_tokens=40, do_sample=False, stop_strings=letters)
            for p in PROMPTS[:2]
        ]
        assert result.texts == [single.texts[0] for single in alone] == list(pieces.values())
        assert result.new_tokens == [single.new_tokens[0] for single in alone]
        assert result.new_tokens[0] != result.new_tokens[1]

    def test_beams_and_several_sequences(self, model, tokenizer):
        beams = generate(
            model, tokenizer, PROMPTS[:2], max_new_tokens=6, num_beams=3, num_return_sequences=2
        )
        assert len(beams.texts) == len(beams.new_tokens) == 4
        assert beams.statistics.prefill_seconds > 0
        samples = generate(
            model, tokenizer, "a", max_new_tokens=6, do_sample=True, num_return_sequences=3, seed=1
        )
        assert len(samples.texts) == 3

    def test_prompt_lookup_gives_the_same_text(self, model, tokenizer):
        pieces: list[str] = []
        result = generate(
            model,
            tokenizer,
            "abababab",
            max_new_tokens=24,
            do_sample=False,
            prompt_lookup_num_tokens=3,
            stream=lambda index, piece: pieces.append(piece),
        )
        assert result.texts == [plainly(model, tokenizer, "abababab", 24)] == ["".join(pieces)]

    def test_a_seed_repeats_and_leaves_the_random_state(self, model, tokenizer):
        state = torch.random.get_rng_state()
        texts = [
            generate(
                model,
                tokenizer,
                "Hi",
                max_new_tokens=16,
                do_sample=True,
                temperature=2.0,
                seed=seed,
            ).texts
            for seed in (7, 7, 8)
        ]
        assert texts[0] == texts[1] != texts[2]
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_chat(self, model, tokenizer):
        chatty = copy.deepcopy(tokenizer)
        chatty.chat_template = (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        chat = generate(model, chatty, "Hi", max_new_tokens=8, do_sample=False, chat=True)
        plain = generate(model, tokenizer, "<user>Hi<assistant>", max_new_tokens=8, do_sample=False)
        assert chat.texts == plain.texts
        assert chat.prompt_tokens == plain.prompt_tokens

    def test_model_and_tokenizer_stay_as_they_were(self, model, tokenizer):
        before = model.generation_config.to_dict()
        for side in ("left", "right"):
            own = copy.deepcopy(tokenizer)
            own.padding_side = side
            generate(model, own, PROMPTS, max_new_tokens=2, do_sample=True, top_k=3, seed=0)
            assert own.padding_side == side
            assert own.pad_token is None
        assert model.generation_config.to_dict() == before


class TestStream:
    @pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 3}])
    def test_pieces_join_to_the_texts(self, model, tokenizer, options):
        pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
        result = generate(
            model,
            tokenizer,
            PROMPTS,
            max_new_tokens=30,
            stream=lambda index, piece: pieces[index].append(piece),
            **options,
        )
        assert ["".join(p) for p in pieces.values()] == result.texts
        assert all(len(p) > 1 for p in pieces.values())
        assert (
            result.texts == generate(model, tokenizer, PROMPTS, max_new_tokens=30, **options).texts
        )

    @pytest.mark.parametrize(
        "make", [None, fallback_tokenizer, wordpiece_tokenizer], ids=["bytes", "fallback", "words"]
    )
    def test_no_character_is_cut(self, tokenizer, make):
        tokenizer = make() if make else tokenizer
        tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        pieces: list[str] = []
        text = Text(tokenizer, set(), [], pieces.append)
        for token in tokens:
            text.extend([token])
        text.finish()
        whole = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert "".join(pieces) == text.text == whole
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > 5

    def test_an_incomplete_character_comes_at_the_end(self, tokenizer):
        tokens = tokenizer("ab🤖")["input_ids"][:-1]
        pieces: list[str] = []
        text = Text(tokenizer, set(), [], pieces.append)
        text.extend(tokens)
        assert pieces == ["a", "b"]
        text.finish()
        assert "".join(pieces) == tokenizer.decode(tokens)

    def test_interruption_keeps_what_there_is(self, model, tokenizer):
        pieces: list[str] = []

        def stream(index, piece):
            pieces.append(piece)
            if len(pieces) == 4:
                raise KeyboardInterrupt

        with pytest.raises(GenerationInterrupted) as caught:
            generate(model, tokenizer, "Hello", max_new_tokens=500, do_sample=False, stream=stream)
        result = caught.value.result
        assert result.texts == ["".join(pieces)]
        assert 4 <= result.new_tokens[0] < 500
        assert result.statistics.new_tokens == result.new_tokens[0]


class TestStatistics:
    def test_add_up(self, model, tokenizer):
        result = generate(model, tokenizer, PROMPTS, max_new_tokens=5, do_sample=False)
        s = result.statistics
        assert s.prompt_tokens == sum(result.prompt_tokens)
        assert s.new_tokens == sum(result.new_tokens) <= 15
        assert s.prompt_tokens_per_second == pytest.approx(s.prompt_tokens / s.prefill_seconds)
        assert s.decode_tokens_per_second == pytest.approx((s.new_tokens - 3) / s.decode_seconds)
        assert s.peak_memory_kind == "process resident"
        assert s.peak_memory_bytes <= peak_resident_bytes()
        assert s.peak_memory_bytes > 50e6  # Python and torch alone are more
        assert s.expert_bytes == 2 * 8 * 3 * 64 * 32 * 4

    def test_one_token_has_no_decode_rate(self, model, tokenizer):
        result = generate(model, tokenizer, "Hi", max_new_tokens=1, do_sample=False)
        assert result.statistics.decode_tokens_per_second is None

    def test_frozen(self, model, tokenizer):
        result = generate(model, tokenizer, "Hi", max_new_tokens=1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.texts = []

    def test_bytes_of_patched_experts(self, model):
        import qmoe

        patched = qmoe.patch(copy.deepcopy(model), weights="int8")
        weights, channels = 3 * 64 * 32, 2 * 32 + 64
        assert expert_bytes(patched) == 2 * 8 * (weights + 4 * channels)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        (None, {}, "prompts is None; give a text"),
        ("", {}, "prompt 0 is empty"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a", 3], {}, "prompt 1 is a int"),
        (["a", "b\udcff"], {}, r"prompt 1 \('b\\udcff'\) is no text in UTF-8"),
        ([[1], [5, -2]], {}, "prompt 1 has the token -2, and the model has 264"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ("a", {"temprature": 0.5}, "temprature: no option"),
        ("a", {"max_length": 10}, "max_length: no option"),
        ("a", {"output_scores": True}, "output_scores: no option"),
        ("a", {"do_sample": False, "temperature": 0.5}, "temperature=0.5 has no effect without"),
        ("a", {"length_penalty": 0.5}, "length_penalty=0.5 has no effect without"),
        ("a", {"num_beams": 2, "stream": print}, "num_beams=2"),
        ("a", {"chat": True}, "no chat template"),
        ("a", {"do_sample": True, "temperature": -1.0}, "temperature"),
        ("a", {"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ("a", {"num_beams": 0}, "num_beams=0: must be a whole number, at least 1"),
        ("a", {"num_return_sequences": 0}, "num_return_sequences=0: must be"),
        ("a", {"do_sample": True, "top_p": 2}, "top_p=2: must be a number from 0 to 1"),
        ("a", {"do_sample": True, "top_k": True}, "top_k=True: must be a whole number"),
        ("a", {"do_sample": "yes"}, "do_sample='yes': must be True or False"),
        ("a", {"stop_strings": ["b", ""]}, "stop_strings=.*must be a string, or a list"),
        ("a", {"seed": 1e23}, r"seed=1e\+23: must be a whole number of at most 64 bits"),
        ("a", {"seed": 10**23}, "seed=10{23}: must be a whole number of at most 64 bits"),
    ],
)
def test_errors(model, tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompts, **options)


def test_the_tokenizer_of_another_model(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<more {i}>" for i in range(20)])
    with pytest.raises(ValueError, match=r"prompt 1 has the token 27\d, .*264 .*another model"):
        generate(model, other, ["a", "a<more 15>"])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no user') }}", "{% if %}", "{{ a.b.c }}"]
)
def test_a_chat_template_that_fails(template, model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(ValueError, match=r"the chat template failed \(.+\); write the prompt out"):
        generate(model, other, "a", chat=True)


def small_context(model, size):
    limited = copy.copy(model)
    limited.config = copy.deepcopy(model.config)
    limited.config.max_position_embeddings = size
    return limited


def test_the_context_is_not_left(model, tokenizer):
    limited = small_context(model, 16)
    with pytest.raises(ValueError, match="prompt 1 has 16 tokens, the model's context 16"):
        generate(limited, tokenizer, ["a", "b" * 16], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=8 does not fit, 4 would"):
        generate(limited, tokenizer, "b" * 12, max_new_tokens=8)
    assert generate(limited, tokenizer, "b" * 12, max_new_tokens=4).new_tokens == [4]


def test_dense_models_generate_too(tokenizer):
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=0,
    )
    result = generate(Qwen3ForCausalLM(config), tokenizer, "Hi", max_new_tokens=3)
    assert result.statistics.expert_bytes == 0


@pytest.fixture(scope="module")
def resident(model):
    import qmoe

    return qmoe.patch(copy.deepcopy(model), weights="int8")


@pytest.fixture(scope="module")
def paged(model):
    import qmoe

    paged = qmoe.patch(copy.deepcopy(model), weights="int8")
    sizes = {"context": 200, "batch_size": 2}
    with pytest.raises(ValueError) as refusal:
        qmoe.resize(paged, hbm_budget=1, **sizes)
    smallest = int(re.search(r"\((\d+) bytes\)", str(refusal.value))[1])
    budget = qmoe.resize(paged, hbm_budget=smallest, **sizes)
    assert budget.chunk == 64 and budget.num_slots == 8
    return paged


class TestBudget:
    def calls(self, model):
        """Tokens of each call of the model."""
        calls: list[tuple[int, ...]] = []
        hook = model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args: calls.append(tuple(args[0].shape))
        )
        return calls, hook

    @pytest.mark.parametrize(
        ("prompts", "expected"),
        [
            (["a" * 64], [(1, 64)]),
            (["a" * 190], [(1, 128), (1, 62)]),  # alone it may have the other's share
            (["a" * 150, "b"], [(2, 64), (2, 64), (2, 22)]),
            (["a" * 90] * 4, [(4, 32), (4, 32), (4, 26)]),
        ],
    )
    def test_long_prompts_go_in_chunks(self, paged, resident, tokenizer, prompts, expected):
        calls, hook = self.calls(paged)
        result = generate(paged, tokenizer, prompts, max_new_tokens=3, do_sample=False)
        hook.remove()
        assert calls == [*expected, (len(prompts), 1), (len(prompts), 1)]
        assert paged.generation_config.prefill_chunk_size is None
        chunk = expected[0][1]
        again = generate(
            resident,
            tokenizer,
            prompts,
            max_new_tokens=3,
            do_sample=False,
            prefill_chunk_size=chunk if len(expected) > 1 else None,
        )
        assert again.texts == result.texts

    def test_a_chunk_may_be_smaller_but_not_larger(self, paged, tokenizer):
        calls, hook = self.calls(paged)
        generate(paged, tokenizer, "a" * 40, max_new_tokens=1, prefill_chunk_size=16)
        hook.remove()
        assert calls == [(1, 16), (1, 16), (1, 8)]
        with pytest.raises(ValueError, match="prefill_chunk_size=129: the budget has room for 128"):
            generate(paged, tokenizer, "a" * 150, max_new_tokens=1, prefill_chunk_size=129)

    def test_what_does_not_fit_is_refused(self, paged, tokenizer):
        with pytest.raises(ValueError, match=r"1 texts of 350 \+ 51 .* room for 2 of 200; .*=401"):
            generate(paged, tokenizer, "a" * 350, max_new_tokens=51)
        with pytest.raises(ValueError, match="batch_size=3"):
            generate(paged, tokenizer, ["a" * 100] * 3, max_new_tokens=40)
        with pytest.raises(ValueError, match="batch_size=6"):
            generate(paged, tokenizer, ["a" * 10] * 2, max_new_tokens=60, num_beams=3)
        generate(paged, tokenizer, "a" * 350, max_new_tokens=3)


class TestPerplexity:
    def test_of_a_uniform_model_is_the_vocabulary(self, model, tokenizer):
        uniform = copy.deepcopy(model)
        torch.nn.init.zeros_(uniform.lm_head.weight)
        assert perplexity(uniform, tokenizer, "abc" * 30, window=8) == pytest.approx(264, rel=1e-5)

    def test_counts_each_window_alone(self, model, tokenizer):
        text = "The quick brown fox jumps over it"  # 33 tokens: 4 windows of 8, one token left
        ids = torch.tensor(tokenizer(text)["input_ids"])
        losses = []
        for window in ids[:32].view(4, 8):
            logits = model(window[None]).logits[0, :-1].double()
            losses += (-logits.log_softmax(-1)[range(7), window[1:]]).tolist()
        expected = torch.tensor(losses).mean().exp().item()
        assert perplexity(model, tokenizer, text, window=8) == pytest.approx(expected, rel=1e-4)
        assert perplexity(model, tokenizer, text, window=8, batch_size=3) == pytest.approx(
            expected, rel=1e-4
        )
        assert perplexity(
            model, tokenizer, text + "tail", window=8, max_tokens=32
        ) == pytest.approx(expected, rel=1e-4)

    def test_a_text_shorter_than_a_window(self, model, tokenizer):
        short = perplexity(model, tokenizer, "The quick", window=32)
        assert short == pytest.approx(perplexity(model, tokenizer, "The quick", window=9))

    def test_errors(self, model, tokenizer):
        with pytest.raises(ValueError, match="at least 2"):
            perplexity(model, tokenizer, "a")
        with pytest.raises(ValueError, match="window=1"):
            perplexity(model, tokenizer, "abc", window=1)
        with pytest.raises(ValueError, match="window=32"):
            perplexity(small_context(model, 16), tokenizer, "abc", window=32)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("sample", [False, True])
def test_until_ends_texts_one_by_one(model, tokenizer, device, sample):
    model = copy.deepcopy(model).to(device)
    options = dict(max_new_tokens=12, do_sample=sample, seed=3 if sample else None)
    seen: dict[int, list[int]] = {}

    def note(index, tokens):
        seen[index] = list(tokens)
        return False

    whole = generate(model, tokenizer, PROMPTS, until=note, **options)
    assert [len(seen[i]) for i in range(3)] == whole.new_tokens
    ends = [3, 12, 7]
    pieces = ["", "", ""]

    def stream(index, piece):
        pieces[index] += piece

    def until(index, tokens):
        assert list(tokens) == seen[index][: len(tokens)] and len(tokens) <= ends[index]
        return len(tokens) == ends[index]

    for listener in (None, stream):
        cut = generate(model, tokenizer, PROMPTS, until=until, stream=listener, **options)
        assert cut.new_tokens == [min(a, b) for a, b in zip(ends, whole.new_tokens, strict=True)]
        for i, (text, full) in enumerate(zip(cut.texts, whole.texts, strict=True)):
            assert full.startswith(text.rstrip("\ufffd")), i
            assert listener is None or pieces[i] == text
    # The longest one decides how long the others go on.
    one = generate(model, tokenizer, PROMPTS[0], until=lambda i, t: len(t) == 2, **options)
    assert one.new_tokens == [2]
    with pytest.raises(ValueError, match="until with num_beams=2"):
        generate(model, tokenizer, "Hello", until=until, num_beams=2)


def test_prompts_may_be_tokens(model, tokenizer):
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=4, do_sample=False).texts
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert generate(model, tokenizer, tokens, max_new_tokens=4, do_sample=False).texts == texts
    for wrong, message in (([1, 2], "prompt 0 is a int"), ([[]], "prompt 0 is empty")):
        with pytest.raises(ValueError, match=message):
            generate(model, tokenizer, wrong)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="chat needs text"):
        generate(model, chatty, tokens, chat=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(model, tokenizer):
    import qmoe

    patched = qmoe.patch(copy.deepcopy(model).to("cuda", torch.bfloat16), weights="int8")
    state = torch.cuda.get_rng_state()
    pieces: list[str] = []
    results = [
        generate(
            patched,
            tokenizer,
            "Hello",
            max_new_tokens=16,
            do_sample=True,
            seed=1,
            stream=lambda index, piece: pieces.append(piece),
        )
        for _ in range(2)
    ]
    assert results[0].texts == results[1].texts
    assert "".join(pieces) == results[0].texts[0] * 2
    assert torch.equal(torch.cuda.get_rng_state(), state)
    statistics = results[0].statistics
    assert statistics.peak_memory_kind == "cuda allocated"
    assert statistics.peak_memory_bytes >= sum(p.nbytes for p in patched.parameters())
    assert statistics.expert_bytes == expert_bytes(patched)
