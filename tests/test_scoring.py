"""Rows: every pair, every metric, every reference, and a reason where there is no number."""

import json
import math

import numpy as np
import pytest
import xarray as xr

from aiba_eval import MelGrid, metrics, project, references, score, templates
from aiba_eval.scoring import unscored

GRID = MelGrid(time=16, mel=12)


def projected(prompts=2, words=("bass", "drums", "(other)"), seed=0, **attrs):
    values = np.random.default_rng(seed).random((prompts, len(words), *GRID.shape)).astype(np.float32)
    return xr.DataArray(
        values,
        dims=("prompt", "word", "time", "mel"),
        coords={
            "prompt": ["a bass and drums"] * prompts,
            "waveform": ("prompt", np.arange(prompts)),
            "word": list(words),
        },
        attrs={"finest_lattice": [8, 4], **attrs},
    )


def masks_of(*words, seed=1):
    rng = np.random.default_rng(seed)
    return {w: rng.random(GRID.shape) < 0.3 for w in words}


def test_rows_hold_each_metric_beside_its_references():
    maps, masks = projected(), masks_of("bass", "drums")
    mix = np.random.default_rng(2).random(GRID.shape)
    prior = {"bass": references.class_prior([masks["drums"]])}
    rows = score(maps, masks, mix=mix, references={"class_prior": prior, "half": np.full(GRID.shape, 0.5)})
    assert len(rows) == 2 * 2 * len(metrics.METRICS)
    assert len({tuple(r) for r in rows}) == 1
    for row in rows:
        mask = masks[row["word"]]
        saliency = maps[row["prompt_index"]].sel(word=row["word"]).values
        name = row["metric"]
        assert row["prompt"] == "a bass and drums"
        assert row["waveform"] == row["prompt_index"]
        assert row["mask_area"] == pytest.approx(mask.mean())
        assert row["value"] == pytest.approx(metrics.evaluate(saliency, mask)[name])
        assert row["chance"] == pytest.approx(references.chance(mask, saliency)[name], nan_ok=True)
        assert row["mix_energy"] == pytest.approx(metrics.evaluate(mix, mask)[name])
        oracle = references.oracle_projection(mask, (8, 4))
        assert row["oracle_projection"] == pytest.approx(metrics.evaluate(oracle, mask)[name])
        assert row["half"] == pytest.approx(metrics.evaluate(np.ones(GRID.shape), mask)[name], nan_ok=True)
        if row["word"] == "bass":
            assert row["class_prior"] == pytest.approx(metrics.evaluate(prior["bass"], mask)[name], nan_ok=True)
        else:
            assert math.isnan(row["class_prior"])
        assert row["reason"] == ""
    assert unscored(rows) == {}
    json.dumps(rows)


def test_a_selection_of_metrics_and_options():
    maps, masks = projected(prompts=1), masks_of("bass")
    options = {"threshold": 0.8, "thresholds": (0.2, 0.8), "mel_tolerance": 1, "time_tolerance": 1}
    rows = score(maps, masks, metrics=["iou", "iou_area", "pointing_game"], lattice=[(2, 2), (16, 12)], **options)
    expected = metrics.evaluate(maps.values[0, 0], masks["bass"], **options)
    assert [(r["metric"], r["value"]) for r in rows] == [
        (m, pytest.approx(expected[m])) for m in ("iou", "iou_area", "pointing_game")
    ]
    assert rows[0]["oracle_projection"] == 1
    assert "mix_energy" not in rows[0]
    del maps.attrs["finest_lattice"]
    assert "oracle_projection" not in score(maps, masks)[0]


def test_masks_mixes_and_references_per_prompt():
    maps = projected()
    masks = [masks_of("bass", seed=1), masks_of("drums", seed=2)]
    mix = np.random.default_rng(3).random((2, *GRID.shape))
    rows = score(maps, masks, mix=mix, references={"same": mix}, metrics=["average_precision"])
    assert [(r["prompt_index"], r["word"]) for r in rows] == [(0, "bass"), (1, "drums")]
    for i, row in enumerate(rows):
        assert row["mix_energy"] == row["same"] == metrics.average_precision(mix[i], masks[i][row["word"]])


