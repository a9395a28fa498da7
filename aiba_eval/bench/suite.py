"""The whole benchmark: races of several models, start-up, or growth, written into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aiba_eval.bench import growth, models, results
from aiba_eval.bench.contestants import contestants
from aiba_eval.bench.race import Progress, race_all
from aiba_eval.bench.startup import startup
from aiba_eval.bench.subjects import CannotBench, Setting
from aiba_eval.loading import threads_of
from aiba_eval.outputs import OutputFolder, write_json

#: what is raced unless others are named
MODELS = ("audioldm2", "stable-audio")
CONTESTANTS = ("words", "tokens", "all", "paper", "paper-all")


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and where it was written.

    Attributes
    ----------
    document : everything, as ``bench.json`` has it
    out : the folder
    files : written into it
    """

    document: dict[str, Any]
    out: Path
    files: list[str]


def benchmark(
    model: Sequence[str] = MODELS,
    contestant: Sequence[str] = CONTESTANTS,
    *,
    batch: int = 2,
    length: float | None = None,
    tokens: int | None = None,
    words: int = 2,
    steps: int = 4,
    rounds: int = 7,
    threads: int | None = None,
    compiled: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    out: str | Path = "aiba-bench",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Race contestants on denoisers of random weights, and measure start-up.

    Parameters
    ----------
    model, contestant : names; see :data:`aiba_eval.bench.models.ARCHITECTURES` and
        :func:`aiba_eval.bench.contestants.contestants`
    length : seconds of audio, None for each model's usual length
    tokens : keys of the text stream, None for each model's usual number
    words : words that are asked for
    steps : forwards of a run
    threads : of torch, None to leave them as they are
    compiled : compile the denoisers with ``torch.compile``
    out : folder for ``results.json``, ``table.md`` and ``bench.json``

    Raises
    ------
    CannotBench, FolderInUse
    """
    where, kind = place(device, dtype)
    settings = [Setting(name, batch, length, tokens, words, where, kind, compiled) for name in model]
    _check(model, contestant)
    folder = OutputFolder(out, "bench", overwrite=overwrite)
    with threads_of(threads):
        before = results.machine(where)
        races = race_all(settings, contestant, rounds=rounds, steps=steps, progress=progress)
        document = results.document(races, rounds=rounds, before=before)
        document["startup"] = startup(model, progress=progress)
    write_json(folder.file("results.json"), document)
    folder.file("table.md").write_text(results.markdown(document), encoding="utf-8")
    folder.finish({"models": list(model), "contestants": list(contestant)})
    return Benchmark(document, folder.path, folder.files)


def benchmark_growth(
    model: str = "stable-audio-small",
    *,
    axes: Sequence[str] | None = None,
    rounds: int = 3,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    out: str | Path = "aiba-bench",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure how time and memory grow with words, tokens, steps, length and batch.

    Parameters
    ----------
    axes : some of :data:`aiba_eval.bench.growth.AXES`, None for all
    out : folder for ``growth.json``, ``growth.png`` and ``bench.json``

    The others are those of :func:`benchmark`.

    Raises
    ------
    CannotBench, FolderInUse
    """
    where, kind = place(device, dtype)
    _check([model], ())
    folder = OutputFolder(out, "bench", overwrite=overwrite)
    chosen = None if axes is None else {axis: growth.AXES.get(axis, ()) for axis in axes}
    with threads_of(threads):
        before = results.machine(where)
        rows = growth.grow(model, chosen, rounds=rounds, device=where, dtype=kind, progress=progress)
        document = {
            "machine": {**before, "load_after": results.machine(where)["load"]},
            "rounds": rounds,
            "model": model,
            "summary": models.ARCHITECTURES[model].summary,
            "device": where,
            "dtype": kind,
            "base": growth.BASE,
            "rows": rows,
        }
    write_json(folder.file("growth.json"), document)
    growth.figure(rows, folder.file("growth.png"))
    folder.finish({"model": model})
    return Benchmark(document, folder.path, folder.files)


def place(device: str, dtype: str) -> tuple[str, str]:
    """The device and dtype that ``auto`` stands for: a GPU with bfloat16 if there is one, else the CPU with float32.

    Raises
    ------
    CannotBench
        torch has no such device or dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CannotBench(f"torch {torch.__version__} sees no GPU, so {device} cannot be measured: use --device cpu")
    if not device.startswith(("cpu", "cuda")):
        raise CannotBench(f"device must be cpu or cuda, got {device!r}: memory is counted on these")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CannotBench(f"torch has no dtype {dtype!r}; use float32, bfloat16 or float16")
    return device, dtype


def _check(model: Sequence[str], contestant: Sequence[str]) -> None:
    """Refuse an unknown name before anything is built."""
    for noun, given, known in (("model", model, models.ARCHITECTURES), ("contestant", contestant, contestants())):
        for name in given:
            if name not in known:
                raise CannotBench(f"no {noun} is named {name!r} for a benchmark; there are {', '.join(known)}")
