"""Bands and stem masks."""

import numpy as np
import pytest

from aiba_eval import MelGrid, templates

GRID = MelGrid()


def test_paper_bands_on_the_default_grid():
    assert templates.instruments("paper") == ("bass", "guitar", "piano")
    bass, piano = templates.band_mask("bass"), templates.band_mask("piano", GRID, "paper")
    assert bass.shape == (128, 64)
    assert bass.dtype == bool
    assert bass[:, :5].all()
    assert not bass[:, 5:].any()
    assert templates.area(bass) == 5 / 64
    assert piano[:, 36:55].all()
    assert templates.area(piano) == 19 / 64
    np.testing.assert_array_equal(piano, templates.band_mask("guitar"))


@pytest.mark.parametrize("preset", templates.presets())
def test_every_band_is_where_it_says(preset):
    for name in templates.instruments(preset):
        low, high = templates.band(name, preset)
        mask = templates.band_mask(name, GRID, preset)
        np.testing.assert_array_equal(mask[17], [low <= f < high for f in GRID.frequencies])
        assert 0 < templates.area(mask) < 1


def test_measured_bands_follow_another_grid():
    grid = MelGrid(time=10, mel=32, scale="htk", fmax=4000, sample_rate=8000)
    mask = templates.band_mask("drums", grid, "measured")
    assert mask.shape == (10, 32)
    assert mask[0, -1]
    with pytest.raises(ValueError, match="selects no row"):
        templates.band_mask("bass", MelGrid(fmin=1000), "paper")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("drum", "drums"),
        ("Drums", "drums"),
        ("electric_bass", "bass"),
        ("Bass Guitar", "bass"),
        ("strings", "strings"),
        ("Strings (continued)", "strings continued"),
        ("string-ensemble", "strings continued"),
        ("flute", "pipe"),
        ("  Synth   Pad", "synth pad"),
        ("Chromatic Percussion", "chromatic percussion"),
    ],
)
def test_aliases(alias, name):
    assert templates.canonical(alias) == name
    np.testing.assert_array_equal(
        templates.band_mask(alias, GRID, "measured"), templates.band_mask(name, GRID, "measured")
    )


def test_every_alias_leads_to_a_class():
    assert {templates.canonical(a) for a in templates._ALIASES} <= set(templates.instruments("measured"))


def test_what_is_unknown_is_said():
    with pytest.raises(ValueError, match=r"unknown instrument 'theremin'.*bass.*drums"):
        templates.band_mask("theremin")
    with pytest.raises(ValueError, match=r"'paper' has no band for 'drums'.*bass, guitar, piano.*measured"):
        templates.band_mask("drum", GRID, "paper")
    with pytest.raises(ValueError, match=r"unknown preset 'papers'.*paper, measured"):
        templates.band_mask("bass", GRID, "papers")


def stems(seed=0, count=3, shape=(12, 9)):
    rng = np.random.default_rng(seed)
    return {f"s{i}": rng.exponential(size=shape) ** 3 for i in range(count)}


@pytest.mark.parametrize(("quantity", "per_decade"), [("power", 10), ("magnitude", 20)])
@pytest.mark.parametrize("floor_db", [-40.0, -10.0, -np.inf])
def test_dominance_and_share_by_brute_force(quantity, per_decade, floor_db):
    mels = stems()
    mels["s0"][3] = mels["s1"][3] = mels["s2"][3] = 0.0  # a silent column
    loudest = max(sum(m[t, f] for m in mels.values()) for t in range(12) for f in range(9))
    for name in mels:
        share = templates.soft_share(mels, name, floor_db=floor_db, quantity=quantity)
        mask = templates.dominance_mask(mels, name, 0.5, floor_db, quantity=quantity)
        for t in range(12):
            for f in range(9):
                total = sum(m[t, f] for m in mels.values())
                level = per_decade * np.log10(total / loudest) if total > 0 else -np.inf
                expected = mels[name][t, f] / total if level > floor_db else 0.0
                assert share[t, f] == pytest.approx(expected)
                assert mask[t, f] == (expected > 0.5)


