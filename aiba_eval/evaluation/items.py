"""What one item of an evaluation is: the audio, the maps on the grid, and what they are scored against."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import templates
from aiba_eval.datasets.sections import Section, sections
from aiba_eval.demo import UNNAMED, at_timestep, prompt_of
from aiba_eval.evaluation.configuration import CannotEvaluate, Configuration, Pooling, Variant
from aiba_eval.grid import MelGrid, project
from aiba_eval.outputs import dump_json
from aiba_eval.probe import normalise, probe
from aiba_eval.run import generate

if TYPE_CHECKING:
    import xarray
    from xarray import DataArray

    from aiba_eval.datasets import Piece
    from aiba_hooks import AttentionMaps

Row = dict[str, Any]
#: coordinates of fields.zarr that are text
LABELS = ("variant", "target", "word")
Floats = NDArray[np.float64]
#: site → weight
Weights = Mapping[str, float]


class Unusable(Exception):
    """An item that has nothing to score. The message says why; it is skipped and counted."""


@dataclass(frozen=True)
class Material:
    """Audio to be probed and what it is scored against.

    Attributes
    ----------
    section : the window
    words : instruments that the prompt names, in its order
    mix : float32 (samples,), mean removed, peak 0.5
    powers : power mels (time, mel) of every sounding instrument; empty where the dataset has notes
    truth : its masks and shares
    """

    section: Section
    words: tuple[str, ...]
    mix: NDArray[np.float32] = field(repr=False)
    powers: Mapping[str, NDArray[np.float32]] = field(repr=False)
    truth: templates.GroundTruth = field(repr=False)

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return prompt_of(self.words)


def grid_for(configuration: Configuration) -> MelGrid:
    """The grid over a window or a generated sample."""
    return MelGrid(configuration.time, configuration.mel, duration=float(configuration.seconds))


def window_of(piece: Piece, window: int, configuration: Configuration) -> tuple[Section, tuple[str, ...]]:
    """The ``window``-th drawn window of a piece in which two or more nameable instruments sound, and these in the prompt's order.

    Everything is drawn from the configuration's seed and the piece's name: it does not depend on other pieces.

    Raises
    ------
    Unusable
        There are not so many such windows.
    DamagedAudio
        A file cannot be decoded.
    """
    rng = _generator(configuration.seed, piece.name)
    if piece.seconds + 0.5 / piece.sample_rate < configuration.seconds:
        raise Unusable(f"{piece.seconds:.2f} s long, shorter than a window of {configuration.seconds:g} s")

    def nameable(section: Section) -> list[str]:
        wanted = configuration.words
        return [w for w in section.sounding if w not in UNNAMED and (wanted is None or w in wanted)]

    usable = [section for section in sections(piece, configuration.seconds) if len(nameable(section)) >= 2]
    if len(usable) <= window:
        count = "no window" if not usable else f"only {len(usable)} windows"
        raise Unusable(f"{count} of {configuration.seconds:g} s in which two or more named instruments sound")
    section = usable[int(rng.permutation(len(usable))[window])]
    return section, tuple(str(word) for word in rng.permutation(nameable(section)))


def material(
    piece: Piece,
    window: int,
    configuration: Configuration,
    profiles: Mapping[str, Floats] | None = None,
) -> Material:
    """A drawn window with its mix, and what it is scored against.

    Raises
    ------
    Unusable, DamagedAudio
        As :func:`window_of`.
    """
    section, words = window_of(piece, window, configuration)
    grid = grid_for(configuration)
    powers = section.powers(grid) if piece.stems else {}
    truth = (
        templates.ground_truth(powers, grid, words=words, profiles=profiles)
        if powers
        else _truth_of_notes(section, words, grid)
    )
    return Material(section, words, normalise(section.mix()), powers, truth)


def _truth_of_notes(section: Section, words: Sequence[str], grid: MelGrid) -> templates.GroundTruth:
    """Knowledge bands while the instrument plays."""
    masks: dict[str, dict[str, NDArray[np.bool_]]] = {}
    excluded: dict[tuple[str, str], str] = {}
    times = section.start + grid.duration * (np.arange(grid.time) + 0.5) / grid.time if grid.duration else np.zeros(0)
    for preset in templates.presets():
        for word in words:
            if word not in templates.instruments(preset):
                excluded[word, f"band:{preset}"] = f"the preset {preset!r} has no band for it"
                continue
            active = section.piece.sounding(word, times)
            mask = templates.active_band_mask(word, active, grid, preset)
            if mask.any() and not mask.all():
                masks.setdefault(f"band:{preset}", {})[word] = mask
            else:
                excluded[word, f"band:{preset}"] = "the mask is full" if mask.any() else "the mask is empty"
    areas = {kind: {word: templates.area(mask) for word, mask in some.items()} for kind, some in masks.items()}
    return templates.GroundTruth(masks, {}, areas, excluded)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng((seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")))


# ---- maps


def variants_of(
    captured: Callable[[tuple[str, Pooling]], AttentionMaps],
    configuration: Configuration,
    words: Sequence[str],
    grid: MelGrid,
    weights: Weights | None,
    *,
    only_default: bool = False,
) -> tuple[DataArray, dict[str, str]]:
    """Projected maps (variant, level, word, time, mel) of the words, and why a variant has none.

    Parameters
    ----------
    captured : ``captured(variant.capture)`` gives the maps captured in that way
    configuration, words, grid
    weights : of the fitted variant
    only_default : leave the ablations out
    """
    import xarray

    chosen = dict(list(configuration.variants.items())[:1]) if only_default else configuration.variants
    stacked, reasons, attributes, coordinates = [], {}, {}, {}
    for name, variant in chosen.items():
        maps = captured(variant.capture)
        levels = []
        for level in configuration.levels:
            at: Mapping[str, DataArray] = maps if configuration.generates else at_timestep(maps, level)
            try:
                one = _projected(at, variant, words, grid, weights)
            except ValueError as error:  # a pattern that this model's sites do not match, steps without sigma
                if name == "default":
                    raise
                reasons[name] = str(error)
                levels.append(np.full((len(words), *grid.shape), np.nan, np.float32))
                continue
            if name == "default":
                attributes, coordinates = one.attrs, {key: one[key] for key in ("time", "mel", "frequency")}
            levels.append(one.values)
        stacked.append(np.stack(levels))
    array = xarray.DataArray(
        np.stack(stacked),
        dims=("variant", "level", "word", "time", "mel"),
        coords={
            "variant": list(chosen),
            "level": list(configuration.levels),
            "word": list(words),
            "time": coordinates["time"].values,
            "mel": coordinates["mel"].values,
            "frequency": ("mel", coordinates["frequency"].values),
        },
        attrs={key: _plain(value) for key, value in attributes.items()},
    )
    return array, reasons


def _projected(
    maps: Mapping[str, DataArray], variant: Variant, words: Sequence[str], grid: MelGrid, weights: Weights | None
) -> DataArray:
    """One variant at one level: (word, time, mel)."""
    with_words = {site: array for site, array in maps.items() if set(words) & set(_words(array))}
    without = {site: array for site, array in maps.items() if site not in with_words}
    fitted = None
    if variant.layer_weights == "fitted":
        if weights is None or set(weights) != set(with_words):
            raise ValueError("the layer weights were fitted on other sites than these")
        fitted = weights
    options: dict[str, Any] = {"steps": variant.steps, "spatial": variant.spatial, "top_k": variant.top_k}
    layers = "*" if variant.layers == ("*",) else list(variant.layers)
    own = project(with_words, grid, layers=layers, layer_weights=fitted, **options).isel(prompt=0).sel(word=list(words))
    if variant.attention == "cross" or not without:
        return own
    received = project(without, grid, layers=layers, **options).isel(prompt=0)
    flat = received.mean("word").values
    count, other = len(own.attrs["layers"]), len(received.attrs["layers"])
    # values of the two kinds have different scales: shares of queries, and sums over them
    mean = own.values.mean(axis=(1, 2), keepdims=True)
    both = (count * own.values / mean + other * flat / flat.mean()) / (count + other)
    return own.copy(data=both.astype(np.float32))


def _words(array: DataArray) -> list[str]:
    return [str(word) for word in array["word"].values if not str(word).startswith("(")] if "word" in array.dims else []


def _plain(value: Any) -> Any:
    """An attribute as zarr can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


