"""The engine as one uses it from Python: prompts in, texts out.

    llm = LLM("smollm2", allocator="paged", scheduler="continuous")
    for result in llm.generate(["Once upon a time", "The sky is"], SamplingParams(max_tokens=40)):
        print(result.text, result.timing.ttft_s, result.memory.blocks)

One thread at a time; streams that are gone through by turns share the engine's steps.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from lab import real
from lab.allocators import ALLOCATORS
from lab.answers import Answers, Piece, Result
from lab.core import UNKNOWN, Group, InputError, Limits, Request, SamplingParams, unknown
from lab.engine import Engine
from lab.record import Record, Recorder, describe
from lab.schedulers import SCHEDULERS, Scheduler
from lab.tokenise import Prompt, encode, is_one, needed

ON_A_CPU = "512MiB"  # of K and V, where nobody says more; on a GPU 90 % of what is free
DTYPES = ("float32", "bfloat16", "float16")
AHEAD = 256  # requests that wait in the scheduler's queue at most: more than a step admits of all but tiny prompts


class LLM:
    """A model, its memory, and an engine that serves from it."""

    def __init__(
        self,
        model: str = "smollm2",
        *,
        allocator: str = "paged",
        scheduler: str = "continuous",
        preemption: str = "recompute",
        device: str | None = None,
        dtype: str | None = None,
        kv_memory: str | int | None = None,
        block: int = 16,
        length: int | None = None,
        depth: int | None = None,
        recording: bool = True,
    ) -> None:
        """`model` as in `lab.models.loading`; `device` None: a GPU where there is one.

        `kv_memory`: tokens (15728), bytes ("12GiB") or a share of what is free ("90%"); `length`: the longest sequence,
        prompt and answer, by default the longest that model and memory allow; `depth`: steps planned ahead, 1 on a GPU.
        """
        device = device or ("cuda" if real.free_gpu_bytes() else "cpu")
        on_gpu = device.startswith("cuda")
        depth = int(on_gpu) if depth is None else depth
        dtype = dtype or ("bfloat16" if on_gpu else "float32")
        if depth not in (0, 1):
            raise InputError(f"depth {depth!r}: must be 0 (collect a step, then plan) or 1 (plan the next meanwhile)")
        if dtype not in DTYPES:
            raise InputError(unknown("dtype", dtype, DTYPES))
        policies = ALLOCATORS.get(allocator), SCHEDULERS.get(scheduler)
        loaded = real.model(model, device, dtype)
        size = ("90%" if on_gpu else ON_A_CPU) if kv_memory is None else kv_memory
        pool = real.pool(str(size), model, device, dtype, block).tokens
        limits = Limits(length=longest(length, loaded.max_length, pool))
        self._policies = lambda: policies[1](policies[0](pool, block, limits), limits, preemption=preemption)
        self.scheduler: Scheduler = self._policies()
        self.executor = real.TorchExecutor(loaded, pool, block)
        self.tokenizer: Any = None if model.lower().startswith("random") else real.load_tokenizer(model)
        self.vocabulary = loaded.vocab_size
        self.answers = Answers(self.decode)
        self._header: dict[str, Any] | None = None
        if recording:
            where = real.device_name(device)
            self._header = describe(
                model=model, workload="generate", seed=0, simulated=False, hardware=where, gpu=where if on_gpu else ""
            )
        self._record: Record | None = None
        self.eos, self.depth = loaded.eos, depth
        self.engine = self._engine()
        self._next_id = 0

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Result]:
        """The answers to one prompt or to many, in their order; `params` for all of them, or one each.

        `progress`: a bar on stderr; None: if that is a terminal. Anything wrong is said before any work.
        """
        requests = self.requests(prompts, params)
        results = []
        with tqdm(total=len(requests), unit="prompt", disable=None if progress is None else not progress) as bar:
            for result in self.serve(requests):
                results.append(result)
                bar.update()
        return sorted(results, key=lambda result: result.index)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, Result]:
        """The text of `generate`'s answer in pieces, as they come; the generator returns the Result."""
        (request,) = self.requests([prompt], params)
        if request.sampling.n > 1 or request.sampling.beams:
            asked = f"n={request.sampling.n}, beams={request.sampling.beams}"
            raise InputError(f"{asked}: one output is streamed, and no search: take n=1, beams=0, or generate()")
        return self._stream(request)

    def serve(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results in the order in which they come, of what `requests()` or `request()` made; a few wait at a time."""
        self._begin()
        start_s = self.executor.now
        done: deque[Result] = deque()
        mine: dict[int, int] = {}  # in flight: id by index
        coming = iter(requests)
        request = next(coming, None)
        try:
            while request or mine:
                while request and len(self.scheduler.waiting) + len(self.engine.inbox) < AHEAD:
                    mine[request.id] = self._submit(request, start_s, done)
                    request = next(coming, None)
                self.engine.step(more=request is not None)
                while done:
                    del mine[done[0].index]
                    yield done.popleft()
        finally:
            self._leave(mine.values())

    @property
    def record(self) -> Record:
        """What happened in the last call of `generate`, or since the first of the streams that overlap."""
        if self._record is None:
            recorder = self.answers.recorder
            if not isinstance(recorder, Recorder):
                raise InputError("record: nothing was recorded: generate something, with LLM(..., recording=True)")
            if self.engine.groups:
                raise InputError("record: requests are in flight: read it when they have ended")
            recorder.close()
            self._record = recorder.record()
        return self._record

    def requests(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> list[Request]:
        """Every prompt as a request that can be served; InputError at the first that cannot."""
        many: list[Prompt] = [prompts] if is_one(prompts) else list(prompts)  # type: ignore[arg-type]
        one = isinstance(params, Mapping) or not isinstance(params, Iterable)  # right or wrong
        each: list[Any] = [params or SamplingParams()] * len(many) if one else list(params)  # type: ignore[arg-type]
        if len(each) != len(many):
            raise InputError(f"{len(each)} sampling parameters for {len(many)} prompts: give one for all, or one each")
        return [self.request(i, prompt, each[i]) for i, prompt in enumerate(many)]

    def request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """The request whose result has this index. What it draws depends on seed and index, not on what runs beside."""
        if not isinstance(params, SamplingParams):
            raise InputError(f"prompt {index}: parameters {params!r}: must be SamplingParams(...)")
        strings = [stop for stop in params.stop if isinstance(stop, str)]
        if params.beams and (strings or params.logprobs):
            asked = f"stop={strings[0]!r}" if strings else f"logprobs={params.logprobs}"
            raise InputError(f"prompt {index}: {asked}: a beam search cannot, leave it out or take beams=0")
        if strings:
            added = needed(self.tokenizer, index).get_added_vocab()  # which text leaves out
            params = replace(params, stop=tuple(added.get(stop, stop) for stop in params.stop))
        request = Request(index, 0.0, array("i", self.encode(prompt, index)), sampling=params)
        if reason := self.scheduler.refusal(request):
            raise InputError(reason)
        return request

    def encode(self, prompt: Prompt, index: int = 0) -> list[int]:
        """Token ids of a prompt, of which there is at least one."""
        return encode(prompt, index, self.tokenizer, self.vocabulary)

    def decode(self, tokens: list[int]) -> str:
        """Their text, without special tokens; empty where the model has no tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def restart(self) -> set[int]:
        """After a step that failed: new policies over an empty pool, and the requests that held none of it go on.

        Returns the ids of those; all others are lost.
        """
        old = self.engine
        for flight in old.flights:
            if flight.plan.work or flight.plan.moves:
                with suppress(Exception):  # what it would give is lost anyway
                    self.executor.collect()
        kept = [group for group in self.scheduler.waiting if _holds_nothing(group, self.scheduler)]
        self.scheduler = self._policies()
        self.engine = self._engine()
        for group in kept:
            self.engine.groups[group.request.id] = group
            self.scheduler.submit(group)
        self.engine.inbox += old.inbox
        going = {item.id for item in old.inbox if isinstance(item, Request)} | self.engine.groups.keys()
        self.answers.jobs = {own: job for own, job in self.answers.jobs.items() if own in going}
        return going

    def _engine(self) -> Engine:
        tell, depth = self.answers, self.depth
        return Engine(
            self.scheduler, self.executor, tell, eos=self.eos, on_end=tell.end, on_token=tell.token, depth=depth
        )

    def _stream(self, request: Request) -> Generator[str, None, Result]:
        self._begin()
        done: deque[Result] = deque()
        pieces: deque[Piece] = deque()
        own = self._submit(request, self.executor.now, done, pieces)
        try:
            while not done:
                self.engine.step()
                while pieces:
                    if text := pieces.popleft().text:
                        yield text
            return done[0]
        finally:
            self._leave([] if done else [own])

    def _begin(self) -> None:
        """A new record, from 0 s on, unless something is in flight."""
        if self.engine.groups or self.engine.inbox:
            return
        self.executor.reset_clock()
        self._record = None
        self.answers.recorder = None if self._header is None else Recorder(None, self._header)
        self._next_id = 0

    def _submit(self, request: Request, now: float, done: deque[Result], pieces: deque[Piece] | None = None) -> int:
        """Its id in the engine is new; its index stays what its noise is a function of."""
        own = replace(request, id=self._next_id, arrival_s=now, noise=request.id)
        self._next_id += 1
        self.answers.expect(own, request.id, done, pieces)
        self.engine.submit(own)
        return own.id

    def _leave(self, given_up: Iterable[int]) -> None:
        """Cancel what nobody waits for any more, and bring home what is in flight if nobody else is."""
        for own in given_up:
            self.engine.cancel(own)
        if self.engine.inbox:
            self.engine.step()
        while self.engine.flights and not self.engine.groups:
            self.engine.step()


def _holds_nothing(group: Group, scheduler: Scheduler) -> bool:
    """Has a group that waits no K and V anywhere, and no token on its way?"""
    known = all(s.tokens[-1] != UNKNOWN for s in group.sequences)
    return known and group not in scheduler.host.saved and not any(s.computed for s in group.live)


def longest(asked: int | None, of_the_model: int, pool: int) -> int:
    """Tokens of the longest sequence."""
    if asked is None:
        return min(of_the_model, pool)
    if not 3 <= asked <= of_the_model:
        raise InputError(f"length {asked}: the model takes 3 to {of_the_model} tokens a sequence: choose among them")
    return asked