def test_dominance_masks_are_disjoint_and_shares_sum_to_one():
    mels = stems(1)
    masks = [templates.dominance_mask(mels, name) for name in mels]
    assert np.sum(masks, axis=0).max() == 1
    total = sum(templates.soft_share(mels, name, floor_db=-np.inf) for name in mels)
    np.testing.assert_allclose(total, 1)
    wider = templates.dominance_mask(mels, "s0", share=0.2)
    assert templates.area(wider) > templates.area(masks[0])


def test_energy_mask():
    stem = np.array([[1.0, 1e-2, 1.1e-3], [1e-3, 1e-4, 0.0]])
    np.testing.assert_array_equal(templates.energy_mask(stem), [[True, True, True], [False, False, False]])
    np.testing.assert_array_equal(templates.energy_mask(stem, -15), [[True, False, False], [False] * 3])
    np.testing.assert_array_equal(
        templates.energy_mask(stem, quantity="magnitude"), [[True, False, False], [False] * 3]
    )
    assert templates.area(templates.energy_mask(np.zeros((3, 4)))) == 0
    assert templates.area(templates.energy_mask(stem, -np.inf)) == 5 / 6


def test_masks_of_rendered_tones_are_the_tones_rows():
    time = np.arange(32000) / 16000
    mels = {n: GRID.power(np.sin(2 * np.pi * f * time), 16000) for n, f in (("bass", 100), ("flute", 2000))}
    for name, hz in (("bass", 100), ("flute", 2000)):
        mask = templates.dominance_mask(mels, name)
        assert mask[:, int(GRID.hz_to_row(hz))].mean() > 0.95
        assert templates.energy_mask(mels[name])[:, int(GRID.hz_to_row(hz))].all()
    assert not (templates.dominance_mask(mels, "bass") & templates.dominance_mask(mels, "flute")).any()


def test_stems_that_do_not_fit():
    mels = stems()
    with pytest.raises(ValueError, match=r"no stem 'bass'; stems: s0, s1, s2"):
        templates.dominance_mask(mels, "bass")
    with pytest.raises(ValueError, match=r"\(12, 9\).*\(9, 12\)"):
        templates.soft_share({**mels, "s1": mels["s1"].T}, "s0")
    with pytest.raises(ValueError, match="log-mel"):
        templates.energy_mask(np.log(mels["s0"]))
    with pytest.raises(ValueError, match="finite"):
        templates.energy_mask(mels["s0"] * np.nan)
    with pytest.raises(ValueError, match=r"\(108,\)"):
        templates.energy_mask(mels["s0"].ravel())
    with pytest.raises(ValueError, match="quantity"):
        templates.energy_mask(mels["s0"], quantity="dB")
    with pytest.raises(ValueError, match="share"):
        templates.dominance_mask(mels, "s0", share=1.0)


# --- bands while an instrument plays, profiles, and everything of one section


def test_a_band_while_the_instrument_plays():
    active = np.arange(128) % 3 == 0
    mask = templates.active_band_mask("bass", active, GRID, "paper")
    np.testing.assert_array_equal(mask, np.outer(active, templates.band_mask("bass")[0]))
    assert templates.area(mask) == pytest.approx(5 / 64 * active.mean())
    with pytest.raises(ValueError, match=r"each of 128 columns, got shape \(64,\)"):
        templates.active_band_mask("bass", np.ones(64))


@pytest.mark.parametrize(("quantity", "per_decade"), [("power", 10), ("magnitude", 20)])
def test_data_profile_by_brute_force(quantity, per_decade):
    mels = list(stems(3).values())
    mels[1] = mels[1][:5] * 1e6  # shorter and far louder: counts by its frames, not by its level
    mels[0][4] *= 10 ** (-30 / per_decade) / 10  # near or below the floor
    mels[2][0] = 0.0
    rows = []
    for mel in mels:
        loudest = max(sum(frame) for frame in mel)
        rows += [
            [value / sum(frame) for value in frame]
            for frame in mel
            if sum(frame) > 0 and per_decade * np.log10(sum(frame) / loudest) > -20
        ]
    profile = templates.data_profile(iter(mels), floor_db=-20, quantity=quantity)
    np.testing.assert_allclose(profile, np.mean(rows, axis=0))
    assert profile.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        templates.data_profile([1e9 * m for m in mels], floor_db=-20, quantity=quantity), profile
    )


