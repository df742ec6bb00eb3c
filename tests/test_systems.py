"""Systems by name: each says what it models, means what it says, and is taken for no other; slots, which one needs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from lab import latency, metrics
from lab.allocators import ALLOCATORS, Idle, account
from lab.allocators.slots import Slots
from lab.check import check
from lab.core import Group, InputError, Limits, Request, SamplingParams
from lab.record import Record
from lab.run import Run, carry_out
from lab.systems import SYSTEMS, label, system

NAMES = (
    "vllm",
    "orca-max",
    "orca-pow2",
    "orca-oracle",
    "fastertransformer",
    "tensorrt-llm",
    "tensorrt-llm-utilisation",
    "tgi",
    "llama.cpp",
    "hf-generate",
)
FEW = Run(arrivals="all", rate=None, duration_s=None, count=40, drain=True, max_tokens=1024)


def served(name: str, **changes: Any) -> Record:
    return carry_out(replace(FEW, **{**system(name).settings, **changes}), None).record()


def group(prompt: int, output: int = 1, n: int = 1) -> Group:
    return Group(Request(0, 0.0, range(prompt), output, SamplingParams(max_tokens=output, n=n)))


# ---- the names ----


def test_every_system_that_people_ask_for_is_there() -> None:
    assert set(NAMES) <= set(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_a_page_and_settings_that_can_run(name: str) -> None:
    found = system(name)
    assert 20 <= len(found.page.splitlines()) <= 40
    assert "Sources" in found.page
    assert "Leaves out" in found.page
    assert {"allocator", "scheduler"} <= set(found.settings) <= {field.name for field in fields(Run)}
    run = replace(FEW, count=8, **found.settings)
    check(run)
    assert label(run) == name


def test_no_two_systems_have_the_same_settings() -> None:
    settings = [sorted(found.settings.items()) for found in SYSTEMS.values()]
    assert all(settings.count(own) == 1 for own in settings)


@pytest.mark.parametrize("name", ["fastertransformer", "hf-generate"])
def test_systems_that_pad_say_what_they_reached_and_why_it_differs(name: str) -> None:
    assert system(name).reached
    for reached in system(name).reached:
        assert all(part.strip() for part in reached)
        assert reached.difference in str(reached)
        assert "measured by us" in reached.setting  # or that it was not


def test_the_paper_s_defaults_are_called_vllm() -> None:
    assert label(Run()) == "vllm"
    assert label(Run(allocator="paged", scheduler="static")) == "paged static"
    assert label(Run(allocator="paged-double")) == "paged-double"


def test_an_unknown_system_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"system 'llamacpp' is unknown: did you mean llama\.cpp") as error:
        system("llamacpp")
    assert "\n" not in str(error.value)


# ---- what they do ----


def test_tgi_reserves_what_clients_ask_for_and_vllm_has_no_use_for_it() -> None:
    known, unknown = served("tgi", max_tokens=None, count=100), served("tgi", count=100)
    assert metrics.batch_size(unknown).sequences < 0.8 * metrics.batch_size(known).sequences
    assert metrics.shares(known)["excess"] < 0.01 < metrics.shares(unknown)["excess"]
    assert metrics.pressure(unknown).preemptions == 0
    rates = {latency.throughput(served("vllm", max_tokens=asked)) for asked in (None, 1024)}
    assert len(rates) == 1


def test_tensorrt_llm_with_tgi_s_blocks_is_tgi() -> None:
    assert served("tensorrt-llm", block=16).steps.equals(served("tgi").steps)


def test_utilisation_runs_more_at_once_and_pays_with_preemptions() -> None:
    safe, bold = (served(name, count=100) for name in ("tensorrt-llm", "tensorrt-llm-utilisation"))
    assert metrics.batch_size(bold).sequences > 1.5 * metrics.batch_size(safe).sequences
    assert metrics.pressure(safe).preemptions == 0 < metrics.pressure(bold).preemptions


def test_slots_for_the_longest_sequence_are_orca_max() -> None:
    slots, orca = served("llama.cpp"), served("orca-max")
    assert metrics.batch_size(slots) == metrics.batch_size(orca)
    assert slots.steps["end_s"].equals(orca.steps["end_s"])


def test_a_batch_of_generate_is_as_large_as_the_pool_can_hold() -> None:
    batch, longest = system("hf-generate").settings["batch"], Run().length
    assert batch * longest <= 983 * 16 < (batch + 1) * longest
    assert metrics.pressure(served("hf-generate")).preemptions == 0


@pytest.mark.parametrize(("name", "rows"), [("fastertransformer", 5), ("hf-generate", 7)])
def test_static_systems_compute_padding_and_keep_ended_rows(name: str, rows: int) -> None:
    record = served(name)
    assert record.steps["running"].max() == rows
    assert metrics.pressure(record).dead > 0
    assert metrics.shares(record)["ended"] > 0


# ---- slots ----


def test_slots_divide_the_context_and_one_takes_one_whole() -> None:
    slots = Slots(16 * 983, 16, Limits())
    assert (slots.slots, slots.size) == (7, 140)  # 2,240 tokens each; 3 blocks are nobody's
    assert slots.idle() == Idle(16 * 983, 0, 2240)
    one = group(5)
    assert slots.admit(one) == 0
    one.live[0].computed = 5
    usage = account(slots, one.live)
    assert (usage.stored, usage.excess, usage.rounding) == (5, 2235, 0)
    assert usage.free == 16 * (983 - 140)
    assert slots.extend(one.live[0], 2240)
    assert not slots.extend(one.live[0], 2241)
    slots.release(one.live[0])
    assert slots.idle() == Idle(16 * 983, 0, 2240)


def test_each_output_takes_a_slot_all_or_none() -> None:
    slots = Slots(8 * 16, 16, Limits(length=32), slots=4)
    three, two = group(20, n=3), group(20, n=2)
    assert slots.admit(three) == 0
    assert slots.admit(two) is None
    assert set(slots.tables) == set(three.live)
    assert slots.idle() == Idle(32, 0, 32)
    last = group(20)
    assert slots.admit(last, spare=16) is None  # nothing would be left idle
    assert slots.admit(last) == 0
    assert slots.idle() == Idle(0, 0, 0)
    starts = sorted(table[0] for table in slots.tables.values())
    assert starts == [0, 2, 4, 6]


def test_what_is_longer_than_a_slot_or_wider_than_all_is_refused() -> None:
    slots = Slots(8 * 16, 16, Limits(), slots=4)
    assert slots.fits(group(30, output=3).request)  # 32 tokens of K and V: the last one's are never computed
    assert not slots.fits(group(30, output=4).request)
    assert slots.fits(group(5, n=4).request)
    assert not slots.fits(group(5, n=5).request)
    assert slots.admit(group(33)) is None


def test_more_slots_than_blocks_hold_nothing() -> None:
    slots = Slots(3 * 16, 16, Limits(), slots=4)
    assert not slots.fits(group(1).request)
    assert slots.admit(group(1)) is None
    assert slots.idle() == Idle(48, 0, 0)
    with pytest.raises(InputError, match="none of the 40 requests can ever run"):
        check(replace(FEW, allocator="lab.allocators.slots:sixteen", pool="96"))


@pytest.mark.parametrize(("number", "most"), [("four", 4), ("eight", 8)])
def test_their_number_can_be_named(number: str, most: int) -> None:
    record = served("llama.cpp", allocator=f"lab.allocators.slots:{number}")
    assert record.steps["running"].max() == most
    assert ALLOCATORS.get(f"lab.allocators.slots:{number}")(15728).slots == most
