"""Rows: every pair, every metric, every reference, and a reason where there is no number."""

import json
import math

import numpy as np
import pytest
import xarray as xr

from aiba_eval import MelGrid, metrics, project, references, score, templates
from aiba_eval.scoring import REFERENCES, summarise, unscored
from aiba_eval.statistics import benjamini_hochberg, holm, interval, paired_permutation

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
    constant = ("precision", "profile_pearson", "profile_spearman", "temporal_pearson", "temporal_spearman")
    assert organ == {m: metrics.UNDEFINED[m] for m in constant}
    assert unscored(rows)["average_precision", "the mask is empty"] == 1
    assert sum(unscored(rows).values()) == 5 * len(metrics.METRICS) + 5


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


# --- references that are made of the maps themselves, and priors


def test_other_words_other_pieces_and_time_shifts():
    maps = projected(prompts=4, words=("bass", "drums", "flute", "(other)"))
    masks = [masks_of("bass", "drums", "flute", seed=i) for i in range(4)]
    maps[1, 2] = np.nan  # the second prompt has no flute
    pieces = ["a", "b", "a", "c"]
    rows = score(maps, masks, pieces=pieces, metrics=["average_precision", "mass_accuracy"])
    by_key = {(r["prompt_index"], r["word"], r["metric"]): r for r in rows}
    words = ["bass", "drums", "flute"]
    for (i, word, metric), row in by_key.items():
        assert row["piece"] == pieces[i]
        if (i, word) == (1, "flute"):
            assert math.isnan(row["other_word"]) and math.isnan(row["other_piece"]) and math.isnan(row["time_shift"])
            continue
        mask, here = masks[i][word], maps.values[i]

        def of(saliency, metric=metric, mask=mask):
            return metrics.evaluate(saliency, mask)[metric]

        others = [of(here[k]) for k, w in enumerate(words) if w != word and np.isfinite(here[k]).all()]
        assert len(others) == (1 if i == 1 else 2)  # never "(other)", which has no mask
        assert row["other_word"] == pytest.approx(np.mean(others))
        k = words.index(word)
        elsewhere = [
            of(maps.values[j, k]) for j in range(4) if pieces[j] != pieces[i] and np.isfinite(maps.values[j, k]).all()
        ]
        assert row["other_piece"] == pytest.approx(np.mean(elsewhere))
        shifts = [of(references.time_shift(here[k], part)) for part in references.SHIFTS]
        assert row["time_shift"] == pytest.approx(np.mean(shifts))
    assert "other_piece" not in score(maps, masks)[0]
    assert "piece" not in score(maps, masks)[0]
    with pytest.raises(ValueError, match="1 pieces for 4 prompts"):
        score(maps, masks, pieces=["a"])
    alone = score(maps.isel(prompt=[0]), {"bass": masks[0]["bass"]}, metrics=["iou"])
    assert math.isnan(alone[0]["other_word"])


def test_priors_and_their_product_with_the_mix():
    maps, masks = projected(prompts=1), masks_of("bass", "drums")
    prior = references.class_prior([masks["drums"]], frequency_only=False) * 0.7 + 0.1
    mix = np.random.default_rng(5).random(GRID.shape)
    rows = score(maps, masks, mix=mix, priors={"bass": prior}, metrics=["average_precision"])
    by_word = {r["word"]: r for r in rows}
    assert by_word["bass"]["class_prior"] == metrics.average_precision(prior, masks["bass"])
    assert by_word["bass"]["prior_times_mix"] == metrics.average_precision(prior * mix, masks["bass"])
    assert math.isnan(by_word["drums"]["class_prior"]) and math.isnan(by_word["drums"]["prior_times_mix"])
    without = score(maps, masks, priors={"bass": prior})[0]
    assert "prior_times_mix" not in without
    with pytest.raises(ValueError, match="already use"):
        score(maps, masks, priors={"bass": prior}, references={"class_prior": prior})
    assert [r for r in REFERENCES if r in rows[0]] == [r for r in rows[0] if r in REFERENCES]


def test_one_column_of_time_cannot_be_shifted():
    maps = projected(prompts=1).isel(time=[0])
    row = score(maps, {"bass": np.arange(12)[None] < 4}, metrics=["average_precision"])[0]
    assert math.isnan(row["time_shift"])
    assert row["value"] > 0


