"""From what a capture has kept to labelled arrays."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from aiba_hooks.backbone import Segment
from aiba_hooks.runs import Run
from aiba_hooks.stores import Store

if TYPE_CHECKING:
    from aiba_hooks.capturing import Capture


def build(capture: Capture, run: Run, store: Store) -> xr.DataArray | None:
    """One site's labelled array, or None if nothing of it was kept in this run."""
    if not store.values and not store.sums:
        return None
    if run.conditioning is None or capture.backbone is None:
        return _build_plain(capture, store)
    reduced = bool(store.sums)
    values = np.stack(
        [_values(store, branch, reduced) for branch in store.branches]
    )  # [branch, (step), row, (head), ...]
    if run.order is not None and len(run.order) == values.shape[1 if reduced else 2]:
        values = np.take(values, run.order, axis=1 if reduced else 2)
    if not reduced:
        values = values.swapaxes(1, 2)  # prompt before step
    # columns before positions: [branch, prompt, (step), (head), column, query]
    values = values[..., None, :] if store.mode == "received" else values.swapaxes(-1, -2)
    dims = ["branch", "prompt", *([] if reduced else ["step"]), *(["head"] if capture.options.heads == "all" else [])]
    column = "key" if store.mode == "full" else "word"
    values = store.lattice.place(values)
    # all coordinates at once: each assignment would align them anew
    coords = {**store.lattice.coords(), **_row_coords(run)}
    if column == "word":
        coords["word"] = store.names
    else:
        coords |= _key_coords(run, store, values.shape[len(dims)])
    if not reduced:
        coords |= _step_coords(capture, run, sorted(store.seen))
    array = xr.DataArray(
        np.ascontiguousarray(values, dtype=np.float32), coords, dims=[*dims, column, *store.lattice.dims]
    )
    if column == "word":
        array = _blank_missing(array, run, store)
    array = array.assign_coords(branch=store.branches) if len(store.branches) > 1 else array.isel(branch=0)
    array.name = "attention"
    array.attrs.update(_provenance(capture, run, store))
    return array


def _values(store: Store, branch: str, reduced: bool) -> np.ndarray:
    if reduced:
        weight = store.weight[branch]
        return _numpy(store.sums[branch] / weight if weight else store.sums[branch])
    parts = {step: _numpy(part) for (step, of), part in store.values.items() if of == branch}
    # guidance may be limited to some of the steps: the others have no such branch
    missing = np.full_like(next(iter(parts.values())), np.nan)
    return np.stack([parts.get(step, missing) for step in sorted(store.seen)])


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _build_plain(capture: Capture, store: Store) -> xr.DataArray:
    dims = ["batch", *(["head"] if capture.options.heads == "all" else []), "query", "key"]
    if store.sums:
        array = xr.DataArray(_numpy(store.sums[""] / store.weight[""]), dims=dims)
    else:
        calls = sorted(store.seen)
        parts = [_numpy(store.values[call, ""]) for call in calls]
        # a shape that changes between forwards is padded with NaN
        shape = tuple(max(part.shape[axis] for part in parts) for axis in range(parts[0].ndim))
        stacked = np.full((len(parts), *shape), np.nan, dtype=np.float32)
        for target, part in zip(stacked, parts, strict=True):
            target[tuple(slice(size) for size in part.shape)] = part
        array = xr.DataArray(stacked, dims=["call", *dims], coords={"call": calls})
    array.name = "attention"
    array.attrs.update(_provenance(capture, None, store))
    return array


def _row_coords(run: Run) -> dict[str, Any]:
    conditioning = run.conditioning
    assert conditioning is not None
    prompts = conditioning.spread(conditioning.prompts)
    waveforms = list(range(conditioning.waveforms or 1)) * len(conditioning.prompts)
    if run.order is not None:
        prompts = [prompts[row] for row in run.order]
        waveforms = [waveforms[row] for row in run.order]
    return {"prompt": ("prompt", prompts), "waveform": ("prompt", waveforms)}


