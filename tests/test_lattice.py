"""Lattices: raster order, direction, prefixes, cropping; a tone lands where it sounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from aiba_eval import MelGrid, project
from aiba_hooks import Lattice, LatticeMismatch, mel_edges

ORDERS = {
    "time-major": (("time", "frequency"), False),
    "time-major, highest band first": (("time", "frequency"), True),
    "frequency-major": (("frequency", "time"), False),
    "frequency-major, highest band first (an image)": (("frequency", "time"), True),
}


def log_mel(hertz, seconds=2.56):
    """AudioLDM2's mel front end: 64 bins, 16 kHz, hop 10 ms: [frames, 64]."""
    import librosa

    t = np.arange(int(16000 * seconds)) / 16000
    tone = np.sin(2 * np.pi * hertz * t) * (t > seconds / 2)  # sounds in the second half only
    mel = librosa.feature.melspectrogram(
        y=tone, sr=16000, n_fft=1024, hop_length=160, n_mels=64, fmin=0, fmax=8000, power=1.0
    )
    return np.log(np.maximum(mel, 1e-5)).T[: int(seconds * 100)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hertz", [100, 440, 5000])
@pytest.mark.parametrize("prefix", [0, 3])
def test_a_tone_lands_in_the_right_rows(order, hertz, prefix):
    axes, descending = ORDERS[order]
    mel = log_mel(hertz)
    latent = mel.reshape(64, 4, 16, 4).mean((1, 3))  # a VAE's reduction by 4: [time 64, frequency 16]
    edges = mel_edges(64, 0, 8000)[::4]
    raster = latent[:, ::-1] if descending else latent
    raster = raster if axes[0] == "time" else raster.T
    tokens = np.concatenate([np.full(prefix, 99.0), raster.ravel()])
    lattice = Lattice(
        shape=raster.shape,
        axes=axes,
        seconds_per_column=0.04,
        frequency_edges=tuple(edges[::-1] if descending else edges),
        prefix=prefix,
    )
    placed = lattice.place(torch.from_numpy(tokens)[None])
    np.testing.assert_allclose(placed[0], latent)
    array = xr.DataArray(
        placed[:, None, None].numpy().astype("float32"),
        dims=("prompt", "step", "word", "time", "frequency"),
        coords={**lattice.coords(), "prompt": ["tone"], "step": [0], "word": ["tone"]},
        attrs={"seconds_per_column": 0.04, "time_start": 0.0},
    )
    row = array.isel(prompt=0, step=0, word=0, time=48)
    loudest = row.isel(frequency=int(row.argmax()))
    assert float(loudest.frequency_low) <= hertz <= float(loudest.frequency_high)
    grid = MelGrid(128, 64)
    heat = project({"site": array}, grid).isel(prompt=0, word=0)
    second_half = heat.isel(time=96)
    found = grid.edges[int(second_half.argmax())], grid.edges[int(second_half.argmax()) + 1]
    assert found[0] / 1.5 - 60 < hertz < found[1] * 1.5 + 60  # a lattice row is four mel bins high
    assert float(heat.isel(time=slice(0, 60)).max()) < float(second_half.max())


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_place_keeps_leading_axes_in_numpy_and_torch(kind):
    lattice = Lattice((3, 2), frequency_edges=(200, 100, 0), prefix=1, valid_columns=2)
    rows = kind(np.arange(2 * 5 * 7).reshape(2, 5, 7))
    placed = np.asarray(lattice.place(rows))
    assert placed.shape == (2, 5, 2, 2)
    np.testing.assert_array_equal(placed[0, 0], [[2, 1], [4, 3]])
    np.testing.assert_array_equal(lattice.coords()["frequency"][1], [50, 150])
    np.testing.assert_array_equal(lattice.coords()["time"][1], [0.5, 1.5])


def test_a_one_dimensional_lattice_has_no_frequency():
    lattice = Lattice((10,), ("time",), seconds_per_column=0.1, start=1.0, prefix=1, valid_columns=4)
    assert lattice.dims == ("time",)
    assert lattice.bands is None
    assert lattice.place(np.arange(11)).tolist() == [1, 2, 3, 4]
    assert list(lattice.coords()) == ["time"]
    np.testing.assert_allclose(lattice.coords()["time"][1], [1.05, 1.15, 1.25, 1.35])


@pytest.mark.parametrize(("latent", "tokens", "shape"), [((200, 16), 800, (100, 8)), ((63, 16), 256, (32, 8))])
def test_levels_halve_and_round_up(latent, tokens, shape):
    edges = mel_edges(64, 0, 8000)[::4]
    lattice = Lattice.of_level(tokens, latent, seconds_per_column=0.04, frequency_edges=edges)
    assert lattice.shape == shape
    assert lattice.seconds_per_column == pytest.approx(0.08)
    assert lattice.frequency_edges == tuple(edges[::2])


def test_an_odd_number_of_rows_ends_where_the_latent_ends():
    lattice = Lattice.of_level(
        4 * 3, (8, 5), seconds_per_column=1.0, frequency_edges=[0, 1, 2, 3, 4, 5], valid_seconds=5.0
    )
    assert lattice.frequency_edges == (0, 2, 4, 5)
    assert lattice.valid_columns == 3


def test_what_does_not_fit_says_what_would():
    with pytest.raises(
        LatticeMismatch, match=r"700 tokens are no level of a 200×16 latent \(levels: 200×16, 100×8, 50×4"
    ):
        Lattice.of_level(700, (200, 16), seconds_per_column=1, frequency_edges=list(range(17)))
    with pytest.raises(LatticeMismatch, match="7 tokens do not fit the lattice 3×2"):
        Lattice((3, 2), frequency_edges=(0, 1, 2)).place(np.zeros((4, 7)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 2)}, "needs frequency_edges"),
        ({"shape": (3, 2), "frequency_edges": (0, 1)}, "must be 3 strictly monotonic"),
        ({"shape": (3, 2), "frequency_edges": (0, 2, 1)}, "strictly monotonic"),
        ({"shape": (3,), "frequency_edges": (0, 1)}, "does not give one positive size"),
        ({"shape": (3, 0), "frequency_edges": (0,)}, "does not give one positive size"),
        ({"shape": (3,), "axes": ("frequency",)}, "axes must be"),
        ({"shape": (3,), "axes": ("time",), "frequency_edges": (0, 1)}, "without a frequency axis"),
        ({"shape": (3,), "axes": ("time",), "seconds_per_column": 0}, "must be positive"),
        ({"shape": (3,), "axes": ("time",), "valid_columns": 4}, r"within 1\.\.3"),
        ({"shape": (3,), "axes": ("time",), "prefix": -1}, "must not be negative"),
    ],
)
def test_a_lattice_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lattice(**options)
