"""The mel grid and the projection onto it, against librosa, torch and brute force."""

import subprocess
import sys

import librosa
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from aiba_eval import MelGrid, project
from aiba_eval.grid import area_matrix, linear_matrix

GRID = MelGrid()
SLANEY = librosa.mel_to_hz(np.linspace(0, librosa.hz_to_mel(8000), 65))
LATTICES = {"down1": (100, 8), "down2": (50, 4), "mid": (25, 2)}  # AudioLDM2, 8.0 s


def site(values, words, *, edges=None, seconds=8.0, start=0.0, prompts=None, sigma=None, dims=None):
    """A map as capture returns it: (prompt, step, word, time[, frequency]); frequency if there are edges."""
    values = np.asarray(values, np.float32)
    dims = dims or ("prompt", "step", "word", "time", "frequency")[: values.ndim]
    size = dict(zip(dims, values.shape))
    width = seconds / size["time"]
    coords = {
        "prompt": prompts or [f"prompt {i}" for i in range(size["prompt"])],
        "waveform": ("prompt", np.arange(size["prompt"])),
        "word": list(words),
        "time": start + width * (np.arange(size["time"]) + 0.5),
    }
    if "step" in size:
        coords["step"] = np.arange(size["step"])
        if sigma is not None:
            coords["sigma"] = ("step", np.asarray(sigma, float))
    if "frequency" in size:
        edges = SLANEY[:: 64 // size["frequency"]] if edges is None else np.asarray(edges, float)
        coords["frequency"] = (edges[1:] + edges[:-1]) / 2
        coords["frequency_low"] = ("frequency", edges[:-1])
        coords["frequency_high"] = ("frequency", edges[1:])
    return xr.DataArray(values, dims=dims, coords=coords, attrs={"seconds_per_column": width, "time_start": start})


def random_maps(seed=0, prompts=2, steps=3, words=("bass", "drums"), sigma=None):
    rng = np.random.default_rng(seed)
    return {
        name: site(rng.random((prompts, steps, len(words), *shape)), words, sigma=sigma)
        for name, shape in LATTICES.items()
    }


def resized(array, size=(128, 64)):
    """torch's own bilinear interpolation of (..., time, frequency)."""
    flat = torch.as_tensor(np.asarray(array, np.float64)).reshape(-1, 1, *array.shape[-2:])
    out = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return out.numpy().reshape(*array.shape[:-2], *size)


# --- the raster ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_mel_scale_is_librosas(scale):
    grid, htk = MelGrid(scale=scale), scale == "htk"
    hz = np.linspace(0, 8000, 999)
    np.testing.assert_allclose(grid.hz_to_mel(hz), librosa.hz_to_mel(hz, htk=htk), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(grid.mel_to_hz(grid.hz_to_mel(hz)), hz, rtol=1e-9, atol=1e-9)
    corners = librosa.mel_frequencies(66, fmin=0, fmax=8000, htk=htk)
    np.testing.assert_allclose(grid.frequencies, corners[1:-1], rtol=1e-12)


def test_every_filter_peaks_in_its_own_cell():
    for mel in (1, 2, 64, 80):
        grid = MelGrid(mel=mel, fmin=50)
        assert np.all((grid.edges[:-1] <= grid.frequencies) & (grid.frequencies <= grid.edges[1:]))
        np.testing.assert_allclose(grid.hz_to_row(grid.edges), np.arange(mel + 1), atol=1e-9)


@pytest.mark.parametrize(("scale", "counts"), [("slaney", (5, 36, 55)), ("htk", (7, 34, 54))])
def test_rows_below_a_frequency(scale, counts):
    grid = MelGrid(scale=scale)
    assert tuple(int(grid.rows(0, f).sum()) for f in (250, 2000, 5000)) == counts


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": 0},
        {"mel": 1.5},
        {"duration": 0.0},
        {"fmax": 9000.0},
        {"fmin": 8000.0},
        {"scale": "bark"},
        {"norm": "l2"},
        {"hop_length": 2048},
        {"win_length": 4096},
    ],
)
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="MelGrid"):
        MelGrid(**wrong)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_linear_matrix_is_torchs_interpolation(n, m, seed):
    values = np.random.default_rng(seed).random(n)
    matrix = linear_matrix((np.arange(m) + 0.5) * n / m, np.arange(n + 1))
    expected = torch.nn.functional.interpolate(
        torch.as_tensor(values)[None, None], size=m, mode="linear", align_corners=False
    )
    np.testing.assert_allclose(matrix @ values, expected[0, 0].numpy(), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_area_matrix_keeps_the_mean(n, m, seed):
    values = np.random.default_rng(seed).random(n)
    matrix = area_matrix(np.linspace(0, 1, m + 1), np.linspace(0, 1, n + 1))
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    assert (matrix @ values).mean() == pytest.approx(values.mean())
    fine = np.repeat(values, m)  # n·m equal parts, n of them per target cell
    np.testing.assert_allclose(matrix @ values, fine.reshape(m, n).mean(1), atol=1e-12)


# --- audio on the raster ------------------------------------------------------------------------------------------


def tone(hz, seconds=2.0, rate=16000):
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("hz", [100, 440, 2000, 5000, 7500])
def test_a_tone_lands_in_its_row(hz, scale, rate):
    grid = MelGrid(scale=scale)
    for mel in (grid.spectrogram(tone(hz, rate=rate), rate), grid.power(tone(hz, rate=rate), rate)):
        assert mel.shape == (128, 64)
        row = np.bincount(mel.argmax(axis=1)).argmax()
        assert abs(int(row) - int(np.abs(grid.frequencies - hz).argmin())) <= (1 if scale == "htk" and hz < 500 else 0)
    if hz == 100:
        assert row <= 3
    if hz == 5000:
        assert 53 <= row <= 55


def test_a_click_lands_in_its_column():
    wave = np.zeros(16000 * 4)
    wave[16000 * 3 + 100] = 1.0
    assert GRID.power(wave, 16000).sum(1).argmax() == 96
    assert MelGrid(duration=2.0, start=2.0).power(wave, 16000).sum(1).argmax() == 64


def test_spectrogram_is_audioldm2s_mel():
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    padded = torch.nn.functional.pad(torch.as_tensor(wave)[None, None], (432, 432), mode="reflect")[0]
    spectrum = torch.stft(
        padded, 1024, hop_length=160, win_length=1024, window=torch.hann_window(1024), center=False, return_complex=True
    ).abs()
    filters = torch.as_tensor(librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000))
    expected = torch.log(torch.clamp(filters @ spectrum, min=1e-5))[0].T.numpy()
    np.testing.assert_allclose(MelGrid(time=100).spectrogram(wave, 16000), expected, atol=2e-4)
    np.testing.assert_allclose(MelGrid(time=100).spectrogram(wave, 16000, resampling="linear"), expected, atol=2e-4)
    quarter = np.log(np.exp(expected).reshape(25, 4, 64).mean(1))
    np.testing.assert_allclose(MelGrid(time=25).spectrogram(wave, 16000), quarter, atol=2e-4)


