"""A race: contestants in turn, round after round, in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from aiba_eval.bench.contestants import Contestant, Refused, contestants, sites_of
from aiba_eval.bench.memory import Memory, measured
from aiba_eval.bench.subjects import CannotBench, Setting, Subject

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Round:
    """Seconds of one run of one contestant.

    Attributes
    ----------
    enter : until the block is entered
    first : of the first forward, in which capture looks at every site
    forward : of each further forward
    read : from the last forward to the maps as arrays, leaving the block included
    whole : all of it
    forward_processor, whole_processor : the same in processor time of this process, all threads. Waiting for a processor that
        others use is not in it, so on a shared machine it says more; what a GPU does is not in it either
    """

    enter: float
    first: float
    forward: float
    read: float
    whole: float
    forward_processor: float
    whole_processor: float


#: parts of a round that are compared with the bare model's
_COMPARED = ("forward", "whole", "forward_processor", "whole_processor")


@dataclass
class Entry:
    """A contestant's results on one subject.

    Attributes
    ----------
    refused : why it did not run; the rest is empty then
    rounds : one for each round, in order; the same index is the same round for all
    memory : of the forwards, the block still open, beyond what the bare model takes; None for the bare model
    maps : bytes of the arrays that were read
    """

    contestant: Contestant
    refused: str | None = None
    rounds: list[Round] = field(default_factory=list)
    memory: Memory | None = None
    maps: int = 0


@dataclass
class Race:
    """One subject's results.

    Attributes
    ----------
    entries : the bare model first
    steps : forwards of a run
    full : bytes that the probabilities of one forward take, each head and branch, float32: by kind of site
    """

    subject: Subject
    steps: int
    entries: list[Entry]
    full: dict[str, int]
    bare_memory: Memory


def race(
    subject: Subject,
    chosen: Sequence[str],
    *,
    rounds: int = 7,
    steps: int = 4,
    progress: Progress | None = None,
) -> Race:
    """Race contestants on a subject.

    Before the first round each runs once unmeasured in time, and that run's memory is counted. Rounds begin with another
    contestant each.

    Parameters
    ----------
    chosen : names of contestants; the bare model always takes part
    rounds : timed runs of each
    steps : forwards of a run, the first apart from the others

    Raises
    ------
    CannotBench
        No such contestant, or too few rounds or steps.
    """
    known = contestants()
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise CannotBench(f"no contestant is named {unknown[0]!r}; there are {', '.join(known)}")
    if rounds < 1 or steps < 2:
        raise CannotBench(
            f"a race needs 1 round and 2 steps (the first is apart) at least, got {rounds} rounds and {steps} steps"
        )
    say = progress or (lambda what, done, total: None)
    name = subject.setting.model
    full = full_bytes(subject)
    entries = []
    bare_memory = Memory(0, 0)
    starting = list(dict.fromkeys(("bare", *chosen)))
    for done, contestant in enumerate(known[n] for n in starting):
        say(f"{name}: memory of each", done, len(starting))
        entry = Entry(contestant)
        entries.append(entry)
        try:
            if subject.setting.compiled:
                run(subject, contestant, steps)  # compilation allocates too
            memory, entry.maps = weigh(subject, contestant, steps)
        except Exception as error:
            if isinstance(error, Refused):
                entry.refused = str(error)
            elif contestant.foreign:
                entry.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            else:
                raise
            continue
        if contestant.name == "bare":
            bare_memory = memory
        else:
            entry.memory = memory.beyond(bare_memory)
    running = [entry for entry in entries if entry.refused is None]
    for index in range(rounds):
        say(f"{name}: rounds", index, rounds)
        turn = index % len(running)
        for entry in (*running[turn:], *running[:turn]):
            entry.rounds.append(run(subject, entry.contestant, steps))
    say(f"{name}: rounds", rounds, rounds)
    return Race(subject, steps, entries, full, bare_memory)


def run(subject: Subject, contestant: Contestant, steps: int) -> Round:
    """One timed run: enter, ``steps`` forwards, leave, read."""
    gc.collect()  # not while the clock runs

    def now() -> tuple[float, float]:
        subject.synchronise()
        return time.perf_counter(), time.process_time()

    started = now()
    with contestant.watch(subject) as watch:
        entered = now()
        subject.encode()
        subject.forward(0)
        first = now()
        for step in range(1, steps):
            subject.forward(step)
        last = now()
    watch.read()
    end = now()
    return Round(
        enter=entered[0] - started[0],
        first=first[0] - entered[0],
        forward=(last[0] - first[0]) / (steps - 1),
        read=end[0] - last[0],
        whole=end[0] - started[0],
        forward_processor=(last[1] - first[1]) / (steps - 1),
        whole_processor=end[1] - started[1],
    )


def weigh(subject: Subject, contestant: Contestant, steps: int) -> tuple[Memory, int]:
    """Memory of a run's forwards, the block still open; and bytes of the maps that were read."""
    with contestant.watch(subject) as watch:

        def forwards() -> None:
            subject.encode()
            for step in range(steps):
                subject.forward(step)

        _, memory = measured(forwards, subject.setting.device)
    maps = sum(np.asarray(array).nbytes for array in watch.read().values())
    return memory, maps


def full_bytes(subject: Subject, *, captured: bool = False) -> dict[str, int]:
    """Bytes of one forward's attention probabilities, each head and row of the batch, float32, by kind of site.

    Parameters
    ----------
    captured : count only the sites that a capture of words keeps
    """
    found: dict[str, int] = {}
    for site in sites_of(subject):
        if captured and not site.captured:
            continue
        rows, heads, queries, _ = site.query_shape
        found[site.tag.kind] = found.get(site.tag.kind, 0) + 4 * rows * heads * queries * site.key_shape[-2]
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def summary(result: Race) -> list[dict[str, Any]]:
    """One row for each contestant: times as medians with quartiles, ratios to the bare model paired within rounds."""
    bare = result.entries[0].rounds
    rows = []
    for entry in result.entries:
        row: dict[str, Any] = {"contestant": entry.contestant.name, "keeps": entry.contestant.keeps}
        if entry.refused is not None:
            rows.append(row | {"not_run": entry.refused})
            continue
        for part in ("enter", "first", "read", *_COMPARED):
            row[part] = spread([getattr(one, part) for one in entry.rounds])
        for part in _COMPARED:
            pairs = zip(entry.rounds, bare, strict=True)
            row[f"{part}_ratio"] = spread([getattr(own, part) / getattr(base, part) for own, base in pairs])
        row["memory"] = asdict(entry.memory if entry.memory is not None else result.bare_memory)
        row["maps"] = entry.maps
        rows.append(row)
    return rows


def race_all(
    settings: Sequence[Setting],
    chosen: Sequence[str],
    *,
    rounds: int = 7,
    steps: int = 4,
    progress: Progress | None = None,
) -> list[Race]:
    """Race on one subject after another; each is built when it is needed and let go."""
    races = []
    for setting in settings:
        if progress is not None:
            progress(f"{setting.model}: random weights", 0, None)
        subject = Subject(setting)
        result = race(subject, chosen, rounds=rounds, steps=steps, progress=progress)
        subject.denoiser = None  # a gigabyte or more
        gc.collect()
        if setting.device.startswith("cuda"):
            torch.cuda.empty_cache()
        races.append(result)
    return races
