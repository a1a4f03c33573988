"""The application: it checks requests, hands jobs to the engine, and answers in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from qmoe.serve.edge import Edge
from qmoe.serve.engine import Engine, Event, Finished, Job
from qmoe.serve.errors import Refused, refusal_of, refusal_of_fields
from qmoe.serve.metrics import Metrics
from qmoe.serve.requests import MAX_STOP, ChatRequest, CompletionRequest, Request

SECONDS_BETWEEN_LOOKS = 0.5  # for a client that waits for a whole answer, and may have left


@dataclass(frozen=True)
class Settings:
    """How requests are served.

    Attributes:
        name: what requests call the model.
        api_key: that requests must have; None: none.
        batch_size: texts at a time, at most.
        max_queue: texts that may wait; more get 429.
        max_tokens: of a chat's answer where the request names no number.
    """

    name: str
    api_key: str | None = None
    batch_size: int = 8
    max_queue: int = 64
    max_tokens: int = 2048


def create_app(model: Any, tokenizer: Any, settings: Settings) -> FastAPI:
    """An ASGI application that serves a model; its engine runs while the application does.

    Args:
        model: loaded and in evaluation mode, patched or not. Nobody else should use it meanwhile.
        tokenizer: its own.
        settings: how requests are served.

    Returns:
        The application; ``app.state.engine`` is its engine.
    """
    engine = Engine(model, tokenizer, settings.batch_size, settings.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    app = FastAPI(title="qmoe", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    metrics = Metrics(engine)
    _answer_errors(app)
    app.include_router(_open_routes(engine, metrics))
    server = _Server(engine, tokenizer, settings, metrics)
    app.include_router(server.router())
    app.add_middleware(Edge, metrics=metrics)
    return app


def _needing(api_key: str | None) -> type[APIRoute]:
    """Routes that ask for the key first: before a stranger's body is read."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def checked(request: HttpRequest) -> Response:
                given = request.headers.get("authorization", "").encode()
                wanted = given if api_key is None else f"Bearer {api_key}".encode()
                if not secrets.compare_digest(given, wanted):
                    raise Refused(
                        401, "no API key, or another one; send 'Authorization: Bearer KEY'",
                        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                    )  # fmt: skip
                return await answer(request)

            return checked

    return Route


