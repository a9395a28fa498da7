"""The mel grid: the fixed time–frequency raster on which maps, masks and audio are compared.

Conventions
-----------

Arrays on the grid are ``(time, mel)``; row 0 of ``mel`` is the lowest band, column 0 of ``time`` the earliest.
Times are seconds, frequencies hertz. Attention maps come from :func:`aiba_hooks.capture` as one labelled array
per attention site, each on that site's own, coarser lattice.

Contents
--------

* :class:`MelGrid`: the raster with its mel definition (AudioLDM2's by default), and audio on it.
* :func:`project`: maps of many sites and steps, resized to the grid and aggregated (the paper's Eqs. 3 and 8).
* :func:`linear_matrix`, :func:`area_matrix`: the two resampling rules, as matrices.

"The paper" is AIBA, arXiv 2509.20891.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from xarray import DataArray

Floats = NDArray[np.float64]
Steps = Literal["uniform", "late"] | Mapping[str, float] | ArrayLike

#: AudioLDM2 clamps its magnitude mel here before the logarithm.
LOG_FLOOR = 1e-5


def linear_matrix(positions: ArrayLike, edges: ArrayLike) -> Floats:
    """Weights that interpolate cell values linearly at given positions.

    Between the centres of two cells the value is linear; between an outermost centre and the outer edge of its
    cell it is constant. For cells of equal width and positions at the centres of equal cells over the same range
    this is one axis of ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.

    Parameters
    ----------
    positions : array_like, shape (m,)
        Where to read, in any unit.
    edges : array_like, shape (n + 1,)
        Ascending edges of the n cells, in the same unit. Their widths may differ.

    Returns
    -------
    ndarray, shape (m, n)
        ``matrix @ cell_values`` are the values at the positions. The row of a position outside the edges is NaN:
        there the cells say nothing.
    """
    x, bounds = np.asarray(positions, float), np.asarray(edges, float)
    if bounds.ndim != 1 or bounds.size < 2 or np.any(np.diff(bounds) <= 0):
        raise ValueError(f"edges must be at least two ascending numbers, got {bounds.tolist()}")
    centres = (bounds[:-1] + bounds[1:]) / 2
    n = centres.size
    # the position in units of cells: exact for equal widths, piecewise linear otherwise
    at = np.interp(x, centres, np.arange(n))
    lower = np.clip(np.floor(at).astype(int), 0, max(n - 2, 0))
    upper = np.minimum(lower + 1, n - 1)
    share = at - lower
    matrix = np.zeros((x.size, n))
    rows = np.arange(x.size)
    matrix[rows, lower] += 1 - share
    matrix[rows, upper] += share
    slack = 1e-6 * (bounds[-1] - bounds[0]) / n
    matrix[(x < bounds[0] - slack) | (x > bounds[-1] + slack)] = np.nan
    return matrix


def area_matrix(target_edges: ArrayLike, source_edges: ArrayLike) -> Floats:
    """Weights that average source cells over target cells, each by the share it covers.

    Parameters
    ----------
    target_edges : array_like, shape (m + 1,)
    source_edges : array_like, shape (n + 1,)
        Ascending edges in the same unit.

    Returns
    -------
    ndarray, shape (m, n)
        Row i holds ``overlap(target i, source j) / width(target i)``; what the source does not cover counts as zero.
    """
    target, source = np.asarray(target_edges, float), np.asarray(source_edges, float)
    low = np.maximum(target[:-1, None], source[None, :-1])
    high = np.minimum(target[1:, None], source[None, 1:])
    return np.clip(high - low, 0, None) / np.diff(target)[:, None]


@dataclass(frozen=True)
class MelGrid:
    """A raster of ``time`` columns by ``mel`` rows with an explicit mel definition.

    The defaults are AudioLDM2's mel: 16 kHz, a Hann window and transform of 1024 samples, a hop of 160, 64 bands
    from 0 to 8000 Hz on the slaney scale, area-normalised.

    A mel spectrogram has ``mel`` overlapping triangular filters, a map has ``mel`` cells that tile the range. Filter
    k peaks at (k + 1) / (mel + 1) of the mel range and stands for cell k, the k-th of ``mel`` equal parts of that
    range: every filter peaks inside its own cell. Lattices are mapped through the cells (:attr:`edges`); bands in
    hertz select rows by the filters' peaks (:attr:`frequencies`).

    Parameters
    ----------
    time, mel : int
        Columns and rows.
    duration : float or None
        Seconds that the columns span. ``None`` means the span of whatever is placed on the grid: the maps' own, or
        the waveform's own.
    start : float
        Seconds at which the columns begin; used when ``duration`` is given.
    fmin, fmax : float
        Range in hertz.
    scale : {"slaney", "htk"}
        Mel formula.
    norm : {"slaney", None}
        Filter normalisation: equal area, or equal height.
    sample_rate, n_fft, hop_length : int
        Analysis of waveforms, in hertz and samples.
    win_length : int or None
        Window in samples; ``None`` is ``n_fft``.

    Raises
    ------
    ValueError
        If a size is not positive, the range is empty or exceeds half the sample rate, or a name is unknown.
    """

    time: int = 128
    mel: int = 64
    duration: float | None = None
    start: float = 0.0
    fmin: float = 0.0
    fmax: float = 8000.0
    scale: Literal["slaney", "htk"] = "slaney"
    norm: Literal["slaney"] | None = "slaney"
    sample_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    win_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("time", "mel", "sample_rate", "n_fft", "hop_length"):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"MelGrid: {name} must be a positive integer, got {getattr(self, name)!r}")
        if self.duration is not None and not self.duration > 0:
            raise ValueError(f"MelGrid: duration must be positive seconds or None, got {self.duration!r}")
        if self.scale not in ("slaney", "htk"):
            raise ValueError(f"MelGrid: scale must be 'slaney' or 'htk', got {self.scale!r}")
        if self.norm not in ("slaney", None):
            raise ValueError(f"MelGrid: norm must be 'slaney' or None, got {self.norm!r}")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"MelGrid: need 0 <= fmin < fmax <= sample_rate / 2, got {self.fmin}, {self.fmax}, {self.sample_rate}"
            )
        if self.hop_length > self.n_fft or not 0 < (self.win_length or self.n_fft) <= self.n_fft:
            raise ValueError("MelGrid: need hop_length <= n_fft and win_length <= n_fft")

    @property
    def shape(self) -> tuple[int, int]:
        """``(time, mel)``."""
        return self.time, self.mel

    def hz_to_mel(self, hz: ArrayLike) -> Floats:
        """Hertz to mel, by this grid's formula.

        ``htk``: 2595 log10(1 + f / 700). ``slaney``: 3 f / 200 below 1 kHz, 15 + 27 ln(f / 1000) / ln 6.4 above.
        """
        f = np.asarray(hz, float)
        if self.scale == "htk":
            return 2595.0 * np.log10(1.0 + f / 700.0)
        return np.where(f < 1000.0, 3.0 * f / 200.0, 15.0 + 27.0 * np.log(np.maximum(f, 1000.0) / 1000.0) / np.log(6.4))

    def mel_to_hz(self, mels: ArrayLike) -> Floats:
        """Mel to hertz, the inverse of :meth:`hz_to_mel`."""
        m = np.asarray(mels, float)
        if self.scale == "htk":
            return 700.0 * (10.0 ** (m / 2595.0) - 1.0)
        return np.where(m < 15.0, 200.0 * m / 3.0, 1000.0 * np.exp((np.maximum(m, 15.0) - 15.0) * np.log(6.4) / 27.0))

    @property
    def edges(self) -> Floats:
        """Edges of the mel cells in hertz, shape (mel + 1,): equal steps on the mel scale from fmin to fmax."""
        low, high = self.hz_to_mel([self.fmin, self.fmax])
        return self.mel_to_hz(np.linspace(low, high, self.mel + 1))

    @property
    def frequencies(self) -> Floats:
        """Centre of each row in hertz, shape (mel,): where its triangular filter peaks."""
        low, high = self.hz_to_mel([self.fmin, self.fmax])
        return self.mel_to_hz(np.linspace(low, high, self.mel + 2)[1:-1])

    def hz_to_row(self, hz: ArrayLike) -> Floats:
        """Position in rows: cell k spans [k, k + 1]. Not clamped: below fmin it is negative."""
        low, high = self.hz_to_mel([self.fmin, self.fmax])
        return (self.hz_to_mel(hz) - low) / (high - low) * self.mel

    def rows(self, low: float, high: float) -> NDArray[np.bool_]:
        """Rows whose centre f satisfies low <= f < high (hertz), shape (mel,)."""
        return (self.frequencies >= low) & (self.frequencies < high)

    def spectrogram(
        self, waveform: ArrayLike, sample_rate: float, *, resampling: Literal["area", "linear"] = "area"
    ) -> NDArray[np.float32]:
        """Log-mel of a waveform on the grid: ln(max(magnitude mel, 1e-5)), as AudioLDM2 defines it.

        The magnitudes are brought to the grid's columns first and the logarithm is taken last. AudioLDM2 also
        removes the mean and scales the peak of its training audio to 0.5: that is left to the caller.

        Parameters
        ----------
        waveform : array_like, shape (samples,) or (channels, samples)
            Channels are averaged.
        sample_rate : float
            Of the waveform, in hertz; it is resampled to the grid's.
        resampling : {"area", "linear"}
            How frames (one per hop) become columns: averaged over each column, or read at its centre.

        Returns
        -------
        ndarray of float32, shape (time, mel)

        Raises
        ------
        ValueError
            If the waveform is empty, not finite, or of another shape.
        """
        linear = self._linear(waveform, sample_rate, 1.0, resampling)
        return np.log(np.maximum(linear, LOG_FLOOR)).astype(np.float32)

    def power(
        self, waveform: ArrayLike, sample_rate: float, *, resampling: Literal["area", "linear"] = "area"
    ) -> NDArray[np.float32]:
        """Linear power mel of a waveform on the grid: the filters applied to the squared magnitudes.

        Power, because the powers of unrelated stems add up to about the power of their mix, so that shares mean
        something. Parameters, returns and errors as in :meth:`spectrogram`.
        """
        return self._linear(waveform, sample_rate, 2.0, resampling).astype(np.float32)

    def _linear(
        self, waveform: ArrayLike, sample_rate: float, exponent: float, resampling: Literal["area", "linear"]
    ) -> Floats:
        if resampling not in ("area", "linear"):
            raise ValueError(f"resampling must be 'area' or 'linear', got {resampling!r}")
        import librosa
        from librosa.filters import mel as mel_filters

        wave = np.asarray(waveform, np.float32)
        if wave.ndim == 2 and wave.shape[0] <= wave.shape[1]:
            wave = wave.mean(axis=0)
        if wave.ndim != 1 or wave.size == 0:
            raise ValueError(f"waveform must be (samples,) or (channels, samples), got shape {wave.shape}")
        if not np.isfinite(wave).all():
            raise ValueError("waveform holds NaN or infinite samples")
        if sample_rate != self.sample_rate:
            wave = librosa.resample(wave, orig_sr=sample_rate, target_sr=self.sample_rate, res_type="soxr_hq")
        if self.duration is not None:
            first, length = round(self.start * self.sample_rate), max(1, round(self.duration * self.sample_rate))
            wave = np.pad(wave, (max(0, -first), 0))[max(0, first) :][:length]
            wave = np.pad(wave, (0, length - wave.size))  # past its end a waveform is silent
        samples, hop = wave.size, self.hop_length
        frames = -(-samples // hop)
        wave = np.pad(wave, (0, frames * hop - samples))
        # frame i is centred on hop i, [i, i + 1) * hop: AudioLDM2's padding, not librosa's centring
        before = (self.n_fft - hop) // 2
        after = self.n_fft - hop - before
        wave = np.pad(wave, (before, after), mode="reflect" if wave.size > after else "constant")
        window = self.win_length or self.n_fft
        stft = librosa.stft(wave, n_fft=self.n_fft, hop_length=hop, win_length=window, center=False)
        filters = mel_filters(
            sr=self.sample_rate,
            n_fft=self.n_fft,
            n_mels=self.mel,
            fmin=self.fmin,
            fmax=self.fmax,
            htk=self.scale == "htk",
            norm=self.norm,
        )
        mels = (filters @ np.abs(stft) ** exponent).T.astype(float)
        edges, columns = np.arange(frames + 1.0), np.linspace(0, samples / hop, self.time + 1)
        if resampling == "area":
            return area_matrix(columns, edges) @ mels
        return linear_matrix((columns[:-1] + columns[1:]) / 2, edges) @ mels


@dataclass(frozen=True)
class _Site:
    """One site's maps as a plain array with its lattice in grid units."""

    name: str
    values: NDArray[np.floating]  # (prompt, step, word, time, frequency)
    words: tuple[tuple[str, int], ...]  # (word, which occurrence of it)
    time_edges: Floats  # seconds
    frequency_edges: Floats | None  # hertz; None on a 1-D lattice
    sigma: Floats | None
    reduced: bool  # over steps, at capture