class Captures:
    """The captures of one item, each made when it is first needed."""

    def __init__(self, make: Callable[[tuple[str, ...], Pooling], AttentionMaps]) -> None:
        self._make = make
        self.made: dict[tuple[str, Pooling], AttentionMaps] = {}

    def __call__(self, how: tuple[str, Pooling]) -> AttentionMaps:
        """Maps with the attention and pooling of ``how`` = :attr:`Variant.capture`."""
        if how not in self.made:
            attention, pooling = how
            self.made[how] = self._make(("cross", "self") if attention == "all" else ("cross",), pooling)
        return self.made[how]


def probed(
    pipeline: Any,
    mix: NDArray[np.float32],
    sample_rate: int,
    prompt: str,
    words: Sequence[str],
    configuration: Configuration,
    *,
    seed: int | None = None,
) -> Captures:
    """Captures of probes of one mix."""

    def make(kinds: tuple[str, ...], pooling: Pooling) -> AttentionMaps:
        return probe(
            pipeline,
            mix,
            sample_rate,
            prompt,
            words=words,
            timesteps=configuration.timesteps,
            draws=configuration.draws,
            seed=configuration.seed if seed is None else seed,
            kinds=kinds,
            pooling=pooling,
        )

    return Captures(make)


@dataclass
class Generated:
    """One generated sample, made again for every way to capture it: the seed makes it the same."""

    pipeline: Any
    word: str
    seed: int
    configuration: Configuration
    audio: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    sample_rate: int = 0

    @property
    def prompt(self) -> str:
        """``"a solo bass"``."""
        return prompt_of([self.word])

    def captures(self) -> Captures:
        """Captures of the generation."""

        def make(kinds: tuple[str, ...], pooling: Pooling) -> AttentionMaps:
            made = generate(
                self.pipeline,
                self.prompt,
                words=[self.word],
                seed=self.seed,
                steps=self.configuration.steps,
                guidance=self.configuration.guidance,
                duration=self.configuration.seconds,
                kinds=kinds,
                pooling=pooling,
            )
            audio = made.audio if made.audio.ndim == 1 else made.audio.mean(axis=0)
            self.audio, self.sample_rate = audio.astype(np.float32), made.sample_rate
            return made.maps

        return Captures(make)