def test_pairs_without_a_score_are_rows_with_a_reason():
    maps = projected(words=("bass", "drums", "flute", "piano", "organ"))
    maps[0, 0] = np.nan
    maps[0, 1, :4] = np.nan
    maps[0, 4] = 0.5
    masks = {
        **masks_of("bass", "drums", "oboe", "organ"),
        "flute": np.zeros(GRID.shape, bool),
        "piano": np.ones(GRID.shape, bool),
    }
    rows = score(maps.isel(prompt=[0]), masks, mix=np.ones(GRID.shape))
    assert len(rows) == 6 * len(metrics.METRICS)
    reasons = {r["word"]: r["reason"] for r in rows if r["metric"] == "average_precision"}
    assert reasons == {
        "bass": "the prompt does not have this word",
        "drums": "the map covers 75% of the grid: project onto a grid inside the lattice's range",
        "oboe": "the maps have no word 'oboe'",
        "organ": "",
        "flute": "the mask is empty",
        "piano": "the mask is full",
    }
    for row in rows:
        assert math.isnan(row["value"]) == bool(row["reason"])
        if row["word"] != "organ":
            assert math.isnan(row["mix_energy"])
    organ = {r["metric"]: r["reason"] for r in rows if r["word"] == "organ" and r["reason"]}
    assert organ == {m: metrics.UNDEFINED[m] for m in ("precision", "profile_pearson", "profile_spearman")}
    assert unscored(rows)["average_precision", "the mask is empty"] == 1
    assert sum(unscored(rows).values()) == 5 * len(metrics.METRICS) + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {"bass": np.ones((3, 4), bool)}}, r"'bass' is \(3, 4\), the maps are \(16, 12\)"),
        ({"masks": [{}]}, "1 mappings of masks for 2 prompts"),
        ({"mix": np.ones((3, 4))}, r"\(16, 12\) or \(2, 16, 12\), got \(3, 4\)"),
        ({"metrics": ["accuracy"]}, "unknown metrics.*average_precision"),
        ({"references": {"chance": np.ones(GRID.shape)}}, "already use"),
        ({"references": {"prior": np.ones((3, *GRID.shape))}}, "2 prompts"),
        ({"references": {"prior": np.ones((3, 4))}}, r"\(3, 4\)"),
        ({"maps": projected().transpose("word", "prompt", "mel", "time")}, "must have dims"),
        ({"masks": {"bass": np.full(GRID.shape, 0.5)}}, "boolean"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    arguments = {"maps": projected(), "masks": masks_of("bass"), **options}
    with pytest.raises(ValueError, match=message):
        score(arguments.pop("maps"), arguments.pop("masks"), **arguments)


def test_from_maps_to_rows():
    """A site that attends low for "bass" beats chance on the paper's bass band, and not on the piano's."""
    values = np.full((1, 2, 2, 100, 8), 0.1, np.float32)
    values[:, :, 0, :, 0] = 0.9
    edges = MelGrid().edges[::8]
    site = xr.DataArray(
        values,
        dims=("prompt", "step", "word", "time", "frequency"),
        coords={
            "prompt": ["bass, piano"],
            "word": ["bass", "piano"],
            "time": 0.08 * (np.arange(100) + 0.5),
            "frequency_low": ("frequency", edges[:-1]),
            "frequency_high": ("frequency", edges[1:]),
        },
        attrs={"seconds_per_column": 0.08, "time_start": 0.0},
    )
    maps = project({"mid": site})
    masks = {w: templates.band_mask(w) for w in ("bass", "piano")}
    rows = {(r["word"], r["metric"]): r for r in score(maps, masks)}
    bass, piano = rows["bass", "average_precision"], rows["piano", "average_precision"]
    assert bass["value"] > 0.9
    assert bass["chance"] == pytest.approx(5 / 64)
    assert bass["waveform"] is None
    assert piano["value"] == pytest.approx(piano["chance"])
    assert rows["bass", "pointing_game"]["value"] == 1
    assert bass["oracle_projection"] > 0.9