def test_unrelated_stems_add_in_power():
    a, b = tone(300), tone(3000)
    np.testing.assert_allclose(
        GRID.power(a + b, 16000).sum(), GRID.power(a, 16000).sum() + GRID.power(b, 16000).sum(), rtol=1e-3
    )


def test_channels_are_averaged_and_a_short_waveform_is_padded():
    wave = tone(440)
    np.testing.assert_allclose(
        GRID.spectrogram(np.stack([wave, wave]), 16000), GRID.spectrogram(wave, 16000), atol=1e-5
    )
    long = MelGrid(duration=4.0).spectrogram(wave, 16000)
    assert long[:60].max() > -2
    np.testing.assert_allclose(long[70:], np.log(1e-5), atol=1e-5)
    assert np.isfinite(MelGrid(time=4).spectrogram(np.ones(3), 16000)).all()
    assert MelGrid(duration=1.0, start=-1.0).power(wave, 16000).max() < 1e-3


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((2, 2, 2)), np.zeros((500, 2))])
def test_waveforms_of_another_shape_are_refused(wave):
    with pytest.raises(ValueError, match="shape"):
        GRID.power(wave, 16000)


def test_waveforms_that_are_not_finite_and_unknown_resampling_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        GRID.power([0.0, np.nan], 16000)
    with pytest.raises(ValueError, match="resampling"):
        GRID.power(tone(100), 16000, resampling="cubic")