def band_truth(word: str, grid: MelGrid, profiles: Mapping[str, Floats] | None) -> templates.GroundTruth:
    """Targets of a generated sample: knowledge bands and the data-driven profile, which know nothing of this audio."""
    masks: dict[str, dict[str, NDArray[np.bool_]]] = {}
    excluded: dict[tuple[str, str], str] = {}
    for preset in templates.presets():
        if word in templates.instruments(preset):
            masks[f"band:{preset}"] = {word: templates.band_mask(word, grid, preset)}
        else:
            excluded[word, f"band:{preset}"] = f"the preset {preset!r} has no band for it"
    if profiles and word in profiles:
        masks["profile"] = {word: templates.profile_mask(profiles[word], grid)}
    elif profiles:
        excluded[word, "profile"] = "no training piece has it"
    areas = {kind: {w: templates.area(mask) for w, mask in some.items()} for kind, some in masks.items()}
    return templates.GroundTruth(masks, {}, areas, excluded)


# ---- files


def fields(projected: DataArray | None, truth: templates.GroundTruth, words: Sequence[str], mix: Any) -> xarray.Dataset:
    """The arrays of an item as one dataset; see :class:`aiba_eval.evaluation.Item`."""
    import xarray

    kinds = [*truth.masks, *(["share"] if truth.shares else [])]
    shape = np.shape(mix)
    truth_of = np.full((len(kinds), len(words), *shape), np.nan, np.float32)
    for k, kind in enumerate(kinds):
        of: Mapping[str, Any] = truth.shares if kind == "share" else truth.masks[kind]
        for w, word in enumerate(words):
            if word in of:
                truth_of[k, w] = of[word]
    data: dict[str, Any] = {
        "truth": (("target", "word", "time", "mel"), truth_of),
        "mix": (("time", "mel"), np.asarray(mix, np.float32)),
    }
    found = xarray.Dataset(data, coords={"target": kinds, "word": list(words)})
    if projected is None:
        return found
    found = found.assign_coords({name: projected.coords[name] for name in ("time", "mel", "frequency")})
    found["projected"] = projected
    return found.assign_attrs(projected.attrs)


def write_item(
    path: Path,
    about: Row,
    arrays: xarray.Dataset | None,
    *,
    maps: AttentionMaps | None = None,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 0,
) -> None:
    """Write an item elsewhere and rename it: what stands at ``path`` is whole. What an earlier attempt left is removed."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if arrays is not None:
        # zarr v3 specifies no strings of fixed length: labels are attributes there
        labels = {f"labels:{name}": [str(v) for v in arrays[name].values] for name in LABELS if name in arrays.coords}
        plain = arrays.drop_vars([name for name in LABELS if name in arrays.coords]).assign_attrs(labels)
        plain.to_zarr(partial / "fields.zarr", consolidated=False, zarr_format=3)
    if maps is not None:
        maps.save(partial / "maps.zarr")
    if audio is not None:
        import soundfile

        soundfile.write(partial / "audio.flac", np.clip(audio, -1, 1), sample_rate, subtype="PCM_16")
    (partial / "item.json").write_text(dump_json(about) + "\n", encoding="utf-8")
    partial.rename(path)


def instruments_of(configuration: Configuration, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """The classes that ``generate`` asks for.

    Raises
    ------
    CannotEvaluate
        A word has neither a band nor a profile.
    """
    with_band = {name for preset in templates.presets() for name in templates.instruments(preset)}
    known = {name for piece in pieces for name in piece.instruments} - UNNAMED
    if configuration.words is None:
        return tuple(sorted(known & with_band if known else with_band - UNNAMED))
    unknown = [word for word in configuration.words if word not in with_band | known]
    if unknown:
        raise CannotEvaluate(f"{unknown[0]!r} has no band to be scored against; known: {', '.join(sorted(with_band))}")
    return configuration.words
