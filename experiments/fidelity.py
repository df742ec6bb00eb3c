"""How wrong is the virtual clock? Calibrated on some runs of the real engine, it predicts others.

Vidur (Agrawal et al., MLSys'24) predicts the latency of LLM serving with errors under 9 %. Here the step times of all
calibration runs together, paging on one workload at several rates, are fitted as one function of tokens, positions and
sequences (FittedCost). The virtual clock at that pace then serves the requests of every run. Held out: other rates,
contiguous memory, static batches with padding, another workload, and all requests at once. Which points those are, and
at which rates, is fixed below, before anything is calibrated. A knee is the rate at which requests end while the queue
is never empty; `load` is the rate as a share of the knee that the calibrated clock finds for that system and workload.
All that arrives is served. Below the knee throughput is what arrives, so latency is the harder test there. Claims:
throughput and mean normalised latency of held-out points below the knee within 5 %, memory shares within a point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.clock import measured_steps, shape_name, twin_of, write_pace
from experiments.fragmentation import GPU_BYTES
from lab import latency, metrics
from lab.core import InputError
from lab.executors.simulated import FittedCost
from lab.harness import Claim
from lab.measured import Once, Row
from lab.options import Options
from lab.plot.style import BAND, BLACK, BLUE, FONT, GREEN, GREY, ORANGE, PURPLE, VERMILION, entitle, legend, seeds_of
from lab.record import Record
from lab.run import Run, carry_out, real
from lab.systems import label

CALIBRATION, HELD_OUT = "calibration", "held out"
MEASURES = {  # what is compared: its name, the colour and the marker of its error
    "output_tokens_per_s": ("output tokens/s", BLUE, "o"),
    "normalised_s": ("normalised latency", VERMILION, "s"),
    "normalised_p90_s": ("its P90", ORANGE, "^"),
    "ttft_s": ("time to first token", GREEN, "D"),
    "tpot_s": ("time per output token", PURPLE, "v"),
    "batch": ("requests running", BLACK, "X"),
}
NAMES = {key: name for key, (name, _, _) in MEASURES.items()}
JUDGED = ("output_tokens_per_s", "normalised_s")
VIDUR = {"normalised_s": 9.0, "normalised_p90_s": 9.0}  # per cent, "less than"; of its median and P95
SHARES = ("stored", "ended", "reserved", "excess", "rounding", "free")
PER_CENT, POINTS = 5.0, 1.0  # tolerances
BELOW = 0.9  # load: nearer to the knee, a queue turns any error of the pace into a wait without bound
AT_ONCE = 400  # requests whose service, less its first and last quarter, gives the knee
FIXED = ("executor", "hardware", "workload", "arrivals", "steps", "system", "allocator", "scheduler")
SYSTEMS: dict[str, dict[str, Any]] = {
    "paged": {"allocator": "paged"},
    "oracle": {"allocator": "contiguous-oracle"},
    "static": {"allocator": "contiguous-max", "scheduler": "static"},
}
GPU = Run(executor="torch", device="cuda", model="random:opt-13b", pool="15728", duration_s=120.0, drain=True)
LAPTOP = Run(
    executor="torch",
    model="random:smollm2-135m",  # lengths are forced, so weights do not matter
    dtype="float32",
    workload="uniform:prompt=16-160,output=16-80",
    duration_s=50.0,
    drain=True,
    pool="1200",
    length=256,
)


class Machine(NamedTuple):
    """Where to measure, the knees that are expected there, and the points: a system and a share of its knee."""

    run: Run
    knees: Mapping[str, float]  # requests/s
    calibration: list[tuple[str, float]]
    held_out: list[tuple[str, float]]
    alpaca: float  # requests/s of the other workload, paged, held out
    at_once: int  # requests of the run in which all come at once, paged, held out


ON_GPU = ([("paged", load) for load in (0.3, 0.6, 1.0)], [(name, load) for name in SYSTEMS for load in (0.5, 0.8)])
ON_CPU = ([("paged", load) for load in (0.4, 1.0)], [("oracle", 0.8), ("static", 0.5)])
MACHINES = {  # the knees of the first two are those of `lab.hardware` (600 requests at once), the last was tried out
    "H200": Machine(GPU, {"paged": 7.7, "oracle": 3.7, "static": 0.8}, *ON_GPU, alpaca=30.0, at_once=256),
    "H100": Machine(GPU, {"paged": 5.95, "oracle": 2.85, "static": 0.62}, *ON_GPU, alpaca=30.0, at_once=256),
    "CPU": Machine(LAPTOP, {"paged": 1.5, "oracle": 1.25, "static": 0.7}, *ON_CPU, alpaca=1.2, at_once=40),
}


def runs(options: Options) -> list[Run]:
    calibration, held_out = _points(options)
    return calibration + held_out


def row(run: Run, record: Record) -> dict[str, Any]:
    return {"clock": "measured", **_identity(run), **_measures(record), "compiling_s": metrics.compiling_s(record)}


def measure(options: Options, places: Mapping[Run, Path], once: Once) -> tuple[list[Row], dict[str, Any]]:
    """The same points on the virtual clock at the pace of the calibration runs, which have been carried out."""
    calibration, held_out = _points(options)
    fit = FittedCost.fit([step for run in calibration for step in measured_steps(Record.load(places[run]))])
    pace = write_pace(fit, options.out / "fidelity", Record.load(places[calibration[0]]))
    knee = cache(lambda run: _knee(carry_out(run, None).record()))

    def predict(run: Run) -> list[Row]:
        record = Record.load(places[run])
        twin = twin_of(run, record, pace)
        predicted = carry_out(twin, None).record()
        assert _asked(predicted).equals(_asked(record)), "both clocks serve the same requests"
        at_once = replace(twin, arrivals="all", rate=None, duration_s=None, count=AT_ONCE)
        found = {"part": CALIBRATION if run in calibration else HELD_OUT, "load": (run.rate or np.nan) / knee(at_once)}
        found |= {"fit_steps": fit.steps, "fit_error": 100 * fit.error}
        return [{"clock": "simulated", **_identity(run), **found, **_measures(predicted)}]

    points = {run: {"record": places[run].name, "pace": pace.name} for run in calibration + held_out}
    return [row for run, point in points.items() for row in once(point, partial(predict, run))], {}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    pairs = _pairs(rows)
    points = pairs.groupby(["part", "point"], sort=False)
    errors = points[["load", *NAMES, "waste"]].agg(["mean", "std"]).rename(columns={**NAMES, "waste": "waste (points)"})
    mean, spread = (errors.xs(kind, axis="columns", level=1).round(2) for kind in ("mean", "std"))
    values = {
        (title, clock): points[f"{key}_{clock}"].mean()
        for key, title in {**NAMES, "waste": "waste, % of held"}.items()
        for clock in ("measured", "simulated")
    }
    fit = rows.loc[rows["clock"] == "simulated", ["fit_steps", "fit_error"]].drop_duplicates()
    found = {
        f"size of the error, per cent (below the knee: up to {BELOW:g} of it)": _summary(pairs),
        "error of each point, per cent of what was measured": mean,
        **({"its standard deviation over seeds": spread} if pairs["seed"].nunique() > 1 else {}),
        "measured and simulated, means over seeds": pd.DataFrame(values).round(3),
        "the fit: steps measured, error of their times in per cent of the sum": fit.round(2).reset_index(drop=True),
    }
    compiling = points[["compiling_s"]].mean().round(2)
    if compiling["compiling_s"].any():
        found["seconds in which a kernel was compiled: --fresh measures again, without"] = compiling
    return found


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """A mark per measure, point and seed: how far the virtual clock is off, in per cent of what was measured."""
    pairs = _pairs(rows)
    parts = dict(iter(pairs.groupby("part", sort=False)))
    widths = [own["point"].nunique() for own in parts.values()]
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(max(9.0, 1.6 + 0.8 * sum(widths)), 5.0), layout="constrained")
        row = figure.subplots(1, len(parts), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (part, own) in zip(row, parts.items(), strict=True):
            band = axes.axhspan(-PER_CENT, PER_CENT, color=BAND, zorder=0)
            axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
            for i, (key, (title, color, marker)) in enumerate(MEASURES.items()):
                x = pd.factorize(own["point"])[0] + 0.11 * (i - (len(MEASURES) - 1) / 2)
                axes.scatter(x, own[key], color=color, marker=marker, s=26, label=title)
            loads = own.drop_duplicates("point").set_index("point")["load"]
            texts = [f"{point}, load {load:.2f}" if load > 0 else point for point, load in loads.to_dict().items()]
            axes.set_xticks(range(len(texts)), ["\n".join(fill(t, 12) for t in text.split(", ")) for text in texts])
            axes.set_xlim(-0.6, len(texts) - 0.4)
            axes.tick_params("x", labelsize=8)
            axes.set_xlabel(part)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("simulated less measured (% of measured)")
        row[0].set_yscale("symlog", linthresh=2 * PER_CENT)
        largest = max(2 * PER_CENT, 1.2 * float(pairs[[*MEASURES]].abs().max().max()))
        row[0].set_ylim(-largest, largest)
        row[0].set_yticks([s * tick for tick in (0, 2, 5, 10, 20, 50, 100, 200) for s in (-1, 1) if tick <= largest])
        row[0].yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        handles, labels = row[0].get_legend_handles_labels()
        legend(figure, [*handles, band], [*labels, f"±{PER_CENT:g} %, as claimed"])
        entitle(figure, row[0], "How wrong the virtual clock is", header, seeds_of(rows["seed"]))
    return figure


def claims(rows: pd.DataFrame) -> list[Claim]:
    pairs = _pairs(rows)
    below = pairs[(pairs["part"] == HELD_OUT) & (pairs["load"] <= BELOW)]
    found = []
    for key in JUDGED:
        holds, seen = None, "no point lies there: give the rate that paging sustains with --rate"
        if len(below):
            worst = below.loc[below[key].abs().idxmax()]
            holds, seen = bool(abs(worst[key]) <= PER_CENT), f"worst is {worst[key]:+.1f} % at {worst['point']}"
        found.append(Claim(f"held out, up to {BELOW:g} of the knee: {NAMES[key]} within {PER_CENT:g} %", holds, seen))
    off = pairs.melt("point", [*SHARES])
    worst = off.loc[off["value"].abs().idxmax()]
    text = f"every share of the pool within {POINTS:g} point of the real clock's"
    seen = f"worst is {worst['variable']} at {worst['point']}, {worst['value']:+.2f}"
    return [*found, Claim(text, bool(abs(worst["value"]) <= POINTS), seen)]


def _points(options: Options) -> tuple[list[Run], list[Run]]:
    """Runs to calibrate on, and those held out, for every seed. InputError for an option that would change them."""
    policies = {"system": options.systems, "allocator": options.allocators, "scheduler": options.schedulers}
    changes = {**options.changes, **{name: ",".join(listed) for name, listed in policies.items() if listed}}
    for name in FIXED:
        if changes.get(name, "torch") != "torch":
            rule = "the points are fixed in the source, so that nobody picks them by their outcome"
            raise InputError(f"{name} {changes[name]!r}: {rule}; leave --{name} out")
    machine = _machine(changes)
    scale = changes.pop("rate", machine.knees["paged"]) / machine.knees["paged"]
    base = replace(options, changes=changes).apply(machine.run)
    if options.quick:
        lengths, count, scale = "uniform:prompt=8-24,output=8", min(base.count or 6, 6), 4 * scale
        base = replace(base, workload=lengths, count=count, duration_s=None)

    def at(name: str, rate: float | None, **more: Any) -> Run:
        return replace(base, **SYSTEMS[name], rate=rate and rate * scale, **more)

    calibration = [at(name, load * machine.knees[name]) for name, load in machine.calibration]
    held_out = [at(name, load * machine.knees[name]) for name, load in machine.held_out]
    held_out.append(at("paged", machine.alpaca, workload="alpaca"))
    held_out.append(at("paged", None, arrivals="all", duration_s=None, count=base.count or machine.at_once))
    if options.quick:
        calibration, held_out = calibration[-1:], [held_out[0], held_out[-1]]
    calibration, held_out = (
        [replace(run, seed=seed) for run in part for seed in options.seeds or [0]] for part in (calibration, held_out)
    )
    return calibration, held_out


def _machine(changes: Mapping[str, Any]) -> Machine:
    """A GPU with room for OPT-13B or, without one, this CPU. `--rate` is paging's knee where none is known."""
    device, model, known = changes.get("device"), changes.get("model"), "rate" in changes
    if device == "cpu" or (device is None and real().free_gpu_bytes() < GPU_BYTES):
        machine = MACHINES["CPU"]
    else:
        gpu = real().device_name(device or "cuda")
        names = [name for name in MACHINES if name in gpu]
        if not names and not known:
            raise InputError(f"device {gpu!r}: nobody has found its knee; give the requests/s of paging with --rate")
        machine = MACHINES[names[0] if names else "H100"]
    if model and shape_name(Run(model=model)) != shape_name(machine.run) and not known:
        rule = f"the knee is known for {machine.run.model}"
        raise InputError(f"model {model!r}: {rule}; take it, or give the requests/s of paging with --rate")
    return machine


