"""One model's attention and effect maps of one clip, and a folder that keeps them.

For each noise level: the word's cross-attention on the noised latent of the mix, projected; what the predicted log-mel loses
without the word; and the effect masses, in each of :data:`QUANTITIES`, of edits that should do something, or nothing:

========= ==================================================================================
present   a word of the clip put last in the prompt, against the prompt without it
absent    a word that the clip does not have, in its place, against the same
neutral   the prompt against itself without "and", in reverse order, and after "a song with"
========= ==================================================================================

Present and absent words are put at the same place of a text of the same length, as :func:`aiba_eval.effects.presence` does: an edit of
a shorter text does more, in an untrained model too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval.clips import Clip
from aiba_eval.demo import at_timestep
from aiba_eval.effects import Part, Quantity, edit_quantities, effect_mass, listed, without_word
from aiba_eval.grid import MelGrid, project
from aiba_eval.outputs import OutputFolder, dump_json, write_json
from aiba_eval.probe import CannotProbe, probe

Row = dict[str, Any]

#: quantities of effect masses, with their part, as :func:`aiba_eval.effects.effect_map` takes them: first that of the maps
QUANTITIES: dict[Quantity, Part] = {"log": "positive", "energy": "positive", "fit": "signed"}
#: what a profile tells of a site, as :class:`aiba_eval.diagnostics.SiteSummary` defines it
PROFILE = ("entropy", "word_mass", "padding_mass", "special_mass")


class CannotCompare(ValueError):
    """Models, pieces or words that cannot be compared. The message says what to do."""


@dataclass(frozen=True)
class ClipMaps:
    """What one model shows of one clip.

    Attributes
    ----------
    attention : float32 (level, word, time, mel)
    effect : float32 (level, word, time, mel) in nats, or None
    masses : (quantity, level, edit), or None
    edits : (role, label) of each edit: ``("present", "bass")``
    lattice : (time, frequency) of the finest attention site
    frequency_resolved : False if no attention site has a frequency axis
    sites : entropy and masses of every site at every level
    reason : why there are no effect maps
    """

    attention: NDArray[np.float32]
    effect: NDArray[np.float32] | None
    masses: NDArray[np.float64] | None
    edits: tuple[tuple[str, str], ...]
    lattice: tuple[int, int]
    frequency_resolved: bool
    sites: list[Row]
    reason: str


def edits_of(clip: Clip) -> tuple[dict[str, tuple[str, str]], tuple[tuple[str, str], ...]]:
    """Pairs of texts for :func:`aiba_eval.effects.edit_maps`, and (role, label) of those that are masses.

    The maps of the words themselves, ``"map bass"``, are of the prompt against the same list less the word.
    """
    words, prompt = clip.words, clip.prompt
    less = {word: listed([other for other in words if other != word]) for word in words}
    edits = {f"map {word}": (prompt, less[word]) for word in words}
    others: dict[tuple[str, str], tuple[str, str]] = {}
    for word in words:
        others["present", word] = (listed([*(o for o in words if o != word), word]), less[word])
    for replaced, word in zip(itertools.cycle(words), clip.absent, strict=False):
        others["absent", word] = (listed([*(o for o in words if o != replaced), word]), less[replaced])
    others["neutral", "without and"] = (prompt, without_word(prompt, "and"))
    others["neutral", "reversed"] = (prompt, listed(words[::-1]))
    others["neutral", "a song with"] = (prompt, f"a song with {prompt}")
    return edits | {f"{role} {label}": pair for (role, label), pair in others.items()}, tuple(others)


def clip_maps(
    label: str,
    pipeline: Any,
    clip: Clip,
    grid: MelGrid,
    *,
    timesteps: Sequence[int],
    draws: int,
    seed: int,
    layers: str | Sequence[str] = "*",
    effects: bool = True,
    batch: int = 16,
) -> ClipMaps:
    """Attention and effect maps of one clip, on the same noised latents.

    Parameters
    ----------
    label : str
        What messages call the model.
    pipeline, clip
    grid : MelGrid
        With a duration.
    timesteps, draws, seed, layers, effects, batch
        As in :func:`aiba_eval.compare`.

    Raises
    ------
    CannotCompare
        The model does not cover the grid, has no such timestep or no such layer.
    CannotProbe, aiba_hooks.AibaError
        The model cannot be probed. One that can but cannot decode has no effect maps, and ``reason`` says why.
    """
    from aiba_eval.diagnostics import diagnose

    try:
        maps = probe(pipeline, clip.mix, clip.sample_rate, clip.prompt, timesteps=timesteps, draws=draws, seed=seed)
        by_level = {level: at_timestep(maps, level) for level in timesteps}
        projected = [project(at, grid, layers=layers) for at in by_level.values()]
    except ValueError as error:  # a timestep outside the range of training, a pattern that no site matches
        raise CannotCompare(f"{label}: {error}") from error
    attention = np.stack([one.sel(word=list(clip.words)).values[0] for one in projected])
    _check_cover(label, attention, grid)
    sites = [
        {"level": level, "site": site.name, "lattice": list(site.lattice), **{k: getattr(site, k) for k in PROFILE}}
        for level, at in by_level.items()
        for site in diagnose(at).sites
        if site.words
    ]
    effect, masses, reason = None, None, "effect maps were not asked for"
    roles: tuple[tuple[str, str], ...] = ()
    if effects:
        try:
            effect, masses, roles = _effects(
                label, pipeline, clip, grid, timesteps=timesteps, draws=draws, seed=seed, batch=batch
            )
            reason = ""
        except CannotProbe as error:
            reason = str(error)
    columns, bands = projected[0].attrs["finest_lattice"]
    resolved = bool(projected[0].attrs["frequency_resolved"])
    return ClipMaps(attention, effect, masses, roles, (int(columns), int(bands)), resolved, sites, reason)


def _effects(
    label: str, pipeline: Any, clip: Clip, grid: MelGrid, **options: Any
) -> tuple[NDArray[np.float32], NDArray[np.float64], tuple[tuple[str, str], ...]]:
    """Effect maps of the words; masses and (role, label) of the edits."""
    edits, roles = edits_of(clip)
    found = edit_quantities(
        pipeline,
        edits,
        list(QUANTITIES.items()),
        waveform=clip.mix,
        sample_rate=clip.sample_rate,
        levels="each",
        grid=grid,
        **options,
    )
    effect = found[0].sel(word=[f"map {word}" for word in clip.words]).values
    _check_cover(label, effect, grid)
    asked = [" ".join(role) for role in roles]
    masses = np.stack([effect_mass(maps).sel(word=asked).values.astype(float) for maps in found])
    return effect, masses, roles


def _check_cover(label: str, maps: NDArray[np.float32], grid: MelGrid) -> None:
    inside: NDArray[np.bool_] = np.asarray(np.isfinite(maps).all(axis=(0, 1)))
    if inside.all():
        return
    seconds = float(grid.duration or 0.0)
    raise CannotCompare(
        f"the maps of {label} cover {inside.any(axis=1).mean() * seconds:.2f} of {seconds:g} s and {int(inside.any(axis=0).sum())} "
        f"of {grid.mel} mel rows: models of another clip length or mel range cannot be compared on this grid. Choose seconds and "
        "a grid that both cover"
    )


class Store:
    """Results by model and piece, in a folder if there is one, so that a stopped run goes on."""

    #: the folder's entry that holds them
    WORK = "work"

    def __init__(self, folder: OutputFolder | None) -> None:
        self.folder = folder

    def piece(self, label: str, name: str, make: Callable[[], list[ClipMaps]]) -> list[ClipMaps]:
        """The maps of a piece's clips: read, or made and kept."""
        path = self._path(label, f"{name}.npz")
        if path is not None and path.is_file():
            return _read(path)
        made = make()
        if path is not None:
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("wb") as file:
                np.savez_compressed(file, **_arrays(made))
            partial.replace(path)
        return made

    def numbers(self, label: str, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Numbers by name: read, or made and kept."""
        path = self._path(label, f"{name}.json")
        if path is not None and path.is_file():
            return _numbers(json.loads(path.read_text(encoding="utf-8")))
        made = make()
        if path is not None:
            write_json(path, made)
        return made

    def _path(self, label: str, file: str) -> Path | None:
        if self.folder is None:
            return None
        # what a label holds may be no file name; the digest keeps two labels apart
        readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)[:40]
        under = f"{readable}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        path = self.folder.file(self.WORK) / under / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _arrays(made: Sequence[ClipMaps]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    about = []
    for number, one in enumerate(made):
        arrays[f"attention{number}"] = one.attention
        for name in _EFFECTS:
            if (value := getattr(one, name)) is not None:
                arrays[f"{name}{number}"] = value
        about.append({name: getattr(one, name) for name in _PLAIN})
    return {**arrays, "about": np.asarray(dump_json(about))}


_EFFECTS = ("effect", "masses")
_PLAIN = ("edits", "lattice", "frequency_resolved", "sites", "reason")


def _read(path: Path) -> list[ClipMaps]:
    with np.load(path, allow_pickle=False) as held:
        return [
            ClipMaps(
                attention=held[f"attention{number}"],
                **{name: held.get(f"{name}{number}") for name in _EFFECTS},
                edits=tuple((role, label) for role, label in about["edits"]),
                lattice=(about["lattice"][0], about["lattice"][1]),
                frequency_resolved=about["frequency_resolved"],
                sites=[{**site, **_numbers({key: site[key] for key in PROFILE})} for site in about["sites"]],
                reason=about["reason"],
            )
            for number, about in enumerate(json.loads(str(held["about"])))
        ]


def _numbers(read: Mapping[str, float | None]) -> dict[str, float]:
    """JSON has no NaN: it was written as null."""
    return {key: float("nan") if value is None else float(value) for key, value in read.items()}