def _read_site(name: str, array: DataArray) -> _Site:
    dims = tuple(str(d) for d in array.dims)
    shape = f"{dims} = {array.shape}"
    known = {"prompt", "step", "head", "word", "time", "frequency"}
    if not {"prompt", "word", "time"} <= set(dims) or not set(dims) <= known:
        raise ValueError(
            f"site {name!r} has dims {shape}; projection needs (prompt, [step], [head], word, time, [frequency]): "
            "capture with a backbone, so that queries are placed on its lattice, or leave the site out with layers="
        )
    if 0 in array.shape:
        raise ValueError(f"site {name!r} is empty: dims {shape}")
    if "head" in dims:
        array = array.mean("head", keep_attrs=True, skipna=False)
    reduced = "step" not in array.dims
    if reduced:
        array = array.expand_dims("step")

    if "seconds_per_column" not in array.attrs or "time" not in array.coords:
        raise ValueError(f"site {name!r} (dims {shape}) needs a 'time' coordinate and the attribute seconds_per_column")
    width = float(array.attrs["seconds_per_column"])
    centres = np.asarray(array["time"].values, float)
    # the coordinate, not the attribute time_start: it stays true after a selection along time
    start = centres[0] - width / 2
    time_edges = start + width * np.arange(centres.size + 1)
    if not width > 0 or not np.allclose(centres, time_edges[:-1] + width / 2, rtol=0, atol=1e-3 * abs(width)):
        raise ValueError(
            f"site {name!r} (dims {shape}): 'time' is not evenly spaced by seconds_per_column = {width}: "
            f"{centres[:3].tolist()} ..."
        )

    frequency_edges = None
    if "frequency" in array.dims:
        missing = [c for c in ("frequency_low", "frequency_high") if c not in array.coords]
        if missing:
            raise ValueError(f"site {name!r} (dims {shape}) has a frequency axis but no coordinate {missing}")
        low, high = (np.asarray(array[c].values, float) for c in ("frequency_low", "frequency_high"))
        if np.any(high <= low) or np.any(np.diff(low) <= 0):
            raise ValueError(f"site {name!r}: bands must ascend (row 0 is the lowest), got {list(zip(low, high))[:4]}")
        if not np.allclose(low[1:], high[:-1], rtol=1e-3, atol=1e-3):
            raise ValueError(f"site {name!r}: bands must adjoin, got {list(zip(low, high))[:4]}")
        frequency_edges = np.append(low, high[-1])
        array = array.transpose("prompt", "step", "word", "time", "frequency")
    else:
        array = array.transpose("prompt", "step", "word", "time").expand_dims("frequency", -1)

    labels: list[str] = [str(w) for w in array["word"].values]
    return _Site(
        name=name,
        values=np.asarray(array.values),
        words=tuple((w, labels[:i].count(w)) for i, w in enumerate(labels)),
        time_edges=time_edges,
        frequency_edges=frequency_edges,
        sigma=None if reduced or "sigma" not in array.coords else np.asarray(array["sigma"].values, float),
        reduced=reduced,
    )