# --- projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATTICES)
def test_one_site_is_torchs_bilinear(name):
    maps = random_maps()
    out = project(maps, layers=name)
    assert out.dims == ("prompt", "word", "time", "mel")
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, resized(maps[name].values.mean(1)), rtol=2e-5)


def test_mean_over_layers_and_steps():
    maps = random_maps()
    out = project(maps)
    expected = np.mean([resized(m.values.mean(1)) for m in maps.values()], axis=0)
    np.testing.assert_allclose(out, expected, rtol=2e-5)
    assert list(out["word"].values) == ["bass", "drums"]
    assert list(out["waveform"].values) == [0, 1]
    np.testing.assert_allclose(out["frequency"], GRID.frequencies)
    np.testing.assert_allclose(out["time"], (np.arange(128) + 0.5) / 16)
    assert out.attrs["finest_lattice"] == [100, 8]
    assert out.attrs["frequency_resolved"] is True
    assert out.attrs["layers"] == list(LATTICES)


@pytest.mark.parametrize("k", [1, 2, 5, 9, 20])
def test_max_and_top_k_against_brute_force(k):
    maps = random_maps()
    entries = np.stack([resized(m.values[:, s]) for m in maps.values() for s in range(3)])
    largest = np.sort(entries, axis=0)[::-1][:k].mean(0)
    np.testing.assert_allclose(project(maps, spatial="topk", top_k=k), largest, rtol=2e-5)
    if k == 1:
        np.testing.assert_allclose(project(maps, spatial="max"), entries.max(0), rtol=2e-5)


def weighted(maps, steps, layers):
    return sum(u * resized(np.einsum("s,pswtf->pwtf", steps, m.values)) for u, m in zip(layers, maps.values()))


def test_late_steps():
    sigma = np.array([14.0, 3.0, 0.5])
    maps = random_maps(sigma=sigma)
    for steps, alpha in (("late", 1.0), ({"late": 0.5}, 0.5), ({"late": 0}, 0.0)):
        weights = sigma**-alpha / (sigma**-alpha).sum()
        np.testing.assert_allclose(project(maps, steps=steps), weighted(maps, weights, [1 / 3] * 3), rtol=2e-5)


def test_given_weights():
    maps = random_maps()
    layers = {"mid": 0.5, "down1": 0.2, "down2": 0.3}
    out = project(maps, steps=[0, 1, 3], layer_weights=layers)
    np.testing.assert_allclose(out, weighted(maps, [0, 0.25, 0.75], [0.2, 0.3, 0.5]), rtol=2e-5)
    np.testing.assert_array_equal(out, project(maps, steps=[0, 1, 3], layer_weights=[0.2, 0.3, 0.5]))


@pytest.mark.parametrize("spatial", ["max", "topk"])
def test_weights_of_max_and_top_k_are_relative(spatial):
    maps = random_maps()
    v, u = np.array([0.0, 0.25, 0.75]), np.array([0.2, 0.3, 0.5])
    weights = np.array([a * b for a in u for b in v if a * b > 0])
    entries = np.stack([resized(m.values[:, s]) for m in maps.values() for s in (1, 2)])
    scaled = (weights / weights.mean())[:, None, None, None, None] * entries
    expected = np.sort(scaled, axis=0)[::-1][: 1 if spatial == "max" else 3].mean(0)
    out = project(maps, steps=v, layer_weights=u, spatial=spatial, top_k=3)
    np.testing.assert_allclose(out, expected, rtol=2e-5)


@pytest.mark.parametrize("spatial", ["mean", "max", "topk"])
def test_a_site_without_the_word_does_not_dilute_it(spatial):
    maps = random_maps()
    absent = maps["down2"].copy()
    absent[0, :, 0] = np.nan  # prompt 0 has no bass in this stream
    other_stream = maps["mid"].isel(word=[1])
    out = project({"down1": maps["down1"], "down2": absent, "mid": other_stream}, spatial=spatial)
    alone = project({"down1": maps["down1"]}, spatial=spatial)
    both = project({"down1": maps["down1"], "down2": maps["down2"]}, spatial=spatial)
    np.testing.assert_allclose(out[0, 0], alone[0, 0], rtol=1e-5)
    np.testing.assert_allclose(out[1, 0], both[1, 0], rtol=1e-5)
    np.testing.assert_allclose(out[:, 1], project(maps, spatial=spatial)[:, 1], rtol=1e-5)


def test_a_word_that_no_site_has_is_nan_and_words_may_repeat():
    maps = {n: m.copy() for n, m in random_maps().items()}
    for m in maps.values():
        m[0, :, 0] = np.nan
    out = project(maps)
    assert np.isnan(out[0, 0]).all()
    assert np.isfinite(out[0, 1]).all()
    twice = {n: m.assign_coords(word=["a", "a"]) for n, m in random_maps().items()}
    np.testing.assert_array_equal(project(twice), project(random_maps()))
    assert list(project(twice)["word"].values) == ["a", "a"]


def test_heads_are_averaged_and_reduced_steps_accepted():
    maps = random_maps()
    heads = {n: xr.concat([m, 3 * m], "head").transpose("prompt", "step", "head", ...) for n, m in maps.items()}
    for n, m in maps.items():
        heads[n].attrs = m.attrs
    np.testing.assert_allclose(project(heads), 2 * project(maps), rtol=1e-5)
    reduced = {n: m.mean("step", keep_attrs=True) for n, m in maps.items()}
    np.testing.assert_allclose(project(reduced), project(maps), rtol=1e-5)
    with pytest.raises(ValueError, match="reduced over steps"):
        project(reduced, steps="late")


def test_a_lattice_without_frequency_axis():
    values = np.random.default_rng(0).random((1, 2, 1, 172))
    out = project({"dit": site(values, ["bass"])})
    assert out.attrs["frequency_resolved"] is False
    assert out.attrs["finest_lattice"] == [172, 1]
    np.testing.assert_array_equal(out, np.broadcast_to(out[..., :1], out.shape))
    np.testing.assert_allclose(out[..., :1], resized(values.mean(1)[..., None], (128, 1)), rtol=1e-5)


def test_an_htk_lattice_lands_at_its_hertz():
    edges = librosa.mel_to_hz(np.linspace(0, librosa.hz_to_mel(10000, htk=True), 65), htk=True)
    for hz in (100, 1000, 5000):
        values = np.zeros((1, 1, 1, 10, 64))
        values[..., np.searchsorted(edges, hz) - 1] = 1
        out = project({"unet": site(values, ["bass"], edges=edges)})
        assert abs(int(out[0, 0, 50].argmax()) - np.floor(GRID.hz_to_row(hz))) <= 1
    assert out.attrs["finest_lattice"] == [10, int(np.searchsorted(edges, 8000))]


def test_a_linear_lattice_lands_at_its_hertz_and_is_silent_outside():
    edges = np.linspace(0, 4000, 41)
    values = np.broadcast_to((edges[1:] + edges[:-1]) / 2, (1, 1, 1, 10, 40))  # the map's value is its frequency
    out = project({"unet": site(values, ["bass"], edges=edges)})[0, 0, 0].values
    centres = GRID.mel_to_hz((np.arange(64) + 0.5) / 64 * GRID.hz_to_mel(8000))
    inside = centres < 4000
    assert np.isnan(out[~inside]).all()
    assert np.isfinite(out[inside]).all()
    interior = inside & (centres > 100) & (centres < 3900)
    np.testing.assert_allclose(out[interior], centres[interior], rtol=0.01)
    wide = {"narrow": site(values, ["bass"], edges=edges), "wide": site(np.ones((1, 1, 1, 10, 8)), ["bass"])}
    np.testing.assert_array_equal(project(wide)[0, 0, 0, ~inside], 1)  # only the wide lattice speaks there


@pytest.mark.parametrize("spatial", ["mean", "max", "topk"])
def test_time_outside_the_lattice_is_nan(spatial):
    ramp = (np.arange(100) + 0.5) * 0.08
    maps = {"unet": site(np.broadcast_to(ramp[:, None], (1, 1, 1, 100, 8)), ["bass"])}
    out = project(maps, MelGrid(duration=10.0), spatial=spatial)[0, 0, :, 0]
    outside = out["time"].values > 8
    assert np.isnan(out[outside]).all()
    np.testing.assert_allclose(out[~outside], np.clip(out["time"][~outside], ramp[0], ramp[-1]), rtol=1e-5)
    crop = project(maps, MelGrid(duration=2.0, start=3.0), spatial=spatial)[0, 0, :, 0]
    np.testing.assert_allclose(crop, crop["time"], rtol=1e-5)
    assert crop.attrs["finest_lattice"] == [26, 8]  # 3.0 s lies in the middle of column 37
    assert crop["time"].values[[0, -1]] == pytest.approx([3 + 1 / 128, 5 - 1 / 128])


