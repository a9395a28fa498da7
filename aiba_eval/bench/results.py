"""Results of a race as JSON and as a Markdown table, with the machine and the versions that they hold for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aiba_eval.bench.race import Race, summary

#: packages whose versions a result depends on
_PACKAGES = ("aiba", "torch", "diffusers", "numpy", "xarray", "triton", "attention-map-diffusers", "daam")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, load of the machine at this moment, GPU, system and versions. No name of the machine itself."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def document(races: Sequence[Race], *, rounds: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured.

    Parameters
    ----------
    before : :func:`machine` before the first race; its load beside the one afterwards says whether the machine was shared
    """
    device = races[0].subject.setting.device if races else "cpu"
    return {
        "machine": {**before, "load_after": machine(device)["load"]},
        "rounds": rounds,
        "races": [
            {
                "model": one.subject.setting.model,
                "summary": one.subject.architecture.summary,
                "setting": {
                    "batch": one.subject.setting.batch,
                    "seconds": round(one.subject.seconds, 2),
                    "columns": one.subject.shape.columns,
                    "tokens": one.subject.shape.tokens,
                    "words": one.subject.setting.words,
                    "dtype": one.subject.setting.dtype,
                    "device": one.subject.setting.device,
                    "compiled": one.subject.setting.compiled,
                    "steps": one.steps,
                },
                "full_bytes_per_forward": one.full,
                "contestants": summary(one),
            }
            for one in races
        ],
    }


#: columns of the tables: heading, how a row shows it
HEADINGS = (
    "",
    "forward",
    "ratio",
    "ratio, processor",
    "run and reading",
    "ratio",
    "enter",
    "peak extra",
    "retained",
    "maps",
)


#: what these are called in code
COLUMNS = (
    "name",
    "forward",
    "ratio",
    "processor_ratio",
    "whole",
    "whole_ratio",
    "enter",
    "peak",
    "held",
    "maps",
)


def cells(race: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """One contestant's row of the table, as text."""
    name = row["contestant"]
    if "not_run" in row:
        return [name, f"not run: {row['not_run']}", *[""] * (len(HEADINGS) - 2)]
    memory = row["memory"]
    gpu = str(race["setting"]["device"]).startswith("cuda")
    peak, held = (
        _both(memory[f"host_{part}"], memory[f"device_{part}"] if gpu else None, name == "bare")
        for part in ("peak", "held")
    )
    own = name == "bare"
    return [
        name,
        _with_half(row["forward"]),
        "1" if own else _ratio(row["forward_ratio"]),
        "1" if own else _ratio(row["forward_processor_ratio"]),
        duration(row["whole"]["median"]),
        "1" if own else _ratio(row["whole_ratio"]),
        "" if own else duration(row["enter"]["median"]),
        peak,
        held,
        "" if own else size(row["maps"]),
    ]


def duration(seconds: float, digits: int = 3) -> str:
    """Seconds as a person reads them."""
    value, unit = (seconds, "s") if abs(seconds) >= 1 else (1e3 * seconds, "ms")
    return f"{value:.0f} {unit}" if abs(value) >= 10**digits else f"{value:.{digits}g} {unit}"


def _with_half(found: Mapping[str, float]) -> str:
    return f"{duration(found['median'])} ± {duration((found['high'] - found['low']) / 2, 2)}"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def _both(host: int, device: int | None, bare: bool) -> str:
    """Memory of host and device; the bare model's own is what the others are beyond."""
    shown = size(host) if device is None else f"{size(host)} host, {size(device)} device"
    return f"({shown})" if bare else shown


def size(count: float) -> str:
    """Bytes as a person reads them, with a sign where they are less than none."""
    sign = "−" if count < 0 else ""
    count = abs(count)
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{sign}{count / scale:.3g} {unit}"
    return f"{sign}{count:.0f} B"


def heading(race: Mapping[str, Any]) -> str:
    """What a table is of."""
    setting = race["setting"]
    length = f", {setting['seconds']:g} s" if setting["seconds"] else ""
    compiled = ", compiled" if setting["compiled"] else ""
    return (
        f"{race['model']} ({race['summary']}): {setting['device']}, {setting['dtype']}, batch {setting['batch']}{length}, "
        f"{setting['columns']} columns, {setting['tokens']} text tokens, {setting['words']} words asked, "
        f"{setting['steps']} forwards a run{compiled}"
    )


def on_what(document: Mapping[str, Any]) -> str:
    """The machine and the versions in one sentence."""
    found = document["machine"]
    gpu = f"{found['gpu']} (CUDA {found['cuda']}), " if "gpu" in found else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{gpu}{found['processor']}, {found['cores']} cores, {found['threads']} thread{'s' if found['threads'] != 1 else ''}; "
        f"{found['system']}, Python {found['python']}; {versions}; load average {found['load']} before, {found['load_after']} after; "
        f"{document['rounds']} interleaved rounds"
    )


def shared(document: Mapping[str, Any]) -> str:
    """A sentence about the noise, where others used the machine too: more was waiting to run than it has cores."""
    found = document["machine"]
    if max(found["load"] or 0, found["load_after"] or 0) <= found["cores"]:
        return ""
    return (
        " **The machine was shared**: times and their ratios carry that noise. The ratio of processor time does so less, the bytes "
        "not at all."
    )


def markdown(document: Mapping[str, Any]) -> str:
    """Tables of every race, each under what it is of."""
    lines = [f"Measured on {on_what(document)}.{shared(document)}", ""]
    for race in document["races"]:
        lines += [f"**{heading(race)}**", "", "| " + " | ".join(HEADINGS) + " |"]
        lines.append("|---|" + "---:|" * (len(HEADINGS) - 1))
        lines += ["| " + " | ".join(cells(race, row)) + " |" for row in race["contestants"]]
        full = ", ".join(f"{kind} {size(count)}" for kind, count in sorted(race["full_bytes_per_forward"].items()))
        lines += ["", f"The probabilities of one forward, every head, in float32: {full}.", ""]
    if "startup" in document:
        lines += startup_lines(document["startup"])
    return "\n".join(lines).rstrip() + "\n"


def startup_lines(startup: Mapping[str, Any]) -> list[str]:
    """What importing and entering take, as a Markdown table."""
    named = {"`from aiba_hooks import capture` beyond `import torch`, in a fresh process": startup["import"]}
    named |= {f"entering a capture of {name}": found for name, found in startup["enter"].items()}
    lines = [f"| start-up, medians of {len(startup['import']['seconds'])} | time | processor time |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {duration(found['median'])} | {duration(found['processor'])} |" for name, found in named.items()
    ]
    return lines