def _step_coords(capture: Capture, run: Run, steps: Sequence[int]) -> dict[str, Any]:
    coords: dict[str, Any] = {"step": ("step", list(steps))}
    timesteps = [_scalar(run.steps[step].timestep) for step in steps]
    sigmas = [_scalar(run.steps[step].sigma) for step in steps]
    if all(value is not None for value in timesteps):
        coords["timestep"] = ("step", np.asarray(timesteps, dtype=float))
        if any(value is None for value in sigmas):
            assert capture.backbone is not None
            sigmas = [capture.backbone.sigma(capture.target, value) for value in timesteps if value is not None]
    if all(value is not None for value in sigmas):
        coords["sigma"] = ("step", np.asarray(sigmas, dtype=float))
    return coords


def _scalar(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return float(value.flatten()[0])
    return float(value)


def _blank_missing(array: xr.DataArray, run: Run, store: Store) -> xr.DataArray:
    """NaN where a prompt does not contain a word; a group of other keys that it lacks holds no mass, which is 0."""
    if not store.groups or run.conditioning is None:
        return array
    rows = run.conditioning.spread(store.groups)
    if run.order is not None:
        rows = [rows[row] for row in run.order]
    present = xr.DataArray(
        [[name in groups or name.startswith("(") for name in store.names] for groups in rows], dims=["prompt", "word"]
    )
    return array if bool(present.all()) else array.where(present)


def _key_coords(run: Run, store: Store, keys: int) -> dict[str, Any]:
    """Token texts and roles along ``key``, per prompt, where the streams are known."""
    coords: dict[str, Any] = {"key": np.arange(keys)}
    assert run.conditioning is not None
    streams = {stream.name: stream for stream in run.conditioning.streams}
    layout = store.segments or [Segment(keys, store.site.stream or "")]
    if any(s.stream is not None and (s.stream not in streams or streams[s.stream].length != s.length) for s in layout):
        return coords
    rows = run.conditioning.spread(range(len(run.conditioning.prompts)))
    if run.order is not None:
        rows = [rows[row] for row in run.order]
    tokens: list[list[str]] = [[] for _ in rows]
    roles: list[list[str]] = [[] for _ in rows]
    for segment in layout:
        for i, row in enumerate(rows):
            if segment.stream is None:
                tokens[i] += [f"audio {position}" for position in range(segment.length)]
                roles[i] += ["audio"] * segment.length
            else:
                tokens[i] += streams[segment.stream].tokens[row]
                roles[i] += streams[segment.stream].roles[row]
    coords["token"] = (("prompt", "key"), np.array(tokens, dtype=str))
    coords["role"] = (("prompt", "key"), np.array(roles, dtype=str))
    return coords


def _provenance(capture: Capture, run: Run | None, store: Store) -> dict[str, Any]:
    site = store.site
    attrs: dict[str, Any] = {
        "site": site.name,
        "kernel": site.kernel,
        "tag": site.tag.kind,
        "stream": site.tag.stream or "",
        "evidence": site.tag.evidence,
        "model": type(capture.target).__name__,
        "denoiser": type(capture._denoiser).__name__,
        "backbone": capture.backbone.name if capture.backbone is not None else "",
        "keep": capture.options.keep,
        "pooling": capture.options.pooling if capture.options.keep == "pooled" else "",
        "heads": capture.options.heads,
        "branch": "+".join(store.branches),
        "versions": " ".join(f"{name}={_version(name)}" for name in ("aiba", "torch", "diffusers", "transformers")),
    }
    if run is not None:
        attrs["seconds_per_column"] = float(store.lattice.seconds_per_column)
        attrs["time_start"] = float(store.lattice.start)
        if run.seeds is not None:
            attrs["seed"] = run.seeds[0] if len(run.seeds) == 1 else run.seeds
    return attrs


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