def _select(names: Sequence[str], layers: str | Sequence[str]) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    unmatched = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if unmatched or not patterns:
        raise ValueError(f"no site matches layers={unmatched}; the maps hold:\n  " + "\n  ".join(names))
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]


def _step_weights(site: _Site, steps: Steps) -> Floats:
    """Non-negative weights of the site's steps, summing to 1."""
    count = site.values.shape[1]
    if isinstance(steps, str) and steps == "uniform":
        return np.full(count, 1 / count)
    if site.reduced:
        raise ValueError(
            f"site {site.name!r} was reduced over steps at capture, so steps={steps!r} cannot be applied: "
            "weight the steps at capture, or pass steps='uniform' to keep its weights"
        )
    if isinstance(steps, str | Mapping):
        if steps != "late" and not (isinstance(steps, Mapping) and set(steps) == {"late"}):
            raise ValueError(
                f"steps must be 'uniform', 'late', {{'late': alpha}} or one weight per step, got {steps!r}"
            )
        alpha = float(steps["late"]) if isinstance(steps, Mapping) else 1.0
        if site.sigma is None:
            raise ValueError(
                f"steps={steps!r} weights by sigma ** -alpha, but site {site.name!r} has no 'sigma' coordinate along "
                f"its {count} steps: pass one weight per step instead, or steps='uniform'"
            )
        if not np.isfinite(site.sigma).all() or np.any(site.sigma <= 0):
            raise ValueError(f"site {site.name!r}: sigma must be positive and finite, got {site.sigma.tolist()}")
        weights = (site.sigma / site.sigma.min()) ** -alpha  # relative to the smallest, so that no power overflows
    else:
        weights = np.asarray(steps, float)
        if weights.shape != (count,):
            raise ValueError(f"step weights have shape {weights.shape}, site {site.name!r} has {count} steps")
        if not np.isfinite(weights).all() or np.any(weights < 0) or weights.sum() == 0:
            raise ValueError(f"step weights must be non-negative and not all zero, got {weights.tolist()}")
    return weights / weights.sum()


