"""The two calls that generate: `/v1/completions` and `/v1/chat/completions`, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lab.serve.client import Client
from lab.serve.errors import ApiError, documented
from lab.serve.guard import RECEIVED
from lab.serve.messages import Accepted, Answer, Delta
from lab.serve.replies import ChatReply, Json, Reply, TextReply, counts, usage
from lab.serve.schemas import ChatRequest, CompletionRequest, StreamOptions

DONE = b"data: [DONE]\n\n"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; or, with stream=true, its chunks as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **documented(
        _400="Something in the request is wrong, or can never fit",
        _401="No valid API key",
        _404="Another model than the one there is",
        _408="The body did not come",
        _413="The body is too long",
        _429="The queue is full, or there are too many streams: come back after Retry-After seconds",
        _500="The step that the request was in failed",
        _503="Loading, shutting down, or dead",
        _504="Time is up",
    ),
}


class Generating:
    """One call, from its check to its last byte."""

    def __init__(self, client: Client, body: ChatRequest | CompletionRequest, request: Request, model: str) -> None:
        client.check_serving()
        if body.model != model:
            said = f"model {body.model[:60]!r}: this server has {model!r}"
            raise ApiError(404, said, "not_found_error", param="model", code="model_not_found")
        body.check(client.limits)
        self.client = client
        self.body = body
        self.request = request
        received_s = request.scope[RECEIVED]
        self.until_s = received_s + client.limits.seconds
        params = body.params()
        self.call = client.submit(
            body.prompts,
            params,
            received_s,
            streamed=bool(body.stream),
            open_end=isinstance(body, ChatRequest) and body.length is None,
            echo=isinstance(body, CompletionRequest) and bool(body.echo),
            forced=bool(body.ignore_eos),
        )
        form: type[Reply] = ChatReply if isinstance(body, ChatRequest) else TextReply
        self.reply = form(model, self.call.keys[0], params.n, body.alternatives)

    async def respond(self) -> Response:
        """Errors that are known before the first token are answered as such, also where a stream was asked for."""
        accepted: list[Accepted] = []
        async with self.attended(self.request.receive, leave=not self.body.stream):
            if self.body.stream:
                accepted = await self.call.accepted()
            else:
                return await self.whole()
        return Stream(self, accepted)

    async def whole(self) -> Response:
        answers: dict[int, Answer] = {}
        echoes: dict[int, str] = {}
        while len(answers) < len(self.call.keys):
            event = await self.call.next()
            if isinstance(event, Answer):
                answers[event.key] = event
            elif isinstance(event, Accepted):
                echoes[event.key] = event.echo
        keys = self.call.keys
        return JSONResponse(self.reply.whole([answers[key] for key in keys], [echoes[key] for key in keys]))

    async def chunks(self, accepted: list[Accepted]) -> AsyncIterator[Json]:
        """Of a stream; errors in its middle are a chunk, too."""
        options = self.body.stream_options or StreamOptions()
        prompt_tokens = sum(one.prompt_tokens for one in accepted)
        tokens: Counter[tuple[int, int]] = Counter()  # by prompt and output, so far
        answers: list[Answer] = []

        def more() -> Json:
            if options.continuous_usage_stats:
                return {"usage": counts(prompt_tokens, tokens.total())}
            return {"usage": None} if options.include_usage else {}

        for one in accepted:
            if opening := self.reply.opening(one):
                yield self.reply.chunk(opening, **more())
        while len(answers) < len(self.call.keys):
            event = await self.call.next()
            if isinstance(event, Delta):
                tokens[event.key, event.output] = event.tokens
                yield self.reply.chunk([self.reply.delta(event)], **more())
            elif isinstance(event, Answer):
                answers.append(event)
        if options.include_usage:
            yield self.reply.chunk([], usage=usage(answers))

    @asynccontextmanager
    async def attended(self, receive: Receive, leave: bool = True) -> AsyncIterator[None]:
        """Give the call up when its client has gone, or its time is over; and, if `leave`, in the end."""
        watching = asyncio.create_task(self._watch(receive))
        left = True
        try:
            async with asyncio.timeout(self.until_s - time.perf_counter()):
                yield
            left = leave
        except TimeoutError:
            said = f"no answer within {self.client.limits.seconds:g} s"
            raise ApiError(504, said, "server_error", code="timeout") from None
        finally:
            watching.cancel()
            if left:
                self.client.leave(self.call)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client.cancel(self.call)


class Stream(Response):
    """Server-sent events. Chunks that have come meanwhile are sent together."""

    media_type = "text/event-stream"

    def __init__(self, generating: Generating, accepted: list[Accepted]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.generating = generating
        self.accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = b""
        try:
            async with self.generating.attended(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for chunk in self.generating.chunks(self.accepted):
                    ready += event(chunk)
                    if self.generating.call.quiet:
                        await send({"type": "http.response.body", "body": ready, "more_body": True})
                        ready = b""
            ready += DONE
        except ApiError as error:
            ready += event(error.body)
        await send({"type": "http.response.body", "body": ready, "more_body": False})


def event(chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def routes(client: Client, model: str) -> APIRouter:
    """Both calls."""
    api = APIRouter(prefix="/v1")

    @api.post("/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text, or token ids, that the model continues as they stand."""
        return await Generating(client, body, request, model).respond()

    @api.post("/chat/completions", responses=ANSWERS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """A chat, through the model's template."""
        return await Generating(client, body, request, model).respond()

    return api
