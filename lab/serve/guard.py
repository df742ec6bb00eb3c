"""What stands before the application: bodies that are too long, wrong keys; and it notes when a request came."""

from __future__ import annotations

import asyncio
import base64
import hmac
import sys
import time
import traceback
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lab.serve.errors import ApiError

RECEIVED = "kvlab.received_s"  # in a request's scope: time.perf_counter()
PATIENCE_S = 60.0  # in which a body must have come
LINGER_S = 1.0  # in which a body that was refused is thrown away: a client that is writing would not read the answer


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, body: int, api_key: str | None) -> None:
        """`body`: bytes of the longest."""
        self.app = app
        self.body = body
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope[RECEIVED] = time.perf_counter()
        headers = Headers(scope=scope)
        if self.api_key is not None and _is_kept(scope) and not self._is_key(scope, headers):
            said = "no valid API key: send the header 'Authorization: Bearer KEY' with the server's"
            response = ApiError(401, said, "authentication_error", code="invalid_api_key").response()
            if _is_page(scope):
                response.headers["www-authenticate"] = 'Basic realm="any name, and as password the API key"'
            return await response(scope, receive, send)
        announced = headers.get("content-length", "0")
        limited = self._limited(receive, int(announced) if announced.isdigit() else 0)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, limited, sending)
        except Exception as error:  # here, and not by who would log what it says: it may quote the prompt
            traceback.print_tb(error.__traceback__)
            name = type(error).__name__
            print(f"{name} in {scope['method']} {scope['path']}", file=sys.stderr, flush=True)
            if not started:
                await ApiError(500, f"the server failed: {name}", "server_error").response()(scope, receive, send)

    def _is_key(self, scope: Scope, headers: Headers) -> bool:
        """Compared in a time that says nothing about the key. A browser asks for a password, and sends it as Basic."""
        assert self.api_key is not None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given, known = key.strip().encode("latin-1"), scheme.lower() == "bearer"
        if _is_page(scope) and scheme.lower() == "basic":
            with suppress(ValueError):
                given, known = base64.b64decode(given, validate=True).partition(b":")[2], True
        return hmac.compare_digest(given, self.api_key) and known

    def _limited(self, receive: Receive, announced: int) -> Receive:
        read, more = 0, True

        async def limited() -> Message:
            nonlocal read, more
            if announced <= self.body:
                if not more:
                    return await receive()  # that it has gone
                message = await self._in_time(receive, until_s)
                read += len(message.get("body", b""))
                more = message.get("more_body", False)
                if read <= self.body:
                    return message
            if more:
                await _discard(receive)
            size = f"{announced} bytes" if announced > self.body else "more bytes than it takes"
            raise HTTPException(413, f"a body of {size}: at most {self.body}: shorten it", {"connection": "close"})

        until_s = time.perf_counter() + PATIENCE_S
        return limited

    async def _in_time(self, receive: Receive, until_s: float) -> Message:
        try:
            async with asyncio.timeout(until_s - time.perf_counter()):
                return await receive()
        except TimeoutError:
            said = f"the body did not come within {PATIENCE_S:g} s: send it again"
            raise HTTPException(408, said, {"connection": "close"}) from None


def _is_page(scope: Scope) -> bool:
    """One that a browser opens."""
    return scope["path"] == "/watch" or scope["path"].startswith("/watch/")


def _is_kept(scope: Scope) -> bool:
    """Is it for those who have the key alone?"""
    return scope["path"].startswith("/v1/") or _is_page(scope)


async def _discard(receive: Receive) -> None:
    """What follows, for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body"):
                message = await receive()
