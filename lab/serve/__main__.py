"""The command: an OpenAI-compatible server, `python -m lab.serve MODEL`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

from lab.allocators import ALLOCATORS
from lab.command import Parser, status
from lab.core import InputError
from lab.schedulers import PREEMPTION, SCHEDULERS

try:
    import uvicorn

    from lab.serve.app import application
    from lab.serve.client import Client, Limits
    from lab.serve.messages import Ready
    from lab.serve.metrics import Metrics
    from lab.serve.worker import Options
except ModuleNotFoundError as error:
    print(f"error: {error.name} is missing, which the server needs: pip install -e '.[serve]'", file=sys.stderr)
    raise SystemExit(2) from None

RED_S = 1.0  # that /health says the engine has died before the server ends
DRAIN_S = 5  # that a draining server waits for connections, when all answers have had their time
KEY = "KVLAB_API_KEY"

HELP = f"""
The server speaks OpenAI's API under http://HOST:PORT/v1 (completions, chat/completions, models), whole or streamed:

  python -m lab.serve smollm2
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{{"model": "smollm2", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")

/metrics is for Prometheus, /health says whether the engine lives, /ready whether a request would be taken now, /docs
what a request may say; /watch is a page that shows memory, batch and queue as they are now, in a browser. Any allocator
and scheduler serves, one of your own as module:Class, but for oracle and pow2, which would have to know how long an
answer will be:

  python -m lab.serve smollm2 --allocator contiguous-max --scheduler dynamic

Requests that no memory could ever hold are answered 400, those past --queue or --streams 429, with the time after which
to come back. SIGTERM or Ctrl-C ends the server when what is under way is done; a second one ends it at once. There
is no TLS, and no user but who has the key ({KEY}): put a proxy before it where others can reach it.
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "the server had not begun")


def _main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    for registry, policy in ((ALLOCATORS, args.allocator), (SCHEDULERS, args.scheduler)):
        if ":" not in policy:
            registry.get(policy)  # one of ours exists; what others name is looked for in the engine's process
    llm = {name: getattr(args, name) for name in ("model", "allocator", "scheduler", "preemption", "device", "dtype")}
    llm |= {name: getattr(args, name) for name in ("kv_memory", "block", "length", "depth")}
    limits = _limits(args)
    model = args.name or args.model
    client = Client(Options(llm, args.prompt_tokens), limits, Metrics(model))
    policies = {name: llm[name] for name in ("allocator", "scheduler", "preemption")}
    app = application(client, model, policies, _key(args.api_key))
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def told(ready: Ready) -> None:
        memory = f"{ready.capacity} tokens of KV memory on {ready.hardware}"
        print(f"serving {model} on {url}/v1: {args.allocator}, {args.scheduler}, {memory}", flush=True)

    client.on_ready = told
    print(f"loading {model}; {url}/ready answers 503 until it is there", flush=True)
    # What is under way ends in time by itself, but for those who do not read it, or sent half a request.
    patience_s = math.ceil(limits.seconds) + DRAIN_S
    quiet: Any = {"log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, http="h11", ws="none", timeout_graceful_shutdown=patience_s, **quiet)
    server = Server(client, config)
    try:
        server.run(sockets=[listening])
    finally:
        client.stop(0.0 if server.force_exit or client.ready is None else 5.0)
    if client.broken:
        raise InputError(client.broken)
    return 1 if client.died else 0


class Server(uvicorn.Server):
    """Ends when its engine does; a first signal drains, a second one ends it at once."""

    def __init__(self, client: Client, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.client = client
        client.on_end = self.engine_ended

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.client.draining
        if self.force_exit:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # that answers are cut off was asked for
        self.client.draining = self.should_exit = True

    def engine_ended(self) -> None:
        def end() -> None:
            self.should_exit = True

        asyncio.get_running_loop().call_later(0.0 if self.client.broken else RED_S, end)


def listen(host: str, port: int) -> socket.socket:
    """Before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"{host} port {port}: {error}: choose another --host or --port") from None


def _key(given: str | None) -> str | None:
    """Of the command line, or the environment, where nothing counts as none."""
    if given is not None and not given.strip():
        raise InputError(f"--api-key {given!r}: must not be empty: leave it out where none is wanted")
    return (given or os.environ.get(KEY, "")).strip() or None


def _limits(args: argparse.Namespace) -> Limits:
    limits = Limits(args.queue, args.streams, args.prompts, args.n, args.stops, args.logprobs, args.body, args.seconds)
    for name, least in (("queue", 1), ("streams", 0), ("prompts", 1), ("n", 1), ("stops", 0), ("logprobs", 0)):
        if getattr(limits, name) < least:
            raise InputError(f"--{name} {getattr(limits, name)}: must be at least {least}")
    if limits.body < 1 or not limits.seconds > 0:
        raise InputError(f"--body {limits.body}, --seconds {limits.seconds:g}: must be above 0")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}: must be at least 1")
    return limits


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m lab.serve",
        description="Serve a model over HTTP, as OpenAI's API, under any allocator and scheduler.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = "smollm2 (default), a folder, a .safetensors or .gguf file, a Hub name, random:SHAPE (token ids only)"
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help=models)
    parser.add_argument("--name", help="what requests call the model (default: MODEL)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free (default: 8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what requests must bring (better: ${KEY}; default: none)")
    _add_engine(parser.add_argument_group("the engine"))
    _add_limits(parser.add_argument_group("limits, past which a request is refused"))
    return parser


def _add_engine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--allocator", default="paged", metavar="NAME", help=f"one of {', '.join(ALLOCATORS.names())}")
    add("--scheduler", default="continuous", metavar="NAME", help=f"one of {', '.join(SCHEDULERS.names())}")
    add("--preemption", default=PREEMPTION[0], choices=PREEMPTION, help="where memory is short (default: recompute)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU)")
    memory = "for K and V: tokens (15728), bytes (12GiB), or a share of what is free (90%%: the default on a GPU)"
    add("--kv-memory", metavar="SIZE", help=f"{memory}; 512MiB on a CPU")
    add("--block", type=int, default=16, metavar="N", help="tokens of a block (default: 16)")
    add("--length", type=int, metavar="N", help="tokens of the longest sequence (default: what model and memory allow)")
    add("--depth", type=int, choices=(0, 1), help="steps planned ahead (default: 1 on a GPU, 0 on a CPU)")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    default = Limits()
    add = group.add_argument
    add("--queue", type=int, default=default.queue, metavar="N", help="prompts that wait (default: %(default)s)")
    add("--streams", type=int, default=default.streams, metavar="N", help="at the same time (default: %(default)s)")
    add("--prompts", type=int, default=default.prompts, metavar="N", help="of one call (default: %(default)s)")
    add("--prompt-tokens", type=int, metavar="N", help="of each prompt (default: the longest sequence)")
    add("--n", type=int, default=default.n, metavar="N", help="answers to each prompt (default: %(default)s)")
    add("--stops", type=int, default=default.stops, metavar="N", help="stop strings (default: %(default)s)")
    add("--logprobs", type=int, default=default.logprobs, metavar="N", help="alternatives to a token (default: 20)")
    add("--body", type=int, default=default.body, metavar="BYTES", help="of a request (default: %(default)s)")
    add("--seconds", type=float, default=default.seconds, help="until an answer is complete (default: %(default)g)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
