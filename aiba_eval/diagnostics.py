"""What is the matter with these maps: named findings, each with the numbers that show it.

A map that is flat, that is the same for every word, or that sits on the padding scores like chance, and its picture does
not say why: a colour scale stretches rounding errors over its whole range. :func:`diagnose` measures the known causes.

Conventions
-----------

Maps are averaged over steps (and heads) before their variation is measured, as :func:`aiba_eval.project` averages them.
*Variation* is the coefficient of variation: standard deviation over mean (over the mean absolute value for the signed maps
of differential attention). *Words* are the columns of a map that are words; the groups in parentheses are not. Probabilities
are averaged as they are; log-mean maps are exponentiated first.

The severity of a finding about sites is lowered to ``"info"`` where it holds for less than half of them
(:data:`MAJORITY`).

Contents
--------

* :func:`diagnose`: findings of a capture, or of maps loaded from disk.
* :func:`diagnose_model`: generate under capture, then diagnose: what ``aiba diagnose`` does.
* :class:`Diagnosis`, :class:`Finding`, :class:`SiteSummary`: what they return.
* The thresholds, each with its reason.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.grid import MelGrid

if TYPE_CHECKING:
    from xarray import DataArray

    from aiba_eval.loading import Loaded

Floats = NDArray[np.float64]
Severity = Literal["info", "warning", "problem"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "info")

#: Every finding, in the order in which a report lists those of one severity.
FINDINGS = (
    "no-cross-attention",
    "check-column",
    "non-finite",
    "coverage-gaps",
    "joint-attention",
    "no-frequency-axis",
    "degenerate-pooling",
    "uniform-over-words",
    "words-alike",
    "flat-in-time",
    "flat-in-frequency",
    "padding-sink",
    "special-token-sink",
    "prompt-insensitive",
    "unconditional-branch",
    "resolution-bound",
    "localising-sites",
)

#: A map varies less than this: it is flat. One rounding of bfloat16, in which models run, is 2⁻⁸ = 0.004 of a value, so less
#: than 0.01 cannot be told from arithmetic; and a logit that moves by 0.01 moves a probability by 1 %.
FLAT_VARIATION = 0.01
#: Normalised entropy over words above this: the words share the attention evenly. Shares that differ by a fraction c of
#: their mean have entropy 1 − c² / (2 ln W); 0.995 is c = 8 % for two words, 13 % for five and 21 % for a hundred.
UNIFORM_ENTROPY = 0.995
#: Two maps differ by less than this fraction of their own variation: they are one map. 0.1 leaves 1 % of the variance,
#: which is a correlation of 0.995.
SAME_MAP = 0.1
#: A group of tokens that are no words has more than this share of the attention: all words together have less than half.
SINK_MASS = 0.5
#: Largest relative spread of a map that pooling has made constant: its cells differ by float32 sums alone (2⁻²⁴ per term).
DEGENERATE_SPREAD = 1e-5
#: Largest standard deviation over cells of a softmax that does not depend on the query. A delta is exactly constant; rows
#: of equal logits are, up to the order of float32 sums.
CONSTANT_SOFTMAX = 1e-4
#: Check column above this: more than float32 leaves (the capture itself refuses 2e-4 there), so the model ran in half
#: precision or in a quantised kernel and its maps have that precision.
CHECK_ERROR = 1e-3
#: Average precision that the mask itself reaches at the lattice's resolution; below it a score of 1 cannot be asked for.
RESOLUTION_AP = 0.9
#: A site localises if its maps vary, and differ between words, by more than this: ten times what counts as flat.
LOCALISING_VARIATION = 0.1
#: A finding keeps its severity if it holds for at least this share of the sites that it was checked on.
MAJORITY = 0.5
#: How many of the sites that localise are named.
MOST_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is the matter, or worth knowing.

    Attributes
    ----------
    name : one of :data:`FINDINGS`
    severity : ``"problem"`` (the maps do not show what they seem to), ``"warning"`` or ``"info"``
    sentence : what was found, in words, with its main number
    numbers : the numbers that show it, by name
    threshold : what the first number was compared with, or None where the finding is a fact and not a measurement
    sites : where
    """

    name: str
    severity: Severity
    sentence: str
    numbers: Mapping[str, float]
    threshold: float | None = None
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.sentence}"


@dataclass(frozen=True)
class SiteSummary:
    """The numbers of one site in one guidance branch; NaN where something is not defined there.

    Attributes
    ----------
    name : dotted module name
    tag : ``"cross"``, ``"self"``, ``"joint"``, ``"unknown"``
    stream : token stream that its keys come from, or an empty string
    branch : guidance branch, or an empty string where there is none
    lattice : (time, frequency), (time,) on a lattice without a frequency axis, () without a lattice
    words : how many words have a map
    entropy : normalised entropy over words, 1 where every word has the same share; mean over queries, steps and heads. A
        word's share is taken per token where a capture tells how many it has: a uniform softmax gives two tokens twice as much
    word_mass, padding_mass, special_mass : share of the attention, mean over queries
    time_variation, frequency_variation : of a word's profile along that axis, of the word where it is largest
    variation : of a word's map over all cells, of the word where it is largest
    word_difference : root mean square difference of two words' maps, each divided by its mean; mean over pairs
    check : largest error of the check column, where the capture is at hand
    """

    name: str
    tag: str
    stream: str
    branch: str
    lattice: tuple[int, ...]
    words: int
    entropy: float
    word_mass: float
    padding_mass: float
    special_mass: float
    time_variation: float
    frequency_variation: float
    variation: float
    word_difference: float
    check: float = math.nan