def _identity(run: Run) -> dict[str, Any]:
    when = "all at once" if run.rate is None else f"{run.rate:.3g}/s"
    point = f"{label(run)}, {run.workload.partition(':')[0]}, {when}"
    return {"point": point, "system": label(run), "workload": run.workload, "rate": run.rate, "seed": run.seed}


def _measures(record: Record) -> dict[str, float]:
    """Of the whole run, which ends when all has been served; shares are means over iterations, per cent."""
    summary = latency.latency_summary(record)
    mean = summary["mean"]
    pool, held = 100 * metrics.shares(record), 100 * metrics.shares(record, of="held")
    return {
        "output_tokens_per_s": latency.throughput(record).output_tokens_per_s,
        **{name: mean[name] for name in ("normalised_s", "ttft_s", "tpot_s")},
        "normalised_p90_s": summary.loc["normalised_s", "p90"],
        "batch": metrics.batch_size(record).sequences,
        "waste": 100 - held["stored"],
        **{name: pool[name] for name in SHARES},
    }


def _pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per point and seed: both clocks' values, and errors in per cent (of waste and shares, in points)."""
    measured, simulated = (rows[rows["clock"] == clock] for clock in ("measured", "simulated"))
    kept = ["point", "seed", *MEASURES, "waste", *SHARES]
    pairs = measured[[*kept, "compiling_s"]].merge(
        simulated[["part", "load", *kept]], on=["point", "seed"], suffixes=("_measured", "_simulated"), validate="1:1"
    )
    for name in kept[2:]:
        off = pairs[f"{name}_simulated"] - pairs[f"{name}_measured"]
        pairs[name] = 100 * off / pairs[f"{name}_measured"] if name in MEASURES else off
    return pairs


def _summary(pairs: pd.DataFrame) -> pd.DataFrame:
    held_out = pairs["part"] == HELD_OUT
    below = held_out & (pairs["load"] <= BELOW)
    size = pairs[[*MEASURES]].abs()
    columns = {
        "Vidur, less than": pd.Series(VIDUR),
        "held out, below the knee: mean": size[below].mean(),
        "worst": size[below].max(),
        "held out, others: worst": size[held_out & ~below].max(),
        "calibration: worst": size[~held_out].max(),
    }
    return pd.DataFrame(columns).loc[[*MEASURES]].rename(index=NAMES).round(2)


def _knee(record: Record) -> float:
    """Requests that end per second, of many that came at once, less the first and the last quarter of them."""
    finish_s = latency.latencies(record).groupby("request")["finish_s"].max().sort_values().to_numpy()
    quarter = len(finish_s) // 4
    return (len(finish_s) - 1 - 2 * quarter) / (finish_s[-1 - quarter] - finish_s[quarter])


def _asked(record: Record) -> pd.DataFrame:
    return record.requests.set_index("request").sort_index()[["arrival_s", "prompt_tokens", "output_tokens"]]
