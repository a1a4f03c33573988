"""`qmoe serve`: OpenAI's interface on the shipped model, in process and as a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qmoe
from qmoe.generation import load_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from fastapi.testclient import TestClient  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from qmoe.serve import Settings, create_app, engine  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-moe"
PROMPT = "def close(self):"
# As the template below has it.
CHAT = "user: def close(self):\nassistant:"
MESSAGES = [{"role": "user", "content": PROMPT}]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return qmoe.load(MODEL, weights="int8", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(str(MODEL))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@contextmanager
def serving(model: Any, tokenizer: Any, **settings: Any) -> Iterator[Any]:
    """A client of an application, ``client.engine`` its engine."""
    app = create_app(model, tokenizer, Settings(**{"name": "tiny", "batch_size": 4, **settings}))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.engine = app.state.engine
        yield client


@pytest.fixture(scope="module")
def client(model: Any, tokenizer: Any) -> Iterator[Any]:
    with serving(model, tokenizer) as client:
        yield client


def complete(client: Any, path: str = "/v1/completions", **fields: Any) -> Any:
    request = {"model": "tiny", "max_tokens": 8, "temperature": 0, **fields}
    if path == "/v1/completions":
        request.setdefault("prompt", PROMPT)
    return client.post(path, json={k: v for k, v in request.items() if v is not ...})


def chunks(answer: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def expected(model: Any, tokenizer: Any, prompt: str, count: int, **options: Any) -> str:
    options = {"do_sample": False, **options}
    return qmoe.generate(model, tokenizer, prompt, max_new_tokens=count, **options).texts[0]


class TestAnswers:
    def test_a_completion(self, client, model, tokenizer) -> None:
        answer = complete(client).json()
        (choice,) = answer["choices"]
        assert choice["text"] == expected(model, tokenizer, PROMPT, 8)
        assert choice["finish_reason"] == "length"
        assert answer["usage"] == {
            "prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13
        }  # fmt: skip

    def test_prompts_may_be_many_and_tokens(self, client) -> None:
        tokens = client.engine.tokenizer(PROMPT)["input_ids"]
        texts = [PROMPT, "import os"]
        several = complete(client, prompt=texts, n=2).json()["choices"]
        assert [c["index"] for c in several] == [0, 1, 2, 3]
        one, two = (complete(client, prompt=text).json()["choices"][0]["text"] for text in texts)
        assert [c["text"] for c in several] == [one, one, two, two]
        assert complete(client, prompt=tokens).json()["choices"][0]["text"] == one
        assert complete(client, prompt=[tokens]).json()["choices"][0]["text"] == one

    def test_a_chat(self, client, model, tokenizer) -> None:
        answer = complete(client, "/v1/chat/completions", messages=MESSAGES).json()
        message = answer["choices"][0]["message"]
        assert message == {"role": "assistant", "content": expected(model, tokenizer, CHAT, 8)}
        parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
        fields = {"messages": parts, "max_tokens": ..., "max_completion_tokens": 8}
        again = complete(client, "/v1/chat/completions", **fields).json()
        assert again["choices"][0]["message"] == message

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_is_not_part_of_the_text(self, client, stream) -> None:
        whole = complete(client, max_tokens=40).json()["choices"][0]["text"]
        stop = whole[12:18]
        fields = {"max_tokens": 40, "stop": ["never there", stop], "stream": stream}
        answer = complete(client, **fields)
        if stream:
            choices = [chunk["choices"][0] for chunk in chunks(answer)]
            text, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
        else:
            text, reason = (answer.json()["choices"][0][k] for k in ("text", "finish_reason"))
        assert text == whole[: whole.index(stop)] and reason == "stop"

    def test_a_stop_string_in_the_last_token_allowed_is_the_reason(self, client) -> None:
        whole = complete(client, max_tokens=3).json()["choices"][0]["text"]
        choice = complete(client, max_tokens=3, stop=whole[-2:]).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[:-2], "stop")

    def test_the_model_s_own_defaults(self, model, tokenizer, monkeypatch) -> None:
        """Those that end texts or count them said that the server was shutting down, or failed."""
        texts = [PROMPT, "import os", "class A:"]
        alone = [expected(model, tokenizer, text, 8) for text in texts]

        def answers(**defaults: Any) -> list[tuple[str, str]]:
            with monkeypatch.context() as patch:
                for name, value in defaults.items():
                    patch.setattr(model.generation_config, name, value)
                with serving(model, tokenizer) as client:
                    choices = complete(client, prompt=texts).json()["choices"]
            return [(c["text"], c["finish_reason"]) for c in choices]

        whole = [(text, "length") for text in alone]
        assert answers(num_return_sequences=2) == whole
        # Transformers 5.17 does not give the last tokens to a streamer then.
        for (text, reason), full in zip(answers(prompt_lookup_num_tokens=2), alone, strict=True):
            assert reason == "length" and text.strip() and full.startswith(text)
        stop = alone[0][5:9]
        cut = [(t[: t.index(stop)], "stop") if stop in t else (t, "length") for t in alone]
        assert answers(stop_strings=stop) == answers(stop_strings=[stop]) == cut
        assert {reason for _, reason in answers(max_time=1e-6)} == {"length"}

    def test_a_seed_gives_the_same_text_whoever_else_asks(self, client) -> None:
        def text(seed: int | None) -> list[str]:
            answer = complete(client, temperature=1.0, seed=seed, n=2, max_tokens=12)
            return [choice["text"] for choice in answer.json()["choices"]]

        alone = text(7)
        assert alone[0] != alone[1] and alone != text(8)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(text, [7, None, 7, None]))
        assert together[0] == together[2] == alone

    def test_a_stream_says_what_it_used(self, client) -> None:
        fields = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
        *pieces, last = chunks(complete(client, "/v1/chat/completions", **fields))
        assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
        whole = complete(client, "/v1/chat/completions", messages=MESSAGES).json()
        text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)
        assert text == whole["choices"][0]["message"]["content"]

    def test_short_texts_do_not_wait_for_long_ones(self, model, tokenizer) -> None:
        with serving(model, tokenizer) as client:
            heard: dict[str, list[Any]] = {"long": [], "short": []}
            order: list[str] = []

            def listener(name: str) -> Any:
                def listen(event: Any) -> None:
                    heard[name].append(event)
                    if isinstance(event, engine.Finished):
                        order.append(f"{name} after {len(heard['long'])}")
                        done.release()

                return listen

            done = threading.Semaphore(0)
            prompt = tokenizer(PROMPT)["input_ids"]
            jobs = [
                engine.Job(prompt, count, {"do_sample": False}, None, (), listener(name))
                for name, count in (("long", 40), ("short", 3))
            ]
            client.engine.submit(jobs)
            assert all(done.acquire(timeout=30) for _ in jobs)
            assert client.engine.counts.batches == 1
            assert order[0].startswith("short") and int(order[0].split()[-1]) < 10


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": 0}, 400, "max_tokens: .* 1"),
    ({"max_tokens": "ten"}, 400, "max_tokens: .*integer"),
    ({"max_tokens": 10**9}, 400, "prompt has 5 tokens .* takes 1024"),
    ({"prompt": "word " * 3000}, 400, r"prompt has \d+ tokens .* takes 1024"),
    ({"prompt": ""}, 400, "prompt: is empty"),
    ({"prompt": []}, 400, "prompt: is empty"),
    ({"prompt": [[]]}, 400, "prompt: is empty"),
    ({"prompt": ...}, 400, "prompt: is missing"),
    ({"prompt": {"a": 1}}, 400, "prompt: must be a string"),
    ({"prompt": [1, 99999]}, 400, "token 99999; this model's are 0 to 2047"),
    ({"temperature": -1}, 400, "temperature: .* 0"),
    ({"temperature": 5}, 400, "temperature: .* 2"),
    ({"temperature": 1e-40}, 400, "temperature: must be 0 or at least 0.001"),
    ({"repetition_penalty": 1e-300}, 400, "repetition_penalty: .* 0.1"),
    ({"temperature": "hot"}, 400, "temperature: .*number"),
    ({"top_p": 0}, 400, "top_p: .* 0"),
    ({"n": 0}, 400, "n: .* 1"),
    ({"n": 100}, 400, "100 texts were asked for; at most 64"),
    ({"seed": 1e23}, 400, "seed: .*integer"),
    ({"stop": ["a"] * 5}, 400, "stop: 1 to 4 strings"),
    ({"stop": ""}, 400, "stop: 1 to 4 strings"),
    ({"logprobs": 3}, 400, "logprobs: is not supported"),
    ({"logprobs": 0}, 400, "logprobs: is not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty: is not supported"),
    ({"echo": True}, 400, "echo: is not supported"),
    ({"tools": [{}]}, 400, "tools: is not a field"),
    ({"model": "gpt-4"}, 404, "no model 'gpt-4' here; there is 'tiny'"),
    ({"model": "m" * 1000}, 404, "no model 'mmm"),
    ({"m" * 1000: 1}, 400, "mmm"),
    ({"model": ...}, 400, "model: is missing"),
]
WRONG_CHATS: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages: .* 1"),
    ({"messages": [{"role": "user"}]}, 400, r"messages\.0\.content: is missing"),
    ({"messages": [{"role": "judge", "content": "x"}]}, 400, r"messages\.0\.role"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "template refuses .*no system"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, 400, "only text"),
    ({"messages": MESSAGES, "tools": [{}]}, 400, "tools: is not supported"),
]


class TestRefusals:
    @staticmethod
    def check(answer: Any, status: int, message: str) -> None:
        import re

        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert set(error) == {"message", "type", "param", "code"}
        assert re.search(message, error["message"]), error
        assert "\n" not in error["message"] and len(error["message"]) <= 500

    def test_wrong_fields(self, client) -> None:
        for fields, status, message in WRONG:
            self.check(complete(client, **fields), status, message)
        for fields, status, message in WRONG_CHATS:
            self.check(complete(client, "/v1/chat/completions", **fields), status, message)
        assert complete(client).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path", "body", "status", "message"),
        [
            ("POST", "/v1/completions", b"{nope", 400, "not JSON"),
            ("POST", "/v1/completions", b"[1]", 400, "not a JSON object"),
            ("POST", "/v1/completions", b"", 400, "not a JSON object sent as Content-Type"),
            ("POST", "/v1/completions", b"[" * 100_000, 400, "parsing the body"),
            ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half of"),
            ("POST", "/v1/completions", b"x" * (5 << 20), 413, "larger than"),
            ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
            ("GET", "/v1/nothing", b"", 404, "Not Found"),
            ("GET", "/v1/models/gpt-4", b"", 404, "no model 'gpt-4'"),
        ],
    )
    def test_wrong_requests(self, client, method, path, body, status, message) -> None:
        headers = {"content-type": "application/json"}
        self.check(client.request(method, path, content=body, headers=headers), status, message)

    def test_a_base_model_does_not_chat(self, model) -> None:
        with serving(model, load_tokenizer(str(MODEL))) as client:
            answer = complete(client, "/v1/chat/completions", messages=MESSAGES)
            self.check(answer, 400, "tiny has no chat template.*use /v1/completions")

    def test_a_key(self, model, tokenizer) -> None:
        with serving(model, tokenizer, api_key="geheim") as client:
            for given in (None, "Bearer", "Bearer geheim2", "geheim", "Bearer é"):
                headers = {} if given is None else {"authorization": given.encode()}
                self.check(client.get("/v1/models", headers=headers), 401, "no API key")
                answer = client.post("/v1/completions", content=b"{nope", headers=headers)
                self.check(answer, 401, "no API key")
            assert client.get("/health").status_code == 200
            headers = {"authorization": "Bearer geheim"}
            assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"

    def test_an_application_whose_lifespan_does_not_run(self, model, tokenizer) -> None:
        app = create_app(model, tokenizer, Settings(name="tiny"))
        self.check(complete(TestClient(app)), 503, "lifespan did not run")

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (RuntimeError("a\nb"), 500, "RuntimeError: a b"),
            (torch.OutOfMemoryError("x"), 503, "not enough memory"),
            (ValueError("does not fit"), 400, "does not fit"),
        ],
    )
    def test_a_failure_ends_one_batch(
        self, client, monkeypatch, caplog, error, status, message, stream
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(engine, "generate", fail)
            answer = complete(client, stream=stream)
        if stream:
            line = answer.text.split("\n\n")[0].removeprefix("data: ")
            answer = SimpleNamespace(json=lambda: json.loads(line), status_code=status)
        self.check(answer, status, message)
        # Whoever runs the server sees where it failed; a client's own mistakes are not its news.
        assert bool(caplog.records) == (status >= 500)
        assert complete(client).status_code == 200


class TestManyAtOnce:
    def test_fifty_are_answered_or_told_to_come_back(self, model, tokenizer) -> None:
        prompts = [f"def f{i}(x):\n" for i in range(10)]
        texts = [expected(model, tokenizer, prompt, 6) for prompt in prompts]
        with serving(model, tokenizer, max_queue=20) as client, ThreadPoolExecutor(50) as pool:

            def ask(i: int) -> Any:
                return complete(client, prompt=prompts[i % 10], max_tokens=6)

            answers = list(pool.map(ask, range(50)))
            assert client.engine.num_waiting == 0
        refused = [answer for answer in answers if answer.status_code == 429]
        for answer in refused:
            assert answer.headers["retry-after"] and "20 may wait" in answer.text
        for i, answer in enumerate(answers):
            if answer not in refused:
                assert answer.json()["choices"][0]["text"] == texts[i % 10]
        assert len(refused) < 40

    def test_stopping_ends_what_runs_and_waits(self, model, tokenizer) -> None:
        with serving(model, tokenizer, batch_size=1) as client, ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(complete, client, max_tokens=400) for _ in range(3)]
            while not client.engine.running or client.engine.num_waiting < 2:
                time.sleep(0.01)
            client.engine.stop()
            assert [a.result(20).status_code for a in asked] == [503] * 3
            assert complete(client).status_code == 503
            assert client.get("/health").status_code == 503

    def test_those_who_left_make_room(self, model, tokenizer) -> None:
        with serving(model, tokenizer, batch_size=1, max_queue=2) as client:
            prompt = tokenizer(PROMPT)["input_ids"]
            ended = threading.Event()

            def job(count: int) -> Any:
                return engine.Job(prompt, count, {}, None, (), lambda event: ended.set())

            client.engine.submit([job(200)])
            while not client.engine.running:
                time.sleep(0.005)
            waiting = [job(5), job(5)]
            client.engine.submit(waiting)
            with pytest.raises(engine.Busy):
                client.engine.submit([job(5)])
            for one in waiting:
                one.cancel()
            assert client.engine.num_waiting == 0
            client.engine.submit([job(5), job(5)])
            assert client.engine.counts.cancelled == 2

    def test_metrics(self, tokenizer) -> None:
        paged = qmoe.load(
            MODEL, weights="int8", dtype="float32", device="cpu", hbm_budget="13MB", context=512
        )
        with serving(paged, tokenizer) as client:
            assert client.engine.context == 512
            complete(client)
            complete(client, max_tokens=0)
            client.get("/made/up")
            text = client.get("/metrics").text
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["qmoe_requests_total", "/v1/completions", "200"] == 1
        assert values["qmoe_requests_total", "/v1/completions", "400"] == 1
        assert values["qmoe_requests_total", "404", "other"] == 1
        assert values["qmoe_prompt_tokens_total",] == 5
        assert values["qmoe_new_tokens_total",] == 8
        assert values["qmoe_time_to_first_token_seconds_count",] == 1
        assert values["qmoe_waiting",] == values["qmoe_running",] == 0
        assert values["qmoe_memory_bytes",] > 0
        assert values["qmoe_experts_total", "host"] > 0 and "gpu" in text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qmoe", "serve", str(MODEL), "--device", "cpu", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(
            str(ROOT / folder) for folder in (".", "kernels", "convert"))},
    )  # fmt: skip


@pytest.mark.slow
def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of OpenAI's, one that hangs up, the port in use, and Ctrl-C in the middle."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    server = command("--port", str(port), "--weights", "int8", "--api-key", "k")
    try:
        assert server.stderr is not None
        assert f"http://127.0.0.1:{port}/v1" in server.stderr.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
        request: Any = {"model": "tiny-moe", "prompt": PROMPT, "temperature": 0}
        text = client.completions.create(**request, max_tokens=12).choices[0].text
        pieces = client.completions.create(**request, max_tokens=12, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
        if curl := shutil.which("curl"):
            sent = json.dumps({**request, "max_tokens": 12, "stream": True})
            heard = subprocess.run(
                [curl, "-sN", f"http://127.0.0.1:{port}/v1/completions", "-d", sent, "-H",
                 "Authorization: Bearer k", "-H", "Content-Type: application/json"],
                capture_output=True, text=True, timeout=60,
            ).stdout  # fmt: skip
            said = "".join(c["choices"][0]["text"] for c in chunks(SimpleNamespace(text=heard)))
            assert said == text
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny-moe", messages=MESSAGES)

        leaving = client.completions.create(**request, max_tokens=900, stream=True)
        next(iter(leaving))
        leaving.close()
        assert client.completions.create(**request, max_tokens=12).choices[0].text == text
        metrics = client.with_options(base_url=f"http://127.0.0.1:{port}").get(
            "/metrics", cast_to=str
        )
        assert "qmoe_cancelled_total 1.0" in metrics

        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: cannot listen there"):
            from qmoe.cli.serve import _bound

            _bound("127.0.0.1", port)

        cut = iter(client.completions.create(**request, max_tokens=900, stream=True))
        next(cut)
        server.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(cut)
        assert server.wait(20) == 130
        assert server.stderr.read().strip() == "qmoe: interrupted"
    finally:
        server.kill()
        server.communicate()