def _layer_weights(names: Sequence[str], given: Mapping[str, float] | ArrayLike | None) -> Floats:
    if given is None:
        return np.full(len(names), 1 / len(names))
    if isinstance(given, Mapping):
        if set(given) != set(names):
            missing, extra = sorted(set(names) - set(given)), sorted(set(given) - set(names))
            raise ValueError(f"layer_weights must name the selected sites: missing {missing}, not selected {extra}")
        weights = np.asarray([given[n] for n in names], float)
    else:
        weights = np.asarray(given, float)
    if weights.shape != (len(names),):
        raise ValueError(f"layer_weights have shape {weights.shape}, {len(names)} sites are selected: {list(names)}")
    if not np.all(weights >= 0) or not np.isclose(weights.sum(), 1, atol=1e-4):
        raise ValueError(f"layer_weights must be non-negative and sum to 1, got {weights.tolist()}")
    return weights


def _finest(lattices: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(lattices, key=lambda shape: shape[0] * shape[1])


class _Aggregate:
    """Running mean, maximum or top-K mean over weighted rasters that may be missing, cell by cell."""

    def __init__(self, shape: tuple[int, ...], keep: int | None) -> None:
        """``keep``: None for the mean, otherwise how many of the largest values to hold."""
        self.weight = np.zeros(shape)
        self.count = np.zeros(shape)
        self.total = np.zeros(shape) if keep is None else None
        self.largest = None if keep is None else np.full((keep, *shape), -np.inf)

    def add(self, where: Any, value: Floats, weight: Floats, present: NDArray[np.bool_]) -> None:
        """Add rasters (entry, prompt, word, time, mel) with their weights, broadcastable to that shape."""
        weight = np.where(present & (weight > 0), weight, 0.0)
        self.weight[where] += weight.sum(0)
        self.count[where] += (weight > 0).sum(0)
        if self.total is not None:
            self.total[where] += np.where(weight > 0, weight * np.nan_to_num(value), 0.0).sum(0)
        if self.largest is not None:
            new = np.where(weight > 0, weight * value, -np.inf)
            held = self.largest[(slice(None), *where)]
            keep = held.shape[0]
            self.largest[(slice(None), *where)] = np.partition(np.concatenate([held, new]), -keep, axis=0)[-keep:]

    def result(self) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.largest is None:
                value = np.asarray(self.total) / self.weight
            else:
                held = np.isfinite(self.largest)
                value = np.where(held, self.largest, 0.0).sum(0) / held.sum(0) / (self.weight / self.count)
        return np.where(self.count > 0, value, np.nan)


def project(
    maps: Mapping[str, DataArray],
    grid: MelGrid | None = None,
    *,
    layers: str | Sequence[str] = "*",
    steps: Steps = "uniform",
    spatial: Literal["mean", "max", "topk"] = "mean",
    top_k: int = 8,
    layer_weights: Mapping[str, float] | ArrayLike | None = None,
) -> DataArray:
    """Resize every site's maps to the grid and aggregate them over layers and steps.

    **Resizing** (the paper's Eq. 3) is bilinear with ``align_corners=False``: cells have extent, values sit at
    their centres, the half cell at the border is constant. It happens in seconds and on the grid's mel scale, so
    a lattice of another range or scale lands where its hertz and seconds say. Where a grid cell's centre lies
    outside a lattice, that lattice says nothing: the cell is left out for its site, and NaN if no site covers it.
    A lattice without frequency axis is constant in frequency. Bilinear interpolation reads the two nearest cells
    per axis: a lattice much finer than the grid is sampled, not averaged.

    **Aggregation** (Eq. 8) runs, cell by cell, over the entries i = (layer l, step s) that have the word, with
    weights w_i = u_l v_s (u over layers, v over steps, each summing to 1)::

        mean   sum(w_i A_i) / sum(w_i)
        max    max(r_i A_i)
        topk   mean of the K largest r_i A_i          r_i = w_i / mean(w): 1 where weights are uniform

    Entries of weight 0 are left out. Sites whose stream lacks a word do not dilute it. Heads are averaged first.

    Parameters
    ----------
    maps : Mapping of str to DataArray
        Site name to dims (prompt, [step], [head], word, time, [frequency]), as ``capture`` returns them.
    grid : MelGrid, optional
        Default ``MelGrid()``. With ``duration=None`` the columns span the selected site with the finest time columns.
    layers : str or sequence of str
        ``fnmatch`` patterns of site names; each must match.
    steps : {"uniform", "late"}, {"late": alpha}, or array_like of shape (step,)
        Step weights v: equal; sigma ** -alpha (alpha 1 for "late"), so that late, nearly clean steps count more;
        or given. Normalised to sum 1.
    spatial : {"mean", "max", "topk"}
    top_k : int
        K of "topk". Where fewer entries are present, all of them are averaged.
    layer_weights : mapping of site name to float, or array_like of shape (selected sites,), optional
        Layer weights u, non-negative with sum 1, for exactly the selected sites. Default equal.

    Returns
    -------
    DataArray of float32, dims (prompt, word, time, mel)
        Coordinates ``time`` (seconds), ``mel`` (row), ``frequency`` (hertz, along mel), ``prompt`` and whatever else
        runs along it. Words appear in order of first appearance; a word that no selected site has for a prompt is
        NaN there. Attributes: ``frequency_resolved`` (False if no selected lattice has more than one band on the
        grid), ``finest_lattice`` (time, frequency: most cells that a selected lattice has on the grid), ``time_start``,
        ``seconds_per_column``, ``layers``, ``spatial``, ``step_weighting`` and the grid's mel definition.

    Raises
    ------
    ValueError
        If a pattern matches no site, weights do not fit, "late" finds no sigma, sites disagree about their prompts,
        a raster is partly NaN or infinite, or the arrays are not on a lattice.
    """
    import xarray

    grid = MelGrid() if grid is None else grid
    if isinstance(maps, xarray.DataArray) or not isinstance(maps, Mapping):
        raise TypeError(f"maps must be a mapping of site name to DataArray, got {type(maps).__name__}")
    if spatial not in ("mean", "max", "topk"):
        raise ValueError(f"spatial must be 'mean', 'max' or 'topk', got {spatial!r}")
    if spatial == "topk" and (int(top_k) != top_k or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")

    names = _select(list(maps), layers)
    layer_weight = _layer_weights(names, layer_weights)
    sites = [_read_site(name, maps[name]) for name in names]

    first = maps[names[0]]
    prompts = [str(p) for p in first["prompt"].values]
    for name in names[1:]:
        other = [str(p) for p in maps[name]["prompt"].values]
        if other != prompts:
            raise ValueError(
                f"sites disagree about their prompts: {names[0]!r} has {len(prompts)} {prompts[:3]}, "
                f"{name!r} has {len(other)} {other[:3]}"
            )
    words = list(dict.fromkeys(w for site in sites for w in site.words))

    if grid.duration is None:
        finest = min(sites, key=lambda s: (s.time_edges[1] - s.time_edges[0], s.time_edges[0] - s.time_edges[-1]))
        start, duration = float(finest.time_edges[0]), float(finest.time_edges[-1] - finest.time_edges[0])
    else:
        start, duration = grid.start, grid.duration
    columns = start + duration * (np.arange(grid.time) + 0.5) / grid.time
    rows = np.arange(grid.mel) + 0.5

    keep = {"mean": None, "max": 1, "topk": int(top_k)}[spatial]
    aggregate = _Aggregate((len(prompts), len(words), grid.time, grid.mel), keep)
    lattices: list[tuple[int, int]] = []
    for site, u in zip(sites, layer_weight):
        finite = np.isfinite(site.values)
        absent = np.isnan(site.values).all(axis=(-2, -1))  # (prompt, step, word)
        partly = ~finite.all(axis=(-2, -1)) & ~absent
        if partly.any():
            p, s, w = (int(i) for i in np.argwhere(partly)[0])
            raster = finite[p, s, w]
            raise ValueError(
                f"site {site.name!r}: the map of {site.words[w][0]!r} in prompt {p}, step {s} has "
                f"{int((~raster).sum())} NaN or infinite of {raster.size} cells"
            )
        across = linear_matrix(columns, site.time_edges)
        if site.frequency_edges is None:
            band_edges, up = np.array([0.0, grid.mel]), np.ones((grid.mel, 1))
        else:
            band_edges = grid.hz_to_row(site.frequency_edges)
            up = linear_matrix(rows, band_edges)
        inside = np.outer(np.isfinite(across).all(axis=1), np.isfinite(up).all(axis=1))
        across, up = np.nan_to_num(across), np.nan_to_num(up)
        lattices.append((_cells(site.time_edges, start, start + duration), _cells(band_edges, 0, grid.mel)))

        v = _step_weights(site, steps)
        values = np.where(finite, site.values, 0.0).astype(float)
        weight = u * np.where(absent, 0.0, v[None, :, None])  # (prompt, step, word)
        where = (slice(None), [words.index(w) for w in site.words])
        if keep is None:
            # weighting before resizing: both are linear, and the raster is far smaller than the grid
            total = weight.sum(1)
            small = np.einsum("psw,pswtf->pwtf", weight, values) / np.where(total > 0, total, 1)[..., None, None]
            _add(aggregate, where, small[None], total[None], across, up, inside)
        else:
            for s in range(0, v.size, keep):
                chunk = slice(s, s + keep)
                _add(
                    aggregate,
                    where,
                    values[:, chunk].swapaxes(0, 1),
                    weight[:, chunk].swapaxes(0, 1),
                    across,
                    up,
                    inside,
                )

    along_prompt = {name: c for name, c in first.coords.items() if c.dims == ("prompt",)}
    finest_lattice = _finest(lattices)
    return xarray.DataArray(
        aggregate.result().astype(np.float32),
        dims=("prompt", "word", "time", "mel"),
        coords={
            **along_prompt,
            "word": [w for w, _ in words],
            "time": columns,
            "mel": np.arange(grid.mel),
            "frequency": ("mel", grid.frequencies),
        },
        attrs={
            "frequency_resolved": any(bands > 1 for _, bands in lattices),
            "finest_lattice": list(finest_lattice),
            "time_start": start,
            "seconds_per_column": duration / grid.time,
            "layers": names,
            "spatial": f"topk={top_k}" if spatial == "topk" else spatial,
            "step_weighting": "given" if not isinstance(steps, str | Mapping) else str(steps),
            "mel_scale": grid.scale,
            "fmin": grid.fmin,
            "fmax": grid.fmax,
        },
    )


def _cells(edges: Floats, low: float, high: float) -> int:
    """How many cells overlap [low, high] by more than rounding."""
    overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return max(1, int((overlap > 1e-6 * np.diff(edges)).sum()))


def _add(
    aggregate: _Aggregate,
    where: tuple[Any, ...],
    small: Floats,
    weight: Floats,
    across: Floats,
    up: Floats,
    inside: NDArray[np.bool_],
) -> None:
    """Resize rasters (entry, prompt, word, time, frequency) and hand them on with their weights."""
    large = across @ small @ up.T
    weight = np.broadcast_to(weight[..., None, None], large.shape)
    aggregate.add(where, large, weight, np.broadcast_to(inside, large.shape))
