"""What a request may say, in OpenAI's form. Unknown parameters are refused: ignored, they would be believed."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lab.core import InputError, SamplingParams
from lab.serve.client import Limits
from lab.serve.errors import ApiError, wrong

MAX_STOP = 256  # characters of a stop string
MAX_KEYS = 100  # of an object: each that is not known is named
MAX_SEED = 9_223_372_036_854_776_000  # OpenAI's; the few that 64 bits do not hold are folded into them
DEFAULT_TOKENS = 16  # of a completion, where nobody says: OpenAI's; a chat goes on to the end


def whole(text: str) -> str:
    """JSON can write half of a character outside the first 65,536, which is no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has half of a surrogate pair: send whole characters")
    return text


Text = Annotated[str, AfterValidator(whole)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP), AfterValidator(whole)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Json = dict[str, Any]
T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]  # to name each of a million wrong items holds up everybody else


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"{len(value)} parameters, more than there are: leave out what this server does not know")
        return value


class StreamOptions(Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # not OpenAI's: the usage so far, in every chunk
    include_obfuscation: bool | None = None  # none is added, whatever this says


class Sampling(Model):
    """What both APIs have in common."""

    model: str = Field(max_length=1000)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, lt=2**31, description="answers to each prompt")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="not OpenAI's: draw among so many; 0 is all")
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED, description="the same seed and prompt, the same answer")
    stop: Stop | List[Stop] | None = None
    ignore_eos: bool | None = Field(None, description="not OpenAI's: go on to max_tokens, whatever the model says")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken, and without effect on an answer:
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Known, and refused unless they ask for nothing:
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="only 0")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="only 0")
    logit_bias: Json | None = Field(None, description="only empty")

    @property
    def alternatives(self) -> int | None:
        """To each token; None where no log-probabilities are asked for."""
        raise NotImplementedError

    @property
    def length(self) -> int | None:
        return self.max_tokens

    def check(self, limits: Limits) -> None:
        """ApiError where this server cannot, or will not."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if value := getattr(self, name):
                raise wrong(name, value, "the engine's sampling has no such thing: leave it out")
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "...", "only with stream=true: leave it out")
        if (self.n or 1) > limits.n:
            raise wrong("n", self.n, f"this server gives at most {limits.n} answers: lower it, or ask twice")
        if isinstance(self.stop, list) and len(self.stop) > limits.stops:
            raise wrong("stop", f"{len(self.stop)} strings", f"this server takes at most {limits.stops}")
        if self.ignore_eos and self.stop:
            raise wrong("ignore_eos", True, "a stop string would end an answer that nothing may end: leave one out")
        if (self.alternatives or 0) > limits.logprobs:
            rule = f"this server gives at most {limits.logprobs} alternatives to a token: lower it"
            raise wrong("logprobs", self.alternatives, rule)

    def params(self) -> SamplingParams:
        """Without a seed every call draws anew."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                max_tokens=self.length or DEFAULT_TOKENS,
                n=self.n or 1,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=secrets.randbits(62) if self.seed is None else (self.seed + 2**63) % 2**64 - 2**63,
                stop=tuple(stops),
                logprobs=0 if self.alternatives is None else max(1, self.alternatives),  # 1: the token's own
            )
        except InputError as error:
            raise ApiError(400, str(error), "invalid_request_error") from None


class CompletionRequest(Sampling):
    """Text that goes on as it stands."""

    prompt: Text | List[Text] | List[Token] | List[List[Token]] = Field(
        description="one or several: text, or token ids"
    )
    echo: bool | None = Field(None, description="give the prompt back, too")
    logprobs: int | None = Field(None, ge=0, lt=2**31, description="alternatives to each token")
    best_of: int | None = Field(None, ge=0, lt=2**31, description="only as many as n")
    suffix: str | None = Field(None, description="only empty")

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.best_of is not None and self.best_of != (self.n or 1):
            rule = "answers are not ranked and thrown away here: leave it out, and take n"
            raise wrong("best_of", self.best_of, rule)
        if self.suffix:
            raise wrong("suffix", self.suffix, "the engine fills in nothing: leave it out")
        if self.echo and self.logprobs is not None:
            raise wrong("echo", True, "log-probabilities of prompts are not computed: leave out echo or logprobs")
        if not self.prompts:
            raise wrong("prompt", "[]", "give at least one")
        if len(self.prompts) > limits.prompts:
            raise wrong("prompt", f"{len(self.prompts)} prompts", f"this server takes at most {limits.prompts} a call")


class Part(Model):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn. What else a client remembers of an answer it was given (refusal, annotations, ...) is left out."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Text = Field(min_length=1, max_length=64)
    content: Text | List[Part]
    name: str | None = None


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(Sampling):
    """A chat, through the model's template."""

    messages: List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, lt=2**31, description="alternatives to each token")
    response_format: ResponseFormat | None = Field(None, description="only text")
    modalities: List[Literal["text"]] | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="only none")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> list[Any]:
        """One: messages as templates know them."""
        return [[{"role": self._role(m), "content": self._text(m)} for m in self.messages]]

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", self.top_logprobs, "only with logprobs=true")

    @staticmethod
    def _role(message: Message) -> str:
        return "system" if message.role == "developer" else message.role  # newer clients call it so

    @staticmethod
    def _text(message: Message) -> str:
        content = message.content
        return content if isinstance(content, str) else "".join(part.text for part in content)
