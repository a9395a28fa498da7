"""Lattice: where a site's query tokens lie in time and frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aiba_hooks.errors import LatticeMismatch


@dataclass(frozen=True)
class Lattice:
    """The latent grid behind one attention site.

    Parameters
    ----------
    shape
        Size of each axis, in the order of ``axes``: ``(100, 8)`` for 100 time columns of 8 frequency bands.
    axes
        Raster order, slowest axis first: ``("time", "frequency")`` puts token ``t * F + f`` at column t, band f
        (AudioLDM2); ``("frequency", "time")`` is an image raster (Auffusion, Riffusion); ``("time",)`` has no frequency
        axis (Stable Audio).
    seconds_per_column
        Duration of one time column.
    start
        Time of the left edge of column 0 in seconds.
    frequency_edges
        ``F + 1`` band edges in hertz, **in token order**: ascending if band 0 is the lowest, descending if it is the
        highest. Required with a frequency axis.
    prefix
        Tokens before the lattice that belong to no position (Stable Audio's global token, memory tokens): dropped.
    valid_columns
        Columns that the pipeline keeps; later ones are generated and cropped (Stable Audio makes 47.5 s always).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("time", "frequency")
    seconds_per_column: float = 1.0
    start: float = 0.0
    frequency_edges: tuple[float, ...] | None = None
    prefix: int = 0
    valid_columns: int | None = None

    def __post_init__(self) -> None:
        if self.axes not in (("time", "frequency"), ("frequency", "time"), ("time",)):
            raise ValueError(
                f"axes must be ('time', 'frequency'), ('frequency', 'time') or ('time',), got {self.axes!r}"
            )
        if len(self.shape) != len(self.axes) or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} does not give one positive size for each of the axes {self.axes}")
        if not self.seconds_per_column > 0:
            raise ValueError(f"seconds_per_column must be positive, got {self.seconds_per_column}")
        if self.prefix < 0:
            raise ValueError(f"prefix must not be negative, got {self.prefix}")
        if self.valid_columns is not None and not 1 <= self.valid_columns <= self.columns:
            raise ValueError(f"valid_columns must be within 1..{self.columns}, got {self.valid_columns}")
        if "frequency" not in self.axes:
            if self.frequency_edges is not None:
                raise ValueError("frequency_edges given for a lattice without a frequency axis")
            return
        if self.frequency_edges is None:
            raise ValueError("a lattice with a frequency axis needs frequency_edges (hertz, one more than its bands)")
        object.__setattr__(self, "frequency_edges", tuple(float(edge) for edge in self.frequency_edges))
        steps = np.diff(self.frequency_edges)
        bands = self.shape[self.axes.index("frequency")]
        if len(steps) != bands or not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError(
                f"frequency_edges must be {bands + 1} strictly monotonic values for {bands} bands, "
                f"got {len(self.frequency_edges)}: {self.frequency_edges}"
            )

    @property
    def columns(self) -> int:
        """Time columns, cropped ones included."""
        return self.shape[self.axes.index("time")]

    @property
    def bands(self) -> int | None:
        """Frequency bands, or None for a lattice that is constant in frequency by construction."""
        return self.shape[self.axes.index("frequency")] if "frequency" in self.axes else None

    @property
    def tokens(self) -> int:
        """Query tokens, prefix included."""
        return self.prefix + int(np.prod(self.shape))

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions of a placed map: ``("time", "frequency")`` or ``("time",)``."""
        return ("time", "frequency") if self.bands is not None else ("time",)

    def place(self, rows: Any) -> Any:
        """Put token rows on the lattice.

        Parameters
        ----------
        rows : array or tensor of shape (..., tokens)

        Returns
        -------
        array or tensor of shape (..., time) or (..., time, frequency), the lowest band first, prefix and cropped columns
        dropped.

        Raises
        ------
        LatticeMismatch
            The last axis is not ``tokens`` long.
        """
        if rows.shape[-1] != self.tokens:
            raise LatticeMismatch(
                f"{rows.shape[-1]} tokens do not fit the lattice {'×'.join(map(str, self.shape))} {self.axes}"
                f" with {self.prefix} prefix tokens ({self.tokens} in all); rows have shape {tuple(rows.shape)}"
            )
        placed = rows[..., self.prefix :].reshape(*rows.shape[:-1], *self.shape)
        if self.axes == ("frequency", "time"):
            placed = placed.swapaxes(-1, -2)
        if self.descending:
            placed = np.flip(placed, -1) if isinstance(placed, np.ndarray) else placed.flip(-1)
        if self.valid_columns is not None:
            placed = placed[..., : self.valid_columns] if self.bands is None else placed[..., : self.valid_columns, :]
        return placed

    @property
    def descending(self) -> bool:
        """True if token order runs from the highest band to the lowest."""
        edges = self.frequency_edges
        return edges is not None and edges[0] > edges[-1]

    def coords(self) -> dict[str, Any]:
        """xarray coordinates of a placed map: ``time`` and ``frequency`` centres, ``frequency_low``, ``frequency_high``."""
        count = self.columns if self.valid_columns is None else self.valid_columns
        coords: dict[str, Any] = {
            "time": ("time", self.start + (np.arange(count) + 0.5) * self.seconds_per_column, {"units": "s"})
        }
        if self.frequency_edges is not None:
            edges = np.sort(np.asarray(self.frequency_edges))
            low, high = edges[:-1], edges[1:]
            coords["frequency"] = ("frequency", (low + high) / 2, {"units": "Hz"})
            coords["frequency_low"] = ("frequency", low, {"units": "Hz"})
            coords["frequency_high"] = ("frequency", high, {"units": "Hz"})
        return coords

    @classmethod
    def of_level(
        cls,
        tokens: int,
        latent: tuple[int, int],
        *,
        axes: tuple[str, str] = ("time", "frequency"),
        seconds_per_column: float,
        frequency_edges: tuple[float, ...] | list[float] | np.ndarray,
        prefix: int = 0,
        valid_seconds: float | None = None,
    ) -> Lattice:
        """The lattice of a U-Net level, found from its token count.

        A U-Net halves both axes of its latent (rounding up) at every level, so a site with ``tokens`` queries lies at the
        level k where ``ceil(H / 2**k) * ceil(W / 2**k) == tokens - prefix``.

        Parameters
        ----------
        tokens : queries at the site
        latent : (H, W), the two last axes of the denoiser's input, in the order of ``axes``
        seconds_per_column, frequency_edges : of the *latent* (level 0), edges in its own row order
        valid_seconds : keep only the columns that begin before this time

        Raises
        ------
        LatticeMismatch
            No level has that many tokens.
        """
        height, width = latent
        level = 0
        tried = []
        while True:
            shape = (-(-height // 2**level), -(-width // 2**level))
            tried.append(f"{shape[0]}×{shape[1]}")
            if shape[0] * shape[1] == tokens - prefix:
                break
            if shape == (1, 1):
                raise LatticeMismatch(
                    f"{tokens - prefix} tokens are no level of a {height}×{width} latent (levels: {', '.join(tried)})"
                )
            level += 1
        edges = np.asarray(frequency_edges, dtype=float)
        bands = shape[axes.index("frequency")]
        # an odd number of rows leaves the last cell of a coarser level half empty: it ends where the latent ends
        rows = np.minimum(np.arange(bands + 1) * 2**level, len(edges) - 1)
        seconds = seconds_per_column * 2**level
        columns = shape[axes.index("time")]
        valid = None if valid_seconds is None else max(1, min(columns, int(np.ceil(valid_seconds / seconds - 1e-9))))
        return cls(
            shape=shape,
            axes=axes,
            seconds_per_column=seconds,
            frequency_edges=tuple(edges[rows]),
            prefix=prefix,
            valid_columns=valid if valid != columns else None,
        )
