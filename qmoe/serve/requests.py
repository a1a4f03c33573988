"""What requests may say: OpenAI's field names, and three more that `qmoe.generate` has.

A field that is not here is refused by name, and so is a value that would have to be ignored: a
client that asks for a tool or a JSON schema would be misled by an answer without it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOP = 4
MAX_CHOICES = 128
SMALLEST_TEMPERATURE = 0.001


def _nothing(value: Any) -> None:
    """Accept what asks for nothing: null, false, 0, an empty list or object."""
    if value:
        raise ValueError("is not supported; leave it out")


Unsupported = Annotated[None, BeforeValidator(_nothing)]
# For a completion, 0 asks for the chosen tokens' own.
NoLogprobs = Annotated[None, BeforeValidator(lambda v: _nothing(v is not None and v is not False))]
Ignored = Annotated[Any, Field(exclude=True)]


def _not_tiny(temperature: float) -> float:
    """Logits over less than this are infinite, and no probabilities."""
    if 0 < temperature < SMALLEST_TEMPERATURE:
        raise ValueError(f"must be 0 or at least {SMALLEST_TEMPERATURE}")
    return temperature


def _encodable(text: str) -> str:
    """JSON can hold half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    return text


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Ignored = None


class Request(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_not_tiny)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's, but other servers' too.
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    # What would change the answer and is not built.
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None
    logprobs: NoLogprobs = None
    # What says nothing about the answer.
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    def options(self) -> dict[str, Any]:
        """As `qmoe.generate` takes them; temperature 0 is greedy."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.temperature == 0:
            greedy = {"repetition_penalty"} & given.keys()
            return {"do_sample": False, **{name: given[name] for name in greedy}}
        if given.keys() - {"repetition_penalty"}:
            given["do_sample"] = True
        return given

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop)


def _as_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or its tokens."""
    if isinstance(value, str):
        value = [value]
    if value and _are_tokens(value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(p, str) or _are_tokens(p) for p in value):
        raise ValueError("must be a string, a list of tokens, or a list of these")
    if not value or not all(value):
        raise ValueError("is empty; give it some text")
    return [_encodable(prompt) if isinstance(prompt, str) else prompt for prompt in value]


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_as_prompts)]
    echo: Unsupported = None
    suffix: Unsupported = None
    best_of: Annotated[None, BeforeValidator(lambda v: _nothing(v if v != 1 else None))] = None


def _as_text(value: Any) -> Any:
    """A message's content: a string, or parts of text. Pictures and sound are refused."""
    if not isinstance(value, list):
        return value
    parts = [part if isinstance(part, dict) else {} for part in value]
    if not all(p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise ValueError("only text is supported: a string, or parts of the type 'text'")
    return "".join(part["text"] for part in parts)


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text), AfterValidator(_encodable)]
    name: Ignored = None
    refusal: Unsupported = None
    tool_calls: Unsupported = None

    def as_template(self) -> dict[str, str]:
        """As chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


def _only_text(value: Any) -> None:
    if value not in (None, {"type": "text"}):
        raise ValueError("only text is supported; leave it out")


def _no_tool(value: Any) -> None:
    if value not in (None, "none", "auto"):
        raise ValueError("tools are not supported; leave it out")


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Unsupported = None
    functions: Unsupported = None
    top_logprobs: Unsupported = None
    tool_choice: Annotated[None, BeforeValidator(_no_tool)] = None
    response_format: Annotated[None, BeforeValidator(_only_text)] = None
    parallel_tool_calls: Ignored = None