def _answer_errors(app: FastAPI) -> None:
    """Answer whatever goes wrong with one JSON error."""

    def answer(refused: Refused) -> JSONResponse:
        return JSONResponse(refused.body(), refused.status, refused.headers)

    @app.exception_handler(Refused)
    async def refuse(request: HttpRequest, error: Refused) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return answer(refusal_of_fields(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: HttpRequest, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return answer(Refused(error.status_code, message, headers=dict(error.headers or {})))


def _open_routes(engine: Engine, metrics: Metrics) -> APIRouter:
    """What needs no key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        if engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503)

    @router.get("/metrics")
    def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


class _Server:
    """The routes that generate."""

    def __init__(
        self, engine: Engine, tokenizer: Any, settings: Settings, metrics: Metrics
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.settings, self.metrics = settings, metrics
        self.started = int(time.time())

    def router(self) -> APIRouter:
        """Their paths."""
        router = APIRouter(prefix="/v1", route_class=_needing(self.settings.api_key))
        router.get("/models")(self.models)
        router.get("/models/{name:path}")(self.model)
        router.post("/completions")(self.completions)
        router.post("/chat/completions")(self.chat)
        return router

    async def models(self) -> dict[str, Any]:
        """The one model that there is."""
        return {"object": "list", "data": [await self.model(self.settings.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """What is known of it."""
        self._check_model(name)
        about = {"id": name, "object": "model", "created": self.started, "owned_by": "qmoe"}
        return {**about, "max_model_len": self.engine.context}

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue texts."""
        self._check_model(body.model)
        tokens = [self._tokens(p) if isinstance(p, str) else p for p in body.prompt]
        wanted = 16 if body.max_tokens is None else body.max_tokens  # as OpenAI's
        answer = _Answer("text_completion", "cmpl", self.settings.name, tokens, body)
        return await self._answer(answer, wanted, http)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refused(
                400,
                f"{self.settings.name} has no chat template: it is no chat model; use "
                "/v1/completions",
                param="messages",
            )
        messages = [message.as_template() for message in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the model's
            reason = " ".join(str(error).split())[:200]
            raise Refused(
                400, f"messages: the model's chat template refuses them ({reason})",
                param="messages",
            ) from None  # fmt: skip
        tokens = self._tokens(text, special=False)
        wanted = body.max_completion_tokens or body.max_tokens
        if wanted is None:
            room = None if self.engine.context is None else self.engine.context - len(tokens)
            most = self.settings.max_tokens
            wanted = most if room is None else max(1, min(most, room))
        answer = _Answer("chat.completion", "chatcmpl", self.settings.name, [tokens], body)
        return await self._answer(answer, wanted, http)

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise Refused(
                404, f"there is no model {name!r} here; there is {self.settings.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def _tokens(self, text: str, special: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids:
            raise Refused(400, "prompt: has no tokens; give it some text", param="prompt")
        return ids

    async def _answer(self, answer: _Answer, max_tokens: int, http: HttpRequest) -> Response:
        body = answer.body
        self._check(answer, max_tokens)
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[Event], None]:
            def listen(event: Event) -> None:
                with suppress(RuntimeError):  # the server has ended meanwhile
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return listen

        options = body.options()
        seeded = body.seed is not None and options.get("do_sample", self.engine.samples)
        jobs = [
            Job(
                prompt=answer.prompts[index // (body.n or 1)],
                max_tokens=max_tokens,
                options=options,
                # Each choice draws otherwise, and the same again in the next request.
                seed=(body.seed or 0) + index if seeded else None,
                stop=body.stops(),
                listener=listener(index),
            )
            for index in range(answer.num_choices)
        ]
        try:
            self.engine.submit(jobs)
        except Exception as error:
            raise refusal_of(error) from None
        collected = self._collect(jobs, events)
        if body.stream:
            lines = self._stream(answer, jobs, collected)
            return StreamingResponse(
                lines, media_type="text/event-stream",
                # A proxy in front would gather the pieces.
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        async for index, event in _while_connected(http, jobs, collected):
            answer.take(index, event)
        return JSONResponse(answer.whole())

    def _check(self, answer: _Answer, max_tokens: int) -> None:
        """Refuse what cannot be generated, before it waits for its turn."""
        body, context = answer.body, self.engine.context
        if len(body.stops()) > MAX_STOP or not all(body.stops()):
            raise Refused(400, f"stop: 1 to {MAX_STOP} strings that are not empty", param="stop")
        if answer.num_choices > self.settings.max_queue:
            raise Refused(
                400, f"{answer.num_choices} texts were asked for; at most "
                f"{self.settings.max_queue} may wait here", param="n",
            )  # fmt: skip
        vocabulary = self.engine.vocabulary
        for prompt in answer.prompts:
            strange = next((t for t in prompt if not 0 <= t < vocabulary), None)
            if strange is not None:
                message = f"prompt: has the token {strange}; this model's are 0 to {vocabulary - 1}"
                raise Refused(400, message, param="prompt")
            if context is not None and len(prompt) + max_tokens > context:
                raise Refused(
                    400, f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}: "
                    f"together {len(prompt) + max_tokens}, and this model takes {context}",
                    code="context_length_exceeded",
                )  # fmt: skip

    async def _collect(
        self, jobs: Sequence[Job], events: asyncio.Queue[tuple[int, Event]]
    ) -> AsyncIterator[tuple[int, Event]]:
        """Yield events until all jobs have ended; an error ends it, and all jobs."""
        left = len(jobs)
        try:
            while left:
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, Finished)
                yield index, event
            first = min(job.first_token or job.asked for job in jobs)
            self.metrics.first_token.observe(first - jobs[0].asked)
            self.metrics.seconds.observe(time.monotonic() - jobs[0].asked)
        finally:
            for job in jobs:
                job.cancel()

    async def _stream(
        self, answer: _Answer, jobs: Sequence[Job], collected: AsyncIterator[tuple[int, Event]]
    ) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            for chunk in answer.beginning():
                yield _line(chunk)
            async for index, event in collected:
                yield _line(answer.chunk(index, event))
            if answer.body.stream_options and answer.body.stream_options.include_usage:
                yield _line(answer.usage_chunk())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _line(refusal_of(error).body())
        finally:
            # Also where the client has gone before the first event was asked for.
            for job in jobs:
                job.cancel()


def _line(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _while_connected(
    http: HttpRequest, jobs: Sequence[Job], collected: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    """Yield events; cancel the jobs of a client that has gone away."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        for job in jobs:
            job.cancel()

    watcher = asyncio.create_task(watch())
    waiting: asyncio.Task[Any] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(collected))
            await asyncio.wait({waiting, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done() and not waiting.done():
                raise Refused(499, "the client went away")
            try:
                yield waiting.result()
            except StopAsyncIteration:
                return
            except Refused:
                raise
            except Exception as error:
                raise refusal_of(error) from error
    finally:
        watcher.cancel()
        if waiting is not None:
            waiting.cancel()


class _Answer:
    """One request's answer as it grows: whole, or in chunks."""

    def __init__(
        self, kind: str, prefix: str, model: str, prompts: list[list[int]], body: Request
    ) -> None:
        self.kind, self.model, self.prompts, self.body = kind, model, prompts, body
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.num_choices = len(prompts) * (body.n or 1)
        self.texts = [""] * self.num_choices
        self.ends: list[Finished | None] = [None] * self.num_choices

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def take(self, index: int, event: Event) -> None:
        """Add a piece, or an end, to a choice."""
        if isinstance(event, str):
            self.texts[index] += event
        elif isinstance(event, Finished):
            self.ends[index] = event

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, (text, end) in enumerate(zip(self.texts, self.ends, strict=True)):
            message = {"role": "assistant", "content": text}
            what: dict[str, Any] = {"message": message} if self.is_chat else {"text": text}
            choices.append(self._choice(index, end.reason if end else None, what))
        return {**self._frame(self.kind), "choices": choices, "usage": self._usage()}

    def beginning(self) -> list[dict[str, Any]]:
        """The chunks before the text."""
        if not self.is_chat:
            return []
        start = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(i, None, start)]) for i in range(self.num_choices)]

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The chunk for a piece or an end."""
        self.take(index, event)
        text = event if isinstance(event, str) else ""
        reason = event.reason if isinstance(event, Finished) else None
        delta = {"content": text} if text else {}
        what: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": text}
        return self._chunk([self._choice(index, reason, what)])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where the numbers of tokens were asked for."""
        return {**self._chunk([]), "usage": self._usage()}

    def _choice(self, index: int, reason: str | None, what: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **what, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._frame(self.kind + ".chunk" * self.is_chat), "choices": choices}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        new = sum(end.new_tokens for end in self.ends if end is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }
