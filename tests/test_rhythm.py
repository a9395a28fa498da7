"""Onsets and beats of maps against mir_eval on constructed times, and the refusals."""

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mir_eval import beat, onset

from aiba_eval import rhythm

STEP = 0.02


def struck(times, duration=8.0, step=STEP, rows=6, decay=0.06):
    """A map that jumps at given times and decays."""
    t = (np.arange(round(duration / step)) * step)[:, None]
    after = t - np.asarray(times)[None] + 1e-9
    envelope = np.where(after >= 0, np.exp(-after.clip(0) / decay), 0).sum(axis=1)
    return envelope[:, None] * np.linspace(1, 2, rows)


def test_onsets_are_where_the_map_rises():
    times = np.array([0.5, 1.2, 1.9, 4.0, 7.5])
    found = rhythm.map_onsets(struck(times), STEP)
    np.testing.assert_allclose(found, times, atol=STEP / 2 + 1e-9)
    assert rhythm.novelty(struck(times)).max() == 1
    assert not rhythm.novelty(1 + 1e-9 * np.random.default_rng(0).random((50, 4))).any()
    assert rhythm.map_onsets(np.ones((50, 4)), STEP).size == 0
    ramp = np.repeat([[0.0], [0.0], [0.1], [0.1], [1.0], [1.0]], 3, axis=1)
    assert rhythm.novelty(ramp).tolist() == pytest.approx([0, 0, 1 / 9, 0, 1, 0])
    np.testing.assert_allclose(rhythm.map_onsets(ramp, 0.5), [2.0])
    np.testing.assert_allclose(rhythm.map_onsets(ramp, 0.5, threshold=0.1), [1.0, 2.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_onset_scores_are_mir_evals(seed):
    rng = np.random.default_rng(seed)
    known = np.sort(rng.choice(np.arange(1, 80), 12, replace=False)) * 0.1
    played = np.sort((known + rng.normal(0, 0.03, 12))[rng.random(12) < 0.7])
    saliency = struck(np.clip(played, 0.05, 7.9))
    got = rhythm.onset_alignment(saliency, known, STEP)
    expected = onset.f_measure(known, rhythm.map_onsets(saliency, STEP), window=0.05)
    assert (got["f1"], got["precision"], got["recall"]) == pytest.approx(expected)
    assert got["known"] == 12
    assert 0 <= got["chance"] <= 1
    assert 1 / 201 <= got["p"] <= 1


def test_the_right_times_beat_chance_and_wrong_ones_do_not():
    rng = np.random.default_rng(0)
    known = np.sort(rng.choice(np.arange(1, 78), 14, replace=False)) * 0.1
    right = rhythm.onset_alignment(struck(known), known, STEP)
    assert right["f1"] > 0.95
    assert right["chance"] < 0.5
    assert right["p"] < 0.02
    late = rhythm.onset_alignment(struck(known[:-1] + 0.06), known, STEP)
    assert late["f1"] < 0.3
    assert rhythm.onset_alignment(struck(known[:-1] + 0.06), known, STEP, window=0.08)["f1"] > 0.9
    # onsets everywhere find every note, and so do their shifts
    dense = rhythm.onset_alignment(np.tile([[0.0] * 3, [1.0] * 3], (200, 1)), known, STEP)
    assert dense["recall"] == 1
    assert dense["p"] > 0.3
    assert dense["chance"] == pytest.approx(dense["f1"], abs=0.02)


def test_what_has_no_onsets():
    known = np.array([1.0, 2.0])
    silent = rhythm.onset_alignment(np.ones((100, 4)), known, STEP)
    assert silent == {
        "f1": 0, "precision": 0, "recall": 0, "chance": 0, "p": 1, "found": 0, "known": 2,
    }  # fmt: skip
    nothing = rhythm.onset_alignment(struck([1.0]), [], STEP)
    assert math.isnan(nothing["f1"]) and math.isnan(nothing["chance"])
    assert (nothing["found"], nothing["known"]) == (1, 0)


@pytest.mark.parametrize("bpm", [90, 100, 120, 140])
@pytest.mark.parametrize("step", [0.02, 0.04])
def test_beats_of_a_steady_pulse(bpm, step):
    beats = np.arange(0.37, 10, 60 / bpm)
    saliency = struck(beats, duration=10.24, step=step, decay=0.08)
    got = rhythm.beat_alignment(saliency, beats, step)
    assert got["f1"] > 0.9
    assert got["chance"] < 0.5
    assert set(got) == {"f1", "chance", "p", "found", "known"}
    # mir_eval's own report, with the first five seconds counted
    whole = beat.evaluate(beats, rhythm.map_beats(saliency, step), min_beat_time=0)
    assert got["f1"] == pytest.approx(whole["F-measure"])
    assert rhythm.beat_alignment(np.ones((256, 4)), beats, 0.04)["f1"] == 0


def test_too_coarse_a_lattice_is_refused_with_the_reason():
    saliency = struck([1.0], step=0.08)
    with pytest.raises(
        rhythm.TooCoarse, match=r"80 ms wide and onsets count within ±50 ms: its times.*temporal_pearson"
    ):
        rhythm.onset_alignment(saliency, [1.0], 0.08)
    with pytest.raises(rhythm.TooCoarse, match="80 ms wide and beats count within ±70 ms"):
        rhythm.beat_alignment(saliency, [1.0], 0.08)
    assert rhythm.onset_alignment(saliency, [1.04], 0.08, window=0.1)["f1"] == 1
    # a fine grid does not make a coarse lattice finer
    with pytest.raises(rhythm.TooCoarse, match="160 ms"):
        rhythm.onset_alignment(struck([1.0]), [1.0], STEP, resolution=0.16)
    assert rhythm.onset_alignment(struck([1.0]), [1.0], STEP, resolution=0.001)["f1"] == 1
    assert rhythm.beat_alignment(struck(np.arange(0.5, 8, 0.5), step=0.06), [1.0], 0.06)["found"] > 0


@pytest.mark.parametrize("events", [[2.0, 1.0], [1.0, 1.0], [-0.1, 1.0], [9.0], [[1.0]]])
def test_events_that_are_none(events):
    with pytest.raises(ValueError, match="onsets must be ascending times from 0 to 8.000 s"):
        rhythm.onset_alignment(struck([1.0]), events, STEP)
    with pytest.raises(ValueError, match="must be positive"):
        rhythm.onset_alignment(struck([1.0]), [1.0], 0.0)


@pytest.mark.parametrize(("columns", "expected"), [(256, 0.04), (64, 0.16), (1024, 0.04)])
def test_the_resolution_of_a_projected_map(columns, expected):
    projected = xr.DataArray(
        np.zeros((1, 1, 256, 4)),
        dims=("prompt", "word", "time", "mel"),
        attrs={"seconds_per_column": 0.04, "finest_lattice": [columns, 4]},
    )
    assert rhythm.time_resolution(projected) == pytest.approx(expected)