def test_a_profile_needs_something_that_sounds():
    for nothing in ([], [np.zeros((3, 4))]):
        with pytest.raises(ValueError, match="no frame sounds"):
            templates.data_profile(nothing)
    with pytest.raises(ValueError, match="same rows: 4, then 5"):
        templates.data_profile([np.ones((3, 4)), np.ones((3, 5))])
    with pytest.raises(ValueError, match="quantity"):
        templates.data_profile([np.ones((3, 4))], quantity="dB")


def test_profile_mask_holds_the_share_with_the_fewest_rows():
    grid = MelGrid(time=3, mel=6)
    profile = np.array([0.1, 0.4, 0.0, 0.3, 0.15, 0.05])
    for share, rows in (
        (0.3, [1]),
        (0.4, [1]),
        (0.5, [1, 3]),
        (0.7, [1, 3]),
        (0.86, [0, 1, 3, 4]),
        (0.99, [0, 1, 3, 4, 5]),
    ):
        mask = templates.profile_mask(profile, grid, share=share)
        np.testing.assert_array_equal(np.flatnonzero(mask[0]), rows)
        assert (mask == mask[0]).all()
        fewer = sorted(profile)[-(len(rows) - 1) :] if len(rows) > 1 else [0]
        assert sum(fewer) < share
    np.testing.assert_array_equal(templates.profile_mask(7 * profile, grid), templates.profile_mask(profile, grid))
    for bad in (profile[:5], -profile, 0 * profile, profile * np.nan):
        with pytest.raises(ValueError, match="a profile is 6 non-negative numbers"):
            templates.profile_mask(bad, grid)
    with pytest.raises(ValueError, match="share must lie"):
        templates.profile_mask(profile, grid, share=1.0)


def test_ground_truth_holds_each_mask_its_area_and_what_is_missing():
    grid = MelGrid(time=12, mel=32)
    mels = dict(zip(("bass", "piano", "vocals"), stems(4, shape=(12, 32)).values()))
    profile = templates.data_profile(list(stems(5, shape=(12, 32)).values()))
    truth = templates.ground_truth(
        {**mels, "flute": np.zeros((12, 32))},
        grid,
        words=["bass", "vocals", "flute", "organ"],
        profiles={"bass": profile},
    )
    assert set(truth.masks) == {"dominance", "energy", "band:paper", "band:measured", "profile"}
    np.testing.assert_array_equal(truth.masks["dominance"]["bass"], templates.dominance_mask(mels, "bass"))
    np.testing.assert_array_equal(truth.masks["energy"]["vocals"], templates.energy_mask(mels["vocals"]))
    np.testing.assert_array_equal(truth.masks["band:measured"]["bass"], templates.band_mask("bass", grid, "measured"))
    np.testing.assert_array_equal(truth.masks["profile"]["bass"], templates.profile_mask(profile, grid))
    np.testing.assert_allclose(truth.shares["bass"], templates.soft_share(mels, "bass"))
    assert set(truth.shares) == {"bass", "vocals"}
    for kind, masks in truth.masks.items():
        assert truth.areas[kind] == {word: mask.mean() for word, mask in masks.items()}
        assert all(0 < value < 1 for value in truth.areas[kind].values())
    assert truth.excluded["flute", "dominance"] == truth.excluded["organ", "profile"] == "the instrument is silent"
    assert truth.excluded["vocals", "band:paper"] == "the preset 'paper' has no band for it"
    assert truth.excluded["vocals", "profile"] == "no other piece has a profile of it"
    expected = 4 * 5 - sum(len(masks) for masks in truth.masks.values())
    assert len(truth.excluded) == expected  # every word and kind is in one or the other
    with pytest.raises(ValueError, match=r"'bass' is \(12, 32\), the grid is \(128, 64\)"):
        templates.ground_truth(mels)


def test_a_mask_that_cannot_be_scored_is_excluded():
    mels = {"bass": np.ones((12, 9)), "piano": np.full((12, 9), 0.1)}
    truth = templates.ground_truth(mels, MelGrid(time=12, mel=9))
    assert truth.excluded["bass", "band:paper"] == "the mask is empty"  # no row of this grid lies below 250 Hz
    assert "dominance" not in truth.masks
    assert truth.excluded["bass", "dominance"] == truth.excluded["piano", "energy"] == "the mask is full"
    assert truth.excluded["piano", "dominance"] == "the mask is empty"