def test_the_span_is_the_finest_sites_and_survives_a_selection():
    maps = random_maps()
    maps["mid"] = site(np.ones((2, 3, 2, 26, 2)), ["bass", "drums"], seconds=8.32)  # a padded last column
    out = project(maps)
    assert out.attrs["seconds_per_column"] * 128 == pytest.approx(8.0)
    later = project({"down1": maps["down1"].isel(time=slice(50, None))})
    assert later["time"].values[0] == pytest.approx(4 + 1 / 64)
    assert later.attrs["time_start"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "*attn3*"}, r"(?s)no site matches.*attn3.*down1.*mid"),
        ({"layers": []}, "no site matches"),
        ({"layers": ["mid", "up*"]}, r"up\*"),
        ({"steps": "early"}, "steps must be"),
        ({"steps": "late"}, "no 'sigma' coordinate"),
        ({"steps": [1, 2]}, r"shape \(2,\).*3 steps"),
        ({"steps": [1, -1, 1]}, "non-negative"),
        ({"steps": [0, 0, 0]}, "not all zero"),
        ({"spatial": "median"}, "spatial"),
        ({"spatial": "topk", "top_k": 0}, "top_k"),
        ({"layer_weights": [0.5, 0.5]}, r"shape \(2,\), 3 sites"),
        ({"layer_weights": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"layer_weights": [-0.5, 0.5, 1]}, "non-negative"),
        ({"layer_weights": {"mid": 1.0}}, "missing.*down1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        project(random_maps(), **options)


def broken(change):
    maps = random_maps()
    maps["mid"] = change(maps["mid"])
    return maps


def _partly_nan(m):
    m[1, 2, 0, 3] = np.nan
    return m


def _no_edges(m):
    return m.drop_vars(["frequency_low"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_partly_nan, "'bass' in prompt 1, step 2 has 2 NaN or infinite of 50"),
        (lambda m: m * np.inf, "NaN or infinite|per_column"),
        (_no_edges, "frequency_low"),
        (lambda m: m.rename(word="key"), r"'key'.*\(2, 3, 2, 25, 2\)"),
        (lambda m: m.isel(frequency=[1, 0]), "ascend"),
        (lambda m: m.isel(time=[0, 2, 3]), "evenly spaced"),
        (lambda m: m.isel(prompt=[0]), "disagree about their prompts"),
        (lambda m: m.isel(step=[]), "empty"),
        (lambda m: m.drop_attrs(), "seconds_per_column"),
        (lambda m: m.drop_vars("time"), "'time'"),
        (lambda m: m.assign_coords(frequency_low=("frequency", [0.0, 3000.0])), "adjoin"),
    ],
)
def test_maps_that_are_not_on_a_lattice(change, message):
    with pytest.raises(ValueError, match=message):
        project(broken(change))


@pytest.mark.parametrize("sigma", [[1.0, 0.5, 0.0], [1.0, np.nan, 0.5]])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match="sigma must be positive"):
        project(random_maps(sigma=sigma), steps="late")


def test_a_single_array_is_not_a_mapping():
    with pytest.raises(TypeError, match="mapping"):
        project(random_maps()["mid"])


def test_import_is_light():
    code = (
        "import sys, aiba_eval\n"
        "assert not {'torch', 'librosa', 'sklearn', 'scipy', 'xarray'} & set(sys.modules), sorted(sys.modules)\n"
        "from aiba_eval import MelGrid, project, score, templates, metrics, references\n"
        "assert not {'torch', 'librosa', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert set(aiba_eval.__all__) <= set(dir(aiba_eval))\n"
        "try:\n"
        "    aiba_eval.nothing\n"
        "except AttributeError as error:\n"
        "    assert 'nothing' in str(error)\n"
        "else:\n"
        "    raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