# --- summaries


def row(piece, word, value, chance=0.2, **more):
    return {"piece": piece, "word": word, "metric": "average_precision", "value": value, "chance": chance, **more}


def test_a_summary_averages_within_pieces_first():
    rng = np.random.default_rng(0)
    scores = {p: rng.random(3) for p in "abcdefghijkl"}
    rows = [row(p, "bass", v, chance=0.1) for p, values in scores.items() for v in values]
    rows += [row("a", "bass", 0.9, chance=0.1)]  # a piece with more windows counts no more
    scores["a"] = np.append(scores["a"], 0.9)
    (got,) = summarise(rows, resamples=500)
    means = [values.mean() for values in scores.values()]
    expected = interval(means, resamples=500)
    assert (got["n"], got["without_value"], got["reference"]) == (12, 0, "chance")
    assert (got["value"], got["low"], got["high"]) == pytest.approx(tuple(expected))
    assert got["difference"] == pytest.approx(np.mean(means) - 0.1)
    assert got["difference_low"] == pytest.approx(expected.low - 0.1)
    assert got["ratio"] == pytest.approx(np.mean(means) / 0.1)
    assert got["p"] == got["p_corrected"] == paired_permutation(means, [0.1] * 12, resamples=500)


def test_a_summary_counts_what_is_missing_and_compares_like_with_like():
    rows = [row(str(i), "bass", 0.5 + i / 100, mix_energy=0.3 if i < 11 else math.nan) for i in range(14)]
    rows += [row("14", "bass", math.nan), row("15", "bass", math.nan)]
    rows += [row(str(i), "drums", 0.4) for i in range(9)]
    rows += [row("x", "flute", math.nan)]
    got = {(r["word"], r["reference"]): r for r in summarise(rows, resamples=300)}
    assert set(got) == {(w, r) for w in ("bass", "drums", "flute") for r in ("chance", "mix_energy")}
    mix = got["bass", "mix_energy"]
    assert (mix["n"], mix["reference_n"], mix["without_value"]) == (14, 11, 2)
    assert mix["value"] == pytest.approx(0.5 + 6.5 / 100)
    assert mix["difference"] == pytest.approx(0.5 + 5 / 100 - 0.3)  # over the eleven that have both
    drums = got["drums", "chance"]
    assert drums["note"] == "9 pieces: at least 10 are needed"
    assert drums["value"] == pytest.approx(0.4)
    assert math.isnan(drums["low"]) and math.isnan(drums["p"]) and math.isnan(drums["p_corrected"])
    assert math.isnan(got["drums", "mix_energy"]["reference_value"])
    flute = got["flute", "chance"]
    assert (flute["n"], flute["without_value"]) == (0, 1)
    assert math.isnan(flute["value"])
    json.dumps(list(got.values()))
    assert summarise(rows, minimum=9, resamples=50)[2]["note"] == "all 9 pieces alike: the interval has no width"


@pytest.mark.parametrize(("correction", "function"), [("holm", holm), ("benjamini-hochberg", benjamini_hochberg)])
def test_a_summary_corrects_over_all_that_it_tests(correction, function):
    rng = np.random.default_rng(1)
    rows = [
        row(str(i), word, 0.2 + shift + 0.05 * rng.normal())
        for word, shift in (("bass", 0.03), ("drums", 0.02), ("flute", 0.0))
        for i in range(15)
    ]
    got = summarise(rows, correction=correction, resamples=500)
    np.testing.assert_allclose([r["p_corrected"] for r in got], function([r["p"] for r in got]))
    assert any(r["p_corrected"] > r["p"] for r in got)
    together = summarise(rows, by=("metric",), resamples=500)
    assert len(together) == 1 and together[0]["n"] == 15


def test_what_a_summary_needs():
    with pytest.raises(ValueError, match=r"a row has no \['piece'\].*unit="):
        summarise([{"word": "bass", "metric": "iou", "value": 0.1}])
    with pytest.raises(ValueError, match="correction"):
        summarise([], correction="bonferroni")
    assert summarise([]) == []
    assert summarise([{"model": "m", "clip": 3, "value": 0.1}], by=("model",), unit="clip")[0]["reference"] == ""
