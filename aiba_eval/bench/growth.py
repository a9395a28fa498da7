"""Growth: what a capture costs as words, tokens, steps, length and batch grow."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiba_eval.bench.contestants import contestants
from aiba_eval.bench.memory import measured
from aiba_eval.bench.race import Progress, full_bytes, run, spread
from aiba_eval.bench.subjects import CannotBench, Setting, Subject

#: axis → values, in the unit of :data:`LABELS`
AXES: dict[str, tuple[float, ...]] = {
    "words": (1, 2, 4, 8, 16, 32, 64),
    "tokens": (16, 32, 64, 128, 256, 512),
    "steps": (10, 25, 50, 100, 200),
    "length": (5, 10, 20, 45, 90, 180),
    "batch": (1, 2, 4, 8, 16),
}
LABELS = {
    "words": "words asked",
    "tokens": "text tokens",
    "steps": "steps",
    "length": "seconds of audio",
    "batch": "batch",
}
#: what is fixed on the other axes
BASE: dict[str, float] = {"words": 2, "tokens": 128, "steps": 4, "length": 10, "batch": 2}
CURVES = ("words", "words-reduced")


def setting_at(
    model: str, axis: str, value: float, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[Setting, int]:
    """The setting with one axis moved, and the steps of its runs."""
    at = {**BASE, axis: value}
    setting = Setting(
        model,
        batch=int(at["batch"]),
        seconds=at["length"],
        tokens=int(at["tokens"]),
        words=int(at["words"]),
        device=device,
        dtype=dtype,
    )
    return setting, int(at["steps"])


def grow(
    model: str,
    axes: Mapping[str, Sequence[float]] | None = None,
    *,
    rounds: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of capture along each axis, the others fixed at :data:`BASE`.

    Returns
    -------
    list of dict
        One row for each axis, value and curve (each step kept, or averaged as they come): ``forward`` and ``extra`` (beyond the
        bare model, paired within rounds) in seconds, medians with quartiles; ``extra_processor`` the same in processor time; ``held``, ``maps`` and ``full`` in bytes: retained by
        torch, of the arrays read, and of the same sites' full probabilities over all steps.

    Raises
    ------
    CannotBench
        An axis that there is not, or sizes that do not fit.
    """
    axes = AXES if axes is None else axes
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise CannotBench(f"growth has no axis {unknown[0]!r}; there are {', '.join(AXES)}")
    known = contestants()
    total, done = sum(len(values) for values in axes.values()), 0
    rows = []
    for axis, values in axes.items():
        for value in values:
            if progress is not None:
                progress(f"{model}: growth", done, total)
            done += 1
            setting, steps = setting_at(model, axis, value, device=device, dtype=dtype)
            subject = Subject(setting)
            full = sum(full_bytes(subject, captured=True).values()) * steps
            held = {name: _held(subject, name, steps) for name in CURVES}
            times = [{name: run(subject, known[name], steps) for name in ("bare", *CURVES)} for _ in range(rounds)]
            for name in CURVES:
                rows.append(
                    {
                        "axis": axis,
                        "value": value,
                        "curve": name,
                        "forward": spread([at[name].forward for at in times]),
                        "extra": spread([at[name].forward - at["bare"].forward for at in times]),
                        "extra_processor": spread(
                            [at[name].forward_processor - at["bare"].forward_processor for at in times]
                        ),
                        "bare": spread([at["bare"].forward for at in times]),
                        "held": held[name][0],
                        "maps": held[name][1],
                        "full": full,
                    }
                )
            subject.denoiser = None
            gc.collect()
    return rows


def _held(subject: Subject, name: str, steps: int) -> tuple[int, int]:
    """Bytes that a capture retains when its last forward is done, and those of its maps."""
    with contestants()[name].watch(subject) as watch:

        def forwards() -> None:
            subject.encode()
            for step in range(steps):
                subject.forward(step)

        _, memory = measured(forwards, subject.setting.device)
    held = memory.device_held + memory.host_held
    return held, sum(array.nbytes for array in watch.read().values())


def figure(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Curves: retained bytes above, extra time of a forward below, one column for each axis.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    drawn = Figure(figsize=(3.1 * len(axes), 5.6), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(2, len(axes), squeeze=False)
    styles: dict[str, dict[str, Any]] = {
        "words": {"color": "#1b6ca8", "marker": "o", "label": "every step kept"},
        "words-reduced": {"color": "#c8553d", "marker": "s", "label": "averaged over steps"},
    }
    reading: Sequence[tuple[str, Callable[[Mapping[str, Any]], float]]] = (
        ("retained, MiB", lambda row: row["held"] / 2**20),
        ("extra processor time of a forward, ms", lambda row: 1e3 * row["extra_processor"]["median"]),
    )
    for column, axis in enumerate(axes):
        here = {curve: [row for row in rows if (row["axis"], row["curve"]) == (axis, curve)] for curve in styles}
        values = [row["value"] for row in here["words"]]
        panels[0][column].plot(
            values, [row["full"] / 2**20 for row in here["words"]], ":", color="0.5", label="full maps"
        )
        for line, (label, read) in enumerate(reading):
            panel = panels[line][column]
            for curve, style in styles.items():
                panel.plot(values, [read(row) for row in here[curve]], lw=1.6, ms=4, **style)
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{value:g}" for value in values])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_xlabel(LABELS[axis])
            if column == 0:
                panel.set_ylabel(label)
        panels[0][column].set_yscale("log")
    panels[0][0].legend(fontsize=8)
    if title:
        drawn.suptitle(title, fontsize=10)
    drawn.savefig(path, dpi=110)
