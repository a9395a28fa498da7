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