@dataclass(frozen=True)
class Diagnosis:
    """Findings, the table of sites behind them, and what could not be checked.

    Attributes
    ----------
    findings : problems first, then warnings, then what is worth knowing
    sites : one row for each site and guidance branch
    not_checked : finding → why it could not be decided. A name in neither place was checked and is not the case
    """

    findings: tuple[Finding, ...]
    sites: tuple[SiteSummary, ...]
    not_checked: Mapping[str, str]

    def __contains__(self, name: object) -> bool:
        return any(finding.name == name for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        if name not in FINDINGS:
            raise KeyError(f"no finding is called {name!r}; they are {', '.join(FINDINGS)}")
        reason = self.not_checked.get(name)
        raise KeyError(f"{name}: {f'not checked: {reason}' if reason else 'checked, and not the case'}")

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings of severity ``"problem"``."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``aiba diagnose --json`` prints it."""
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "not_checked": dict(self.not_checked),
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["nothing was found"]
        lines += [f"not checked: {name}: {reason}" for name, reason in self.not_checked.items()]
        return "\n".join(lines)


def diagnose(
    capture_or_maps: Any,
    *,
    other: Any = None,
    projected: DataArray | None = None,
    masks: Mapping[str, ArrayLike] | None = None,
) -> Diagnosis:
    """Name what makes maps flat, alike or meaningless, with the numbers that show it.

    Parameters
    ----------
    capture_or_maps
        A finished capture (also one that ended in ``NothingCaptured``: its sites say what was found instead), or a
        mapping of site to array such as :meth:`aiba_hooks.AttentionMaps.load` returns. What only a capture knows is then
        listed as not checked.
    other
        A capture, or maps, of the same model and seed under another prompt.
    projected : DataArray, optional
        The maps on the mel grid, from :func:`aiba_eval.project`; it tells the grid, and is scored beside the oracle.
    masks : mapping of word to (time, mel) bool, optional
        Where each word's sound is: what a perfect map of this resolution would score against them is found.

    Returns
    -------
    Diagnosis

    Raises
    ------
    TypeError
        Neither a capture nor maps.
    ValueError
        ``other`` has the same prompt, another seed, other sites or another lattice; or masks do not fit.
    RuntimeError
        The capture has not ended.
    """
    subject = _read(capture_or_maps)
    report = _Report()
    conditional = [rows for rows in subject.rows if rows.branch != "unconditional"]
    text = [rows for rows in conditional if rows.words.any() and rows.tag != "self"]
    summaries = tuple(_summaries(subject))
    _what_was_seen(report, subject, text)
    _on_the_lattice(report, text)
    _over_words(report, text)
    _sinks(report, text)
    _prompts(report, text, other)
    _unconditional(report, subject)
    _resolution(report, text, projected, masks)
    _localising(report, text)
    return Diagnosis(report.sorted(), summaries, report.skipped())


def diagnose_model(
    model: str | Loaded | Any,
    prompt: str,
    *,
    other: str | None = None,
    words: Sequence[str] | None = None,
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = 10,
    guidance: float | None = 2.5,
    duration: float | None = 8.0,
    layers: str | Sequence[str] = "*",
    heads: Literal["mean", "all"] = "mean",
    budget: str | int = "2GiB",
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Diagnosis:
    """Generate from a prompt under capture, both guidance branches, and diagnose the maps.

    Words that name an instrument are held against its measured band for what resolution allows.

    Parameters
    ----------
    other : str, optional
        Another prompt: audio is generated from it with the same seed, for whether the maps depend on the prompt.
    model, prompt, words, negative, seed, steps, guidance, duration, layers, heads, budget, device, dtype, progress
        As in :func:`aiba_eval.run.run`. ``words`` are those of ``prompt``.

    Raises
    ------
    CannotLoad, CannotGenerate, aiba_hooks.AibaError
        Each message says what to do. A model without cross-attention is a finding and no error.
    """
    from aiba_eval.grid import project
    from aiba_eval.run import CannotGenerate, arguments_for, as_loaded, band_templates, call, grid_of
    from aiba_hooks import NothingCaptured, capture
    from aiba_hooks.coverage import CoverageWarning
    from aiba_hooks.words import check_words, distinct_words

    prompts = [prompt] if other is None else [prompt, other]
    for entry in prompts:
        if not distinct_words([entry]):
            raise CannotGenerate(f"the prompt {entry!r} has no words to map: describe the sound")
    if other is not None and other.split() == prompt.split():
        raise CannotGenerate("the other prompt is the prompt itself: give one with other words")
    check_words(list(words or ()), [prompt])
    loaded = as_loaded(model, device=device, dtype=dtype, progress=progress)
    arguments = arguments_for(loaded.pipeline, steps=steps, guidance=guidance, negative=negative, duration=duration)
    captures = []
    for entry in prompts:
        captured = capture(
            loaded.pipeline,
            words=words if entry is prompt else None,
            kinds=("cross", "joint"),
            layers=layers,
            branch="both",
            heads=heads,
            budget=budget,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # a finding
            try:
                with captured:
                    call(loaded.pipeline, entry, arguments, seed=seed, progress=progress)
            except NothingCaptured:
                if not captured.sites and not captured.uncovered:
                    raise
        captures.append(captured)
    first = captures[0]
    found = any(site.captured for site in first.sites)
    projected, masks = None, None
    if found:
        chosen = {name: array for name, array in conditional_maps(first.maps).items() if "word" in array.dims}
        if all(np.isfinite(array.values).all() for array in chosen.values()):
            projected = project(chosen)
            masks = band_templates(projected, grid_of(projected)).get("measured")
    return diagnose(first, other=captures[1] if found and len(captures) > 1 else None, projected=projected, masks=masks)


def conditional_maps(maps: Mapping[str, DataArray]) -> dict[str, DataArray]:
    """The conditional branch of maps that were captured with ``branch="both"``; maps of one branch as they are."""
    return {
        name: array.sel(branch="conditional", drop=True) if "branch" in array.dims else array
        for name, array in maps.items()
    }


# ---- what there is to look at


@dataclass(frozen=True)
class _Rows:
    """The maps of one site, prompt and guidance branch."""

    site: str
    tag: str
    stream: str
    branch: str
    prompt: str
    seed: Any
    pooling: str  # empty for single keys
    keys: int | None
    signed: bool
    on_lattice: bool
    seconds: float
    labels: tuple[str, ...]
    roles: tuple[str, ...]
    tokens: tuple[int, ...]  # per column, 1 where it is not known
    values: NDArray[np.floating]  # (step, head, column, time, frequency); frequency of size 1 where there is none
    has_frequency: bool

    @property
    def words(self) -> NDArray[np.bool_]:
        """Which columns are words (or keys of which nothing is known)."""
        return np.array([role in ("word", "key") for role in self.roles])

    @property
    def lattice(self) -> tuple[int, ...]:
        if not self.on_lattice:
            return ()
        sizes = self.values.shape[-2:]
        return sizes if self.has_frequency else sizes[:1]

    @cached_property
    def mean_maps(self) -> Floats:
        """Means of the word maps over steps and heads, (word, time, frequency)."""
        return _mean(self.head_maps, 0)

    @cached_property
    def head_maps(self) -> Floats:
        """Step means of the word maps of each head, (head, word, time, frequency)."""
        columns = self.words if self.words.any() else np.ones(len(self.roles), bool)
        return _mean(self.values[:, :, columns], 0)

    def mass(self, role: str) -> float:
        """Share of the attention of the columns with this role: 0 where there are none, NaN where roles are unknown."""
        if self.signed or "key" in self.roles or self.tag == "self":
            return math.nan
        columns = np.array([r == role for r in self.roles])
        if role == "word" and self.pooling not in ("sum", ""):
            return math.nan  # a mean or maximum over tokens is no mass
        return float(_mean(self.values[:, :, columns].sum(2))) if columns.any() else 0.0

    def entropy(self) -> float:
        """Normalised entropy over words, mean over queries, steps and heads."""
        from scipy.special import entr

        columns = self.words
        if self.signed or columns.sum() < 2 or self.tag == "self":
            return math.nan
        shares = self.values[:, :, columns]
        if self.pooling == "sum":
            shares = shares / np.array(self.tokens)[columns][:, None, None]
        total = shares.sum(2, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = shares / total
        return float(_mean(entr(shares).sum(2))) / math.log(int(columns.sum()))


@dataclass(frozen=True)
class _Subject:
    """Maps, and what a capture knows besides."""

    rows: list[_Rows]
    sites: list[Any] | None  # None: only maps are at hand
    uncovered: list[Any]
    broken: bool  # the capture ended in an error after it had captured something
    nonfinite: dict[str, int]  # site → cells of partly finite rasters

    @property
    def has_maps(self) -> bool:
        return bool(self.rows)


def _read(given: Any) -> _Subject:
    sites, uncovered, broken = None, [], False
    if isinstance(given, Mapping):
        maps: Mapping[str, DataArray] = given
    elif hasattr(given, "sites") and hasattr(given, "uncovered"):
        sites, uncovered = list(given.sites), list(given.uncovered)
        if not getattr(given, "_closed", True):
            raise RuntimeError("the capture has not ended: diagnose it after its with block")
        try:
            maps = given.maps
        except RuntimeError:  # it ended in an error: its sites tell which
            maps, broken = {}, any(site.captured for site in sites)
    else:
        raise TypeError(f"need a capture or maps (site → DataArray), got {type(given).__name__}")
    keys = {site.name: int(site.key_shape[-2]) for site in sites or ()}
    tokens = _token_counts(given)
    rows: list[_Rows] = []
    nonfinite: dict[str, int] = {}
    for name, array in maps.items():
        read = list(_rows(name, array, keys.get(name), tokens))
        count = sum(int((~np.isfinite(r.values)).sum()) for r in read) + _blank_prompts(array)
        if count:
            nonfinite[name] = count
        rows += read
    return _Subject(rows, sites, uncovered, broken, nonfinite)


def _token_counts(capture: Any) -> dict[tuple[str, str], dict[str, int]]:
    """(site, prompt) → word → how many tokens it has, as far as a capture tells; nothing for maps."""
    groups = getattr(capture, "token_groups", {})
    return {key: {name: len(positions) for name, positions in of.items()} for key, of in groups.items()}


def _blank_prompts(array: DataArray) -> int:
    """Cells of prompts that are NaN for every word at every step: no word is missing from its own prompt throughout."""
    axis = "prompt" if "prompt" in array.dims else "batch"
    others = [dim for dim in array.dims if dim not in (axis, "branch")]
    blank = array.isnull().all(others)
    cells = array.size // max(blank.size, 1)
    return int(blank.sum()) * cells


def _rows(
    name: str, array: DataArray, keys: int | None, tokens: Mapping[tuple[str, str], Mapping[str, int]]
) -> Iterator[_Rows]:
    """Split an array by branch and prompt; words that a prompt lacks are left out."""
    dims = {str(dim) for dim in getattr(array, "dims", ())}
    column = "word" if "word" in dims else "key"
    plain = {"batch", "query", "key"} <= dims
    known = {"branch", "prompt", "step", "head", column, "time", "frequency"}
    if not plain and not ({"prompt", column, "time"} <= dims <= known):
        raise ValueError(
            f"site {name!r} has dims {sorted(dims)}: need prompt, word (or key) and time, or batch, query and key"
        )
    if plain:
        renamed = {"call": "step", "batch": "prompt", "query": "time"}
        array = array.rename({old: new for old, new in renamed.items() if old in dims})
    has_frequency = "frequency" in array.dims
    for dim in ("branch", "step", "head", "frequency"):
        if dim not in array.dims:
            array = array.drop_vars(dim, errors="ignore").expand_dims(dim)
    array = array.transpose("branch", "prompt", "step", "head", column, "time", "frequency")
    attributes = array.attrs
    branches = [str(b) for b in array["branch"].values] if "branch" in array.coords else [attributes.get("branch", "")]
    prompts = [str(p) for p in array["prompt"].values] if "prompt" in array.coords else [""] * array.sizes["prompt"]
    pooling = str(attributes.get("pooling", "sum" if column == "word" else ""))
    for b, branch in enumerate(branches):
        for p, prompt in enumerate(prompts):
            values = np.asarray(array.values[b, p])
            labels, roles = _columns(array, column, p)
            there = ~np.isnan(values).all(axis=(0, 1, 3, 4))
            if not there.all():
                values = values[:, :, there]
            labels = [x for x, held in zip(labels, there, strict=True) if held]
            roles = [x for x, held in zip(roles, there, strict=True) if held]
            missing = np.isnan(values).all(axis=(1, 2, 3, 4))  # a step that this pipeline call did not have
            if missing.any():
                values = values[~missing]
            if not values.size:
                continue
            if pooling == "logmean":
                is_word = np.array([role == "word" for role in roles])
                values = values.copy()
                values[:, :, is_word] = np.exp(values[:, :, is_word])
            yield _Rows(
                site=name,
                tag=str(attributes.get("tag", "unknown")),
                stream=str(attributes.get("stream", "")),
                branch=branch,
                prompt=prompt,
                seed=attributes.get("seed"),
                pooling=pooling,
                keys=array.sizes["key"] if column == "key" else keys,
                signed=any(sign < 0 for sign in attributes.get("signs", ())),
                on_lattice=not plain,
                seconds=float(attributes.get("seconds_per_column", math.nan)),
                labels=tuple(labels),
                roles=tuple(roles),
                tokens=tuple(max(tokens.get((name, prompt), {}).get(label, 1), 1) for label in labels),
                values=values,
                has_frequency=has_frequency,
            )


def _columns(array: DataArray, column: str, prompt: int) -> tuple[list[str], list[str]]:
    """Labels and roles of the columns for one prompt."""
    if column == "word":
        labels = [str(word) for word in array["word"].values]
        return labels, [x.strip("()") if x.startswith("(") else "word" for x in labels]
    count = array.sizes["key"]
    if "role" not in array.coords:
        return [str(k) for k in range(count)], ["key"] * count
    tokens = (
        [str(t) for t in array["token"].values[prompt]] if "token" in array.coords else list(map(str, range(count)))
    )
    return tokens, [str(r) for r in array["role"].values[prompt]]


# ---- numbers


def _mean(values: NDArray[np.floating], axis: int | tuple[int, ...] | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN
        return np.nanmean(np.where(np.isfinite(values), values, np.nan), axis, dtype=float)


def _variation(values: Floats, axis: int | tuple[int, ...]) -> Floats:
    """Standard deviation over mean absolute value; 0 for zeros, NaN for nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        finite = np.where(np.isfinite(values), values, np.nan)
        deviation, level = np.nanstd(finite, axis), np.nanmean(np.abs(finite), axis)
        return np.where(level > 0, deviation / np.where(level > 0, level, 1), np.where(np.isnan(level), np.nan, 0.0))


def _largest(values: Floats) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _time_variation(maps: Floats) -> float:
    """Of (word, time, frequency): that of the word's time profile that varies most."""
    return _largest(_variation(_mean(maps, 2), 1)) if maps.shape[1] > 1 else math.nan


def _frequency_variation(maps: Floats) -> float:
    return _largest(_variation(_mean(maps, 1), 1)) if maps.shape[2] > 1 else math.nan


def _cell_variation(maps: Floats) -> float:
    return _largest(_variation(maps, (1, 2))) if maps[0].size > 1 else math.nan


def _units(maps: Floats) -> Floats:
    """Each map over its mean absolute value; maps of zeros are left out."""
    level = _mean(np.abs(maps), (1, 2))
    there = np.isfinite(level) & (level > 0)
    return maps[there] / level[there, None, None]


def _word_difference(maps: Floats) -> float:
    """Root mean square over cells and pairs of words of the difference between maps of mean 1."""
    unit = _units(maps)
    count = len(unit)
    if count < 2:
        return math.nan
    # the sum over pairs of (a − b)² is count · Σ a² − (Σ a)²
    pairs = count * (unit**2).sum(0) - unit.sum(0) ** 2
    return math.sqrt(max(float(_mean(pairs)), 0.0) / (count * (count - 1) / 2))


def _summaries(subject: _Subject) -> Iterator[SiteSummary]:
    checks = {site.name: site.check for site in subject.sites or ()}
    groups: dict[tuple[str, str], list[_Rows]] = {}
    for rows in subject.rows:
        groups.setdefault((rows.site, rows.branch), []).append(rows)
    for (name, branch), members in groups.items():
        maps = [rows.mean_maps for rows in members]
        on = members[0].on_lattice
        check = checks.get(name)
        yield SiteSummary(
            name=name,
            tag=members[0].tag,
            stream=members[0].stream,
            branch=branch,
            lattice=members[0].lattice,
            words=max(sum(role == "word" for role in rows.roles) for rows in members),
            entropy=_over(rows.entropy() for rows in members),
            word_mass=_over(rows.mass("word") for rows in members),
            padding_mass=_over(rows.mass("padding") for rows in members),
            special_mass=_over(rows.mass("special") for rows in members),
            time_variation=_over(map(_time_variation, maps)) if on else math.nan,
            frequency_variation=_over(map(_frequency_variation, maps)) if on else math.nan,
            variation=_over(map(_cell_variation, maps)),
            word_difference=_over(map(_word_difference, maps)),
            check=math.nan if check is None else float(check),
        )


def _over(numbers: Any) -> float:
    return float(_mean(np.array(list(numbers), float)))


# ---- findings


class _Report:
    """Findings as they are made, and what could not be decided."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._skipped: dict[str, str] = {}

    def add(
        self,
        name: str,
        severity: Severity,
        sentence: str,
        numbers: Mapping[str, float],
        threshold: float | None = None,
        sites: Sequence[str] = (),
    ) -> None:
        self._found.append(Finding(name, severity, sentence, dict(numbers), threshold, tuple(dict.fromkeys(sites))))

    def skip(self, name: str, reason: str) -> None:
        self._skipped[name] = reason

    def sorted(self) -> tuple[Finding, ...]:
        return tuple(sorted(self._found, key=lambda f: (SEVERITIES.index(f.severity), FINDINGS.index(f.name))))

    def skipped(self) -> dict[str, str]:
        return {name: self._skipped[name] for name in FINDINGS if name in self._skipped}

    def measured(
        self,
        name: str,
        severity: Severity,
        number: str,
        values: Sequence[tuple[str, float]],
        threshold: float,
        *,
        above: bool,
        sentence: Callable[[float, str], str],
        reason: str,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """A finding that compares one number per site with a threshold.

        Parameters
        ----------
        values : (site, value), NaN where it is not defined
        sentence : from the mean over the sites where it holds, and which share of the sites these are, in words
        reason : why it is not checked if no value is defined
        """
        defined = [(site, value) for site, value in values if math.isfinite(value)]
        if not defined:
            self.skip(name, reason)
            return
        hit = [(site, value) for site, value in defined if (value > threshold if above else value < threshold)]
        if not hit:
            return
        at = list(dict.fromkeys(site for site, _ in hit))
        total = len({site for site, _ in defined})
        level: Severity = severity if len(at) >= MAJORITY * total else "info"
        mean = _over(value for _, value in hit)
        share = f"{len(at)} of {_sites(total)}"
        numbers = {number: mean, "sites": len(at), "sites_checked": total, **(extra or {})}
        self.add(name, level, sentence(mean, share), numbers, threshold, at)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def _what_was_seen(report: _Report, subject: _Subject, text: Sequence[_Rows]) -> None:
    if subject.sites is None:
        tags = {rows.site: rows.tag for rows in subject.rows}
    else:
        tags = {site.name: site.tag.kind for site in subject.sites}
    kinds = Counter(tags.values())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no attention that an adapter caught"
    if not kinds["cross"] and not kinds["joint"]:
        where = "these maps hold" if subject.sites is None else "the model ran"
        report.add(
            "no-cross-attention",
            "problem",
            f"no attention from audio to text: {where} {shown}. There is no map of a word to be had; if the text enters "
            "elsewhere (class embedding, one vector, the latent), measure what the output loses without a word",
            {"cross": 0, **{f"{kind} sites": count for kind, count in kinds.items()}},
            sites=list(tags),
        )
    if kinds["joint"]:
        joint = [site for site, kind in tags.items() if kind == "joint"]
        mass = _over(r.mass("audio") for r in text if r.tag == "joint")
        numbers = {"joint": len(joint)} | ({"mass on audio": mass} if math.isfinite(mass) else {})
        share = f" and {mass:.2f} of the attention stays with audio" if math.isfinite(mass) else ""
        report.add(
            "joint-attention",
            "info",
            f"{_sites(len(joint))} attend to text and audio in one softmax{share}: word maps are shares of the rest, and "
            "cells that attend to audio more have less for every word. Compare words within a cell",
            numbers,
            sites=joint,
        )
    if subject.sites is None:
        for name in ("coverage-gaps", "check-column"):
            report.skip(name, "only the capture itself knows (pass the capture, not its maps)")
    else:
        if subject.uncovered:
            names = [entry.name for entry in subject.uncovered]
            report.add(
                "coverage-gaps",
                "problem",
                f"{len(names)} attention modules ran without a kernel that an adapter knows, {names[0]} among them: their "
                "attention is missing from these maps",
                {"modules": len(names)},
                sites=names,
            )
        checked = [(site.name, float(site.check)) for site in subject.sites if site.check is not None]
        if not checked:
            report.skip("check-column", "no kernel was asked again")
        elif subject.broken:
            worst = max(checked, key=lambda item: item[1])
            report.add(
                "check-column",
                "problem",
                f"the capture ended with an error; asked again, the kernel at {worst[0]} differs from the model's own output "
                f"by {worst[1]:.2g} of its largest value: its adapter misreads the call",
                {"error": worst[1]},
                CHECK_ERROR,
                [name for name, value in checked if value > CHECK_ERROR],
            )
        else:
            _check_column(report, checked)
    rows_lost = {s.name: int(s.nonfinite) for s in subject.sites or () if s.nonfinite}
    if rows_lost or subject.nonfinite:
        cells = sum(subject.nonfinite.values())
        report.add(
            "non-finite",
            "problem",
            f"{sum(rows_lost.values())} rows of probabilities and {cells} cells of maps are NaN or infinite: overflow in the "
            "model's dtype (run it in float32 or bfloat16), or a mask over every key",
            {"rows": sum(rows_lost.values()), "cells": cells},
            0.0,
            [*rows_lost, *subject.nonfinite],
        )


def _check_column(report: _Report, checked: Sequence[tuple[str, float]]) -> None:
    report.measured(
        "check-column",
        "warning",
        "error",
        checked,
        CHECK_ERROR,
        above=True,
        sentence=lambda mean, share: (
            f"asked again, the kernels at {share} differ from the model's own output by {mean:.2g} of its largest value: "
            "half precision or a quantised kernel. Smaller differences between maps mean nothing"
        ),
        reason="no kernel was asked again",
        extra={"largest": max(value for _, value in checked)},
    )


def _on_the_lattice(report: _Report, text: Sequence[_Rows]) -> None:
    placed = [rows for rows in text if rows.on_lattice]
    without = [rows for rows in placed if rows.values.shape[-1] == 1]
    none = "no word maps on a lattice" if not placed else "the maps have no frequency axis"
    if not placed:
        report.skip("no-frequency-axis", none)
    elif without:
        finest = max(without, key=lambda rows: rows.values.shape[-2])
        columns, names = finest.values.shape[-2], list(dict.fromkeys(rows.site for rows in without))
        whole = len(names) == len({rows.site for rows in placed})
        report.add(
            "no-frequency-axis",
            "warning" if whole else "info",
            f"{_sites(len(names))} have no frequency axis: the latent's channels are no bands, so the maps are constant in "
            f"frequency by construction and score at chance against bands. In time they have {columns} columns of "
            f"{finest.seconds:.3g} s. Reshaping tokens to a square makes an axis that does not exist",
            {"bands": 1, "columns": columns, "seconds_per_column": finest.seconds},
            sites=names,
        )
    for name, axis, value in (
        ("flat-in-time", "time", _time_variation),
        ("flat-in-frequency", "frequency", _frequency_variation),
    ):
        report.measured(
            name,
            "problem",
            "variation",
            [(rows.site, value(rows.mean_maps)) for rows in placed],
            FLAT_VARIATION,
            above=False,
            sentence=lambda mean, share, axis=axis: (  # type: ignore[misc]
                f"at {share} no word's map varies over {axis} by more than {FLAT_VARIATION:.0%} of its mean ({mean:.2g} on "
                "average): a picture of it shows rounding errors"
            ),
            reason=none if axis == "frequency" else "no word maps on a lattice with more than one column",
        )


def _over_words(report: _Report, text: Sequence[_Rows]) -> None:
    few = "fewer than two words have maps" if text else "no word maps"
    report.measured(
        "uniform-over-words",
        "problem",
        "entropy",
        [(rows.site, rows.entropy()) for rows in text],
        UNIFORM_ENTROPY,
        above=True,
        sentence=lambda mean, share: (
            f"at {share} every word has nearly the same share of the attention per token (normalised entropy {mean:.4f} of 1): the "
            "softmax hardly tells words apart"
        ),
        reason=few,
    )
    ratios = []
    for rows in text:
        maps = rows.mean_maps
        variation, difference = _cell_variation(maps), _word_difference(maps)
        flat = not variation >= FLAT_VARIATION
        ratios.append((rows.site, math.nan if math.isnan(difference) else math.inf if flat else difference / variation))
    finite = [(site, min(value, 1e9)) for site, value in ratios]  # a flat map is flat, and not alike
    report.measured(
        "words-alike",
        "problem",
        "difference",
        finite,
        SAME_MAP,
        above=False,
        sentence=lambda mean, share: (
            f"at {share} the maps vary, but the maps of different words differ by only {mean:.2g} of that variation: one "
            "pattern for every word, so that swapping words would not change a score"
        ),
        reason=few,
    )
    _degenerate(report, text)


def _degenerate(report: _Report, text: Sequence[_Rows]) -> None:
    pooled = [rows for rows in text if rows.pooling in ("sum", "mean", "weighted") and not rows.signed]
    if not pooled:
        report.skip("degenerate-pooling", "no maps pooled by sum or mean")
        return
    made: dict[str, tuple[str, float]] = {}
    shared: dict[str, float] = {}
    for rows in pooled:
        words = rows.values[:, :, rows.words]
        if words[0, 0, 0].size < 2 or not np.isfinite(words).all():
            continue
        rest = rows.values[:, :, ~rows.words].sum(2)
        covered = not rest.size or float(rest.max()) <= DEGENERATE_SPREAD
        for label, values in zip(np.array(rows.labels)[rows.words], np.moveaxis(words, 2, 0), strict=True):
            value, spread = float(values.mean()), float(np.ptp(values))
            constant = value > 0 and spread <= DEGENERATE_SPREAD * value
            whole = rows.pooling == "sum" and abs(value - 1) <= DEGENERATE_SPREAD
            part = rows.pooling == "mean" and covered and words.shape[2] == 1 and _is_reciprocal(value, rows.keys)
            if constant and (whole or part):
                made.setdefault(rows.site, (str(label), value))
        total = words.sum(2)
        if rows.pooling == "sum" and words.shape[2] > 1 and float(np.abs(total - 1).max()) <= DEGENERATE_SPREAD:
            shared.setdefault(rows.site, float(np.ptp(total)))
    if made:
        label, value = next(iter(made.values()))
        report.add(
            "degenerate-pooling",
            "problem",
            f"{label!r} is {value:.6g} for every query at {_sites(len(made))}: its tokens are all the keys there are, and a "
            "softmax sums to 1. Map fewer words, or pool by max or log-mean",
            {"value": value, "sites": len(made)},
            DEGENERATE_SPREAD,
            list(made),
        )
    elif shared:
        report.add(
            "degenerate-pooling",
            "info",
            f"at {_sites(len(shared))} the words are all the keys there are: their sum is 1 and their mean 1/n for every query, "
            "so look at single words only",
            {"spread": max(shared.values()), "sites": len(shared)},
            DEGENERATE_SPREAD,
            list(shared),
        )


def _is_reciprocal(value: float, keys: int | None) -> bool:
    """Whether ``value`` is 1/Tk: for the known number of keys, else for any integer."""
    count = keys if keys is not None else max(round(1 / value), 1)
    return abs(value * count - 1) <= DEGENERATE_SPREAD


def _sinks(report: _Report, text: Sequence[_Rows]) -> None:
    for name, role, tokens in (
        ("padding-sink", "padding", "padding that no mask hides"),
        ("special-token-sink", "special", "special tokens"),
    ):
        report.measured(
            name,
            "warning",
            "mass",
            [(rows.site, rows.mass(role)) for rows in text],
            SINK_MASS,
            above=True,
            sentence=lambda mean, share, tokens=tokens: (  # type: ignore[misc]
                f"at {share} {tokens} take {mean:.2f} of the attention: the words share the rest, and their maps follow how "
                "much the sink leaves. Divide by the mass of the words before comparing cells"
            ),
            reason="no word maps" if not text else "the roles of the tokens are not known here",
        )


def _prompts(report: _Report, text: Sequence[_Rows], other: Any) -> None:
    name = "prompt-insensitive"
    if other is None:
        report.skip(name, "needs a second capture under another prompt with the same seed (other=)")
        return
    theirs = [r for r in _read(other).rows if r.branch != "unconditional" and r.words.any() and r.tag != "self"]
    if not text:
        report.skip(name, "no word maps")
        return
    ours_by, theirs_by = _by_site(text), _by_site(theirs)
    common = [site for site in ours_by if site in theirs_by]
    if not common:
        raise ValueError("the other capture has no site with word maps in common with this one")
    values = []
    swapped = False
    for site in common:
        if len(ours_by[site]) != len(theirs_by[site]):
            raise ValueError(
                f"{site}: {len(ours_by[site])} prompts here and {len(theirs_by[site])} in the other capture"
            )
        for a, b in zip(ours_by[site], theirs_by[site], strict=True):
            if a.prompt and a.prompt == b.prompt:
                raise ValueError(f"the other capture has the same prompt, {a.prompt!r}: give one with other words")
            if a.seed is not None and b.seed is not None and np.any(np.asarray(a.seed) != np.asarray(b.seed)):
                raise ValueError(
                    f"the other capture has seed {b.seed}, this one {a.seed}: maps would differ by the noise too"
                )
            if a.lattice != b.lattice:
                raise ValueError(f"{site}: lattice {a.lattice} here and {b.lattice} in the other capture")
            difference, variation, changed = _between(a, b)
            swapped = swapped or changed
            # a fraction of the variation; of a flat map, of what counts as flat
            values.append((site, difference / max(variation, FLAT_VARIATION / SAME_MAP)))
    what = "the word in the same place of" if swapped else "the same words in"
    report.measured(
        name,
        "problem",
        "difference",
        values,
        SAME_MAP,
        above=False,
        sentence=lambda mean, share: (
            f"at {share} the maps hardly change ({mean:.2g} of their variation) for {what} another prompt with the same seed: "
            "they show the noise and the position, not the words"
        ),
        reason="no words to compare",
    )


def _by_site(rows: Sequence[_Rows]) -> dict[str, list[_Rows]]:
    found: dict[str, list[_Rows]] = {}
    for row in rows:
        found.setdefault(row.site, []).append(row)
    return found


def _between(a: _Rows, b: _Rows) -> tuple[float, float, bool]:
    """(rms difference of maps of mean 1, their rms variation, whether the words differ) over words in the same place."""
    labels = [[x for x, word in zip(rows.labels, rows.words, strict=True) if word] for rows in (a, b)]
    places = range(min(map(len, labels)))
    different = [k for k in places if labels[0][k].casefold() != labels[1][k].casefold()]
    chosen = different or list(places)
    pairs = [_units(np.stack([x, y])) for x, y in zip(a.mean_maps[chosen], b.mean_maps[chosen], strict=True)]
    pairs = [pair for pair in pairs if len(pair) == 2]
    if not pairs:
        return math.nan, math.nan, bool(different)
    unit = np.stack(pairs)
    difference = math.sqrt(float(_mean((unit[:, 0] - unit[:, 1]) ** 2)))
    variation = math.sqrt(float(_mean(_variation(unit, (2, 3)) ** 2)))
    return difference, variation, bool(different)


def _unconditional(report: _Report, subject: _Subject) -> None:
    name = "unconditional-branch"
    rows = [r for r in subject.rows if r.branch == "unconditional" and r.tag != "self"]
    if not rows:
        report.skip(name, 'the maps hold no unconditional branch (capture with branch="both", under guidance)')
        return
    spreads = []
    shapes = set()
    for row in rows:
        deviation = row.values.std((-2, -1), dtype=float)
        spread = _largest(deviation) if row.values[0, 0, 0].size > 1 else math.nan
        spreads.append((row.site, spread))
        if not spread < CONSTANT_SOFTMAX:
            continue
        level = row.values.mean((0, 1, 3, 4), dtype=float)
        if level.max() > 1 - CONSTANT_SOFTMAX:
            shapes.add("all on one token")
        elif row.keys and np.abs(level * row.keys - np.round(level * row.keys)).max() < 1e-2:
            shapes.add(f"1/{row.keys} on every key")
        else:
            shapes.add("the same at every query")
    defined = [(site, value) for site, value in spreads if math.isfinite(value)]
    constant = [(site, value) for site, value in defined if value < CONSTANT_SOFTMAX]
    sites = list(dict.fromkeys(site for site, _ in (constant or spreads)))
    numbers = {
        "spread": _over(value for _, value in (constant or defined)),
        "sites": len(sites),
        "sites_checked": len({site for site, _ in spreads}),
    }
    if constant:
        report.add(
            name,
            "warning",
            f"the unconditional branch's attention is constant at {_sites(len(sites))} ({', '.join(sorted(shapes))}): an empty "
            "prompt leaves nothing to choose from. Averaging it into the conditional maps dilutes them by half",
            numbers,
            CONSTANT_SOFTMAX,
            sites,
        )
    else:
        report.add(
            name,
            "info",
            "maps of the unconditional branch are at the prompt's token positions, but what stands there is the negative "
            "prompt: do not average them into the conditional ones",
            numbers,
            CONSTANT_SOFTMAX,
            sites,
        )


def _resolution(
    report: _Report, text: Sequence[_Rows], projected: DataArray | None, masks: Mapping[str, ArrayLike] | None
) -> None:
    name = "resolution-bound"
    if projected is not None and tuple(projected.dims) != ("prompt", "word", "time", "mel"):
        raise ValueError(f"projected must have dims (prompt, word, time, mel), got {projected.dims}")
    targets = {word: np.asarray(mask, bool) for word, mask in (masks or {}).items()}
    shapes = {mask.shape for mask in targets.values()}
    if projected is not None:
        shapes.add(projected.shape[2:])
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"masks and projected maps must share one (time, mel) shape, got {sorted(shapes)}")
    grid_time, grid_mel = next(iter(shapes), MelGrid().shape)
    placed = [rows for rows in text if rows.on_lattice]
    if projected is not None and "finest_lattice" in projected.attrs:
        columns, bands = (int(n) for n in projected.attrs["finest_lattice"])
    elif placed:
        columns, bands = max((rows.values.shape[-2:] for rows in placed), key=math.prod)
    else:
        report.skip(name, "no word maps on a lattice")
        return
    if columns >= grid_time and bands >= grid_mel:
        return
    from aiba_eval.metrics import average_precision
    from aiba_eval.references import oracle_projection

    numbers: dict[str, float] = {
        "grid_cells_per_lattice_cell": grid_time * grid_mel / (columns * bands),
        "columns": columns,
        "bands": bands,
        "grid_columns": grid_time,
        "grid_rows": grid_mel,
    }
    best: dict[str, float] = {}
    for word, mask in targets.items():
        if not mask.any() or mask.all():
            continue
        best[word] = numbers[f"oracle {word}"] = average_precision(oracle_projection(mask, (columns, bands)), mask)
        if projected is not None and word in projected["word"].values:
            saliency = np.asarray(projected.sel(word=word).values[0], float)
            if np.isfinite(saliency).all():
                numbers[f"map {word}"] = average_precision(saliency, mask)
    low = {word: value for word, value in best.items() if value < RESOLUTION_AP}
    shown = ", ".join(f"{word} {value:.2f}" for word, value in best.items())
    scored = f" Through this lattice the masks themselves have an average precision of {shown}." if best else ""
    report.add(
        name,
        "warning" if low else "info",
        f"the finest lattice has {columns} × {bands} cells for a grid of {grid_time} × {grid_mel}: one stands for "
        f"{_count(numbers['grid_cells_per_lattice_cell'])} cells, and what is narrower cannot be seen.{scored}",
        numbers,
        RESOLUTION_AP if best else None,
        [r.site for r in placed if r.values.shape[-2:] == (columns, bands)],
    )


def _localising(report: _Report, text: Sequence[_Rows]) -> None:
    if not text:
        report.skip("localising-sites", "no word maps")
        return
    found: dict[tuple[str, int | None], tuple[float, float]] = {}
    for rows in text:
        heads = rows.values.shape[1]
        for head in range(heads) if heads > 1 else (None,):
            maps = rows.mean_maps if head is None else rows.head_maps[head]
            variation, difference = _cell_variation(maps), _word_difference(maps)
            if variation >= LOCALISING_VARIATION and not difference < LOCALISING_VARIATION:
                held = found.get((rows.site, head), (0.0, 0.0))
                if np.nan_to_num(difference) >= np.nan_to_num(held[1]):
                    found[rows.site, head] = (variation, difference)
    if not found:
        return
    ranked = sorted(found, key=lambda key: (-np.nan_to_num(found[key][1]), -found[key][0]))
    named = ranked[:MOST_NAMED]
    label = {key: key[0] if key[1] is None else f"{key[0]}, head {key[1]}" for key in named}
    variation, difference = found[ranked[0]]
    beyond = f", and {len(ranked) - len(named)} more" if len(ranked) > len(named) else ""
    between = "" if math.isnan(difference) else f" and differ between words by {difference:.2g}"
    report.add(
        "localising-sites",
        "info",
        f"{'; '.join(label.values())}{beyond} have maps that vary: at the first by {variation:.2g} of their mean{between}. "
        "Whether they lie where the sound is, a score tells; these sites are the first to look at (layers=)",
        {"variation": variation, "difference": difference, "count": len(ranked)},
        LOCALISING_VARIATION,
        [key[0] for key in named],
    )
