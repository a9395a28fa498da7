"""Diagnosis: each finding fires on maps made to have it, and does not on maps made not to."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import entropy, variation
from torch import nn

from aiba_eval import diagnose, diagnostics, paper_recipe
from aiba_eval.diagnostics import FINDINGS, SEVERITIES, conditional_maps, diagnose_model
from aiba_eval.run import CannotGenerate
from aiba_hooks import AttentionMaps, NothingCaptured, Tag, capture
from tests.conftest import generate
from tests.test_cli import aiba

RNG = np.random.default_rng(0)
WORDS = ("bass", "drums", "piano")
GROUPS = ("(special)", "(padding)")
LATTICE = (20, 8)


def softmax(logits):
    weights = np.exp(logits - logits.max(0))
    return weights / weights.sum(0)


def site(values, columns=(*WORDS, *GROUPS), *, prompt="bass drums piano", tag="cross", **attributes):
    """One site's array from (column, time, frequency) or (column, time): two steps that are alike."""
    values = np.asarray(values, np.float32)
    dims = ("prompt", "step", "word", "time", "frequency")[: values.ndim + 2]
    array = xr.DataArray(
        np.stack([values, values])[None], dims=dims, coords={"word": list(columns), "prompt": [prompt]}
    )
    array = array.assign_coords(time=(np.arange(values.shape[1]) + 0.5) * 0.1)
    if values.ndim == 3:
        edges = np.linspace(0, 8000, values.shape[2] + 1)
        array = array.assign_coords(
            frequency=("frequency", (edges[1:] + edges[:-1]) / 2),
            frequency_low=("frequency", edges[:-1]),
            frequency_high=("frequency", edges[1:]),
        )
    return array.assign_attrs(
        {"tag": tag, "pooling": "sum", "branch": "conditional", "seconds_per_column": 0.1} | attributes
    )


def varied(columns=5, lattice=LATTICE, scale=1.0, rng=RNG):
    """Probabilities that vary over everything."""
    return softmax(scale * rng.standard_normal((columns, *lattice)))


def maps(*values, **options):
    return AttentionMaps({f"layer.{i}": site(value, **options) for i, value in enumerate(values)})


HEALTHY = maps(varied(), varied())


def seen(name="layer.0", tag="cross", **options):
    fields = {"check": 1e-6, "nonfinite": 0, "captured": True, "key_shape": (2, 4, 10, 8)} | options
    return SimpleNamespace(name=name, tag=Tag(tag), **fields)


def captured(sites, arrays=HEALTHY, uncovered=()):
    """What diagnose reads of a capture."""
    return SimpleNamespace(sites=sites, maps=arrays, uncovered=list(uncovered))


# ---- maps with nothing the matter


def test_healthy_maps_have_no_problem():
    diagnosis = diagnose(
        HEALTHY,
        other=maps(varied(), varied(), prompt="flute violin organ", columns=("flute", "violin", "organ", *GROUPS)),
    )
    assert diagnosis.problems == ()
    assert {f.name for f in diagnosis.findings} == {"resolution-bound", "localising-sites"}
    assert set(diagnosis.not_checked) == {"coverage-gaps", "check-column", "unconditional-branch"}
    assert "info: localising-sites" in str(diagnosis) and "not checked: check-column" in str(diagnosis)


def test_every_name_is_a_finding_or_an_error():
    diagnosis = diagnose(HEALTHY)
    assert diagnosis["localising-sites"].severity == "info"
    with pytest.raises(KeyError, match="checked, and not the case"):
        diagnosis["flat-in-time"]
    with pytest.raises(KeyError, match="not checked: needs a second capture"):
        diagnosis["prompt-insensitive"]
    with pytest.raises(KeyError, match="no finding is called 'flat'"):
        diagnosis["flat"]


def test_the_numbers_are_those_of_scipy():
    values = varied()
    row = diagnose(maps(values)).sites[0]
    words = values[:3] / values[:3].sum(0)
    assert row.entropy == pytest.approx(entropy(words, axis=0).mean() / math.log(3), rel=1e-5)
    assert row.special_mass == pytest.approx(values[3].mean(), rel=1e-5)
    assert row.padding_mass == pytest.approx(values[4].mean(), rel=1e-5)
    assert row.word_mass == pytest.approx(values[:3].sum(0).mean(), rel=1e-5)
    assert row.time_variation == pytest.approx(variation(values[:3].mean(2), axis=1).max(), rel=1e-5)
    assert row.frequency_variation == pytest.approx(variation(values[:3].mean(1), axis=1).max(), rel=1e-5)
    assert row.variation == pytest.approx(variation(values[:3].reshape(3, -1), axis=1).max(), rel=1e-5)
    units = values[:3] / values[:3].mean((1, 2), keepdims=True)
    pairs = [(units[a] - units[b]) ** 2 for a, b in ((0, 1), (0, 2), (1, 2))]
    assert row.word_difference == pytest.approx(math.sqrt(np.mean(pairs)), rel=1e-5)
    assert (row.lattice, row.words, row.tag, row.branch) == (LATTICE, 3, "cross", "conditional")


# ---- every finding, both ways. name → (it fires, it does not)

FLAT_TIME = np.repeat(varied(lattice=(1, 8)), 20, axis=1)
FLAT_FREQUENCY = np.repeat(varied(lattice=(20, 1)), 8, axis=2)
EVEN = softmax(np.concatenate([0.02 * RNG.standard_normal((3, *LATTICE)), RNG.standard_normal((2, *LATTICE))]))
# one pattern in time and frequency, in three sizes
ALIKE = np.concatenate(
    [
        np.array([0.5, 0.3, 0.2])[:, None, None] * np.exp(RNG.standard_normal((1, *LATTICE))) / 20,
        np.full((2, *LATTICE), 0.1),
    ]
)
PADDED = varied() * np.array([0.1, 0.1, 0.1, 0.1, 1])[:, None, None]
PADDED /= PADDED.sum(0)
SPECIAL = PADDED[[0, 1, 2, 4, 3]]
ONES = np.concatenate([np.ones((1, *LATTICE)), np.zeros((1, *LATTICE))])
BROKEN = varied()
BROKEN[0, 3, 3] = np.nan
FINE = varied(lattice=(128, 64))
OTHER = {"prompt": "flute violin organ", "columns": ("flute", "violin", "organ", *GROUPS)}
FIRST = varied()


def unconditional(values):
    array = site(np.asarray(values), branch="conditional+unconditional")
    usual = site(varied())
    return AttentionMaps(
        {"layer.0": xr.concat([usual, array], dim="branch").assign_coords(branch=["conditional", "unconditional"])}
    )


DELTA = np.zeros((5, *LATTICE))
DELTA[0] = 1

CASES = {
    "no-cross-attention": (
        lambda: diagnose(maps(varied(), tag="self")),
        lambda: diagnose(HEALTHY),
    ),
    "joint-attention": (
        lambda: diagnose(maps(varied(4), tag="joint", columns=(*WORDS, "(audio)"))),
        lambda: diagnose(HEALTHY),
    ),
    "no-frequency-axis": (
        lambda: diagnose(maps(varied(lattice=(40,)))),
        lambda: diagnose(HEALTHY),
    ),
    "degenerate-pooling": (
        lambda: diagnose(maps(ONES, columns=("a bass", "(special)"))),
        lambda: diagnose(HEALTHY),
    ),
    "uniform-over-words": (lambda: diagnose(maps(EVEN)), lambda: diagnose(HEALTHY)),
    "words-alike": (lambda: diagnose(maps(ALIKE)), lambda: diagnose(HEALTHY)),
    "flat-in-time": (lambda: diagnose(maps(FLAT_TIME)), lambda: diagnose(maps(FLAT_FREQUENCY))),
    "flat-in-frequency": (lambda: diagnose(maps(FLAT_FREQUENCY)), lambda: diagnose(maps(FLAT_TIME))),
    "padding-sink": (lambda: diagnose(maps(PADDED)), lambda: diagnose(maps(SPECIAL))),
    "special-token-sink": (lambda: diagnose(maps(SPECIAL)), lambda: diagnose(maps(PADDED))),
    "prompt-insensitive": (
        lambda: diagnose(maps(FIRST), other=maps(FIRST * (1 + 0.01 * RNG.standard_normal(FIRST.shape)), **OTHER)),
        lambda: diagnose(maps(FIRST), other=maps(varied(), **OTHER)),
    ),
    "unconditional-branch": (
        lambda: diagnose(unconditional(DELTA)),
        lambda: diagnose(captured([seen()])),
    ),
    "resolution-bound": (lambda: diagnose(HEALTHY), lambda: diagnose(maps(FINE))),
    "coverage-gaps": (
        lambda: diagnose(captured([seen()], uncovered=[SimpleNamespace(name="layer.7")])),
        lambda: diagnose(captured([seen()])),
    ),
    "non-finite": (lambda: diagnose(maps(BROKEN)), lambda: diagnose(HEALTHY)),
    "check-column": (
        lambda: diagnose(captured([seen(check=0.02)])),
        lambda: diagnose(captured([seen(check=1e-4)])),
    ),
    "localising-sites": (
        lambda: diagnose(HEALTHY),
        lambda: diagnose(maps(varied(scale=0.01))),
    ),
}
#: findings whose absence is that they were not looked for
NOT_LOOKED_FOR = {"unconditional-branch"}


def test_every_finding_has_a_case():
    assert set(CASES) == set(FINDINGS)


@pytest.mark.parametrize("name", FINDINGS)
def test_it_fires(name):
    diagnosis = CASES[name][0]()
    assert name in diagnosis
    finding = diagnosis[name]
    assert finding.severity in SEVERITIES
    assert finding.numbers and finding.sites and finding.sentence.strip()
    assert all(isinstance(number, (int, float)) for number in finding.numbers.values())
    assert name not in diagnosis.not_checked


@pytest.mark.parametrize("name", FINDINGS)
def test_it_does_not_fire(name):
    diagnosis = CASES[name][1]()
    assert name not in diagnosis
    assert (name in diagnosis.not_checked) == (name in NOT_LOOKED_FOR)


# ---- where thresholds lie


@pytest.mark.parametrize("name", ["flat-in-time", "flat-in-frequency", "localising-sites"])
def test_variation_is_compared_with_its_threshold(name):
    axis = 1 if name != "flat-in-frequency" else 2
    limit = diagnostics.LOCALISING_VARIATION if name == "localising-sites" else diagnostics.FLAT_VARIATION
    for factor, below in ((0.9, True), (1.1, False)):
        # two words with opposite patterns ±d: each varies by d, and they differ by 2 d
        size = factor * limit
        wave = np.where(np.arange(LATTICE[axis - 1]) % 2, size, -size)
        wave = wave[:, None] if axis == 1 else wave[None, :]
        values = np.stack([(1 + wave) * np.full(LATTICE, 0.2), (1 - wave) * np.full(LATTICE, 0.2)])
        diagnosis = diagnose(maps(values, columns=("bass", "drums")))
        assert (name in diagnosis) == (below if name != "localising-sites" else not below)


@pytest.mark.parametrize(("fraction", "fires"), [(0.07, True), (0.1, False)])
def test_uniform_is_a_difference_of_a_few_percent(fraction, fires):
    """Entropy is 1 − c² / (2 ln W) for shares that differ by c: 0.995 for two words is c = 0.083."""
    values = np.stack(
        [np.full(LATTICE, 0.4 * (1 + fraction)), np.full(LATTICE, 0.4 * (1 - fraction)), np.full(LATTICE, 0.2)]
    )
    assert ("uniform-over-words" in diagnose(maps(values, columns=("bass", "drums", "(special)")))) == fires


def test_the_thresholds_on_the_page_are_those_in_force():
    page = (Path(__file__).resolve().parents[1] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"`([A-Z_]+)` ([\d.e-]+\d)", page))
    assert len(shown) == 9
    assert {name: float(value) for name, value in shown.items()} == {name: getattr(diagnostics, name) for name in shown}
    assert set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", page.split("## The findings")[1])) == set(FINDINGS)


def test_the_severity_is_lowered_where_few_sites_have_it():
    most, few = diagnose(maps(FLAT_TIME, FLAT_TIME, varied())), diagnose(maps(FLAT_TIME, varied(), varied()))
    assert most["flat-in-time"].severity == "problem"
    assert few["flat-in-time"].severity == "info"
    assert few["flat-in-time"].sites == ("layer.0",)
    assert few["flat-in-time"].numbers["sites_checked"] == 3


def test_a_mass_of_half_is_the_limit_of_a_sink():
    for share, fires in ((0.45, False), (0.55, True)):
        values = np.concatenate([varied(3) * (1 - share), np.full((1, *LATTICE), share)])
        assert ("padding-sink" in diagnose(maps(values, columns=(*WORDS, "(padding)")))) == fires


def test_problems_come_first():
    levels = [SEVERITIES.index(f.severity) for f in diagnose(maps(np.repeat(PADDED[:, :1], 20, axis=1))).findings]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] > 0


# ---- each finding's own matters


def test_what_was_found_instead_of_cross_attention_is_said():
    finding = diagnose(captured([seen("a", "self"), seen("b", "self"), seen("c", "unknown")], AttentionMaps({})))[
        "no-cross-attention"
    ]
    assert "2 self, 1 unknown" in finding.sentence
    assert finding.numbers == {"cross": 0, "self sites": 2, "unknown sites": 1}


def test_a_latent_without_a_frequency_axis_says_what_it_has_in_time():
    diagnosis = diagnose(maps(varied(lattice=(40,))))
    assert "40 columns of 0.1 s" in diagnosis["no-frequency-axis"].sentence
    assert diagnosis.not_checked["flat-in-frequency"] == "the maps have no frequency axis"
    assert diagnosis.sites[0].lattice == (40,) and math.isnan(diagnosis.sites[0].frequency_variation)


def test_mean_over_all_keys_is_degenerate_and_mean_over_some_is_not():
    columns = ("a bass", "(special)")
    mean = np.concatenate([np.full((1, *LATTICE), 1 / 7), np.zeros((1, *LATTICE))])
    assert "degenerate-pooling" in diagnose(maps(mean, columns=columns, pooling="mean"))
    some = np.concatenate([np.full((1, *LATTICE), 1 / 7), np.full((1, *LATTICE), 0.4)])
    assert "degenerate-pooling" not in diagnose(maps(some, columns=columns, pooling="mean"))


def test_words_that_are_all_the_keys_are_only_worth_knowing():
    finding = diagnose(maps(varied(3), columns=WORDS))["degenerate-pooling"]
    assert (finding.severity, "their sum is 1" in finding.sentence) == ("info", True)


@pytest.mark.parametrize(
    ("values", "said"),
    [(DELTA, "all on one token"), (np.full((5, *LATTICE), 0.2), "the same at every query")],
)
def test_a_constant_unconditional_branch_is_described(values, said):
    finding = diagnose(unconditional(values))["unconditional-branch"]
    assert finding.severity == "warning" and said in finding.sentence
    assert finding.numbers["spread"] == 0


def test_equal_keys_are_recognised_where_their_number_is_known():
    finding = diagnose(captured([seen()], unconditional(np.full((5, *LATTICE), 0.2))))["unconditional-branch"]
    assert "1/10 on every key" in finding.sentence


def test_an_unconditional_branch_that_varies_is_only_worth_knowing():
    finding = diagnose(unconditional(varied()))["unconditional-branch"]
    assert finding.severity == "info" and "negative prompt" in finding.sentence


def test_the_unconditional_branch_does_not_enter_the_other_numbers():
    with_it = diagnose(unconditional(DELTA))
    assert not {"flat-in-time", "degenerate-pooling", "uniform-over-words"} & {f.name for f in with_it.findings}
    only = diagnose(maps(DELTA, branch="unconditional"))
    assert "unconditional-branch" in only and only.not_checked["flat-in-time"].startswith("no word maps")


def test_what_a_perfect_map_of_this_resolution_could_score():
    from sklearn.metrics import average_precision_score

    from aiba_eval.references import oracle_projection

    stripes = np.zeros((128, 64), bool)
    stripes[:, ::4] = True
    half = np.zeros((128, 64), bool)
    half[:, :32] = True
    finding = diagnose(HEALTHY, masks={"bass": stripes, "drums": half, "piano": np.zeros((128, 64), bool)})[
        "resolution-bound"
    ]
    expected = average_precision_score(stripes.ravel(), oracle_projection(stripes, LATTICE).ravel())
    assert finding.numbers["oracle bass"] == pytest.approx(expected)
    assert finding.numbers["oracle drums"] == 1
    assert "oracle piano" not in finding.numbers
    assert (finding.severity, finding.threshold) == ("warning", diagnostics.RESOLUTION_AP)
    assert finding.numbers["grid_cells_per_lattice_cell"] == pytest.approx(8192 / 160)
    assert diagnose(HEALTHY, masks={"drums": half})["resolution-bound"].severity == "info"


@pytest.mark.parametrize("lattice", [(128, 8), (20, 64)])
def test_one_coarse_axis_bounds_the_resolution(lattice):
    assert "resolution-bound" in diagnose(maps(varied(lattice=lattice)))


def test_projected_maps_are_scored_beside_the_oracle():
    from aiba_eval import project

    projected = project(HEALTHY)
    mask = np.zeros((128, 64), bool)
    mask[:, :32] = True
    numbers = diagnose(HEALTHY, projected=projected, masks={"bass": mask})["resolution-bound"].numbers
    assert 0 < numbers["map bass"] < numbers["oracle bass"]


def test_heads_that_localise_are_named():
    flat = np.repeat(np.repeat(varied(lattice=(1, 1)), 20, axis=1), 8, axis=2)
    array = xr.concat([site(flat), site(varied()), site(flat)], dim="head")
    finding = diagnose({"layer.0": array})["localising-sites"]
    assert "layer.0, head 1" in finding.sentence and finding.numbers["count"] == 1


def test_a_changed_word_is_compared_with_the_word_in_its_place():
    words = ("bass", "drums", "piano", *GROUPS)
    swapped = FIRST[[1, 0, 2, 3, 4]]
    # the maps follow the words, in whatever order the prompt has them
    follows = diagnose(
        maps(FIRST), other=maps(swapped, prompt="drums bass piano", columns=("drums", "bass", *words[2:]))
    )
    assert "prompt-insensitive" not in follows
    stays = diagnose(maps(FIRST), other=maps(FIRST, prompt="drums bass piano", columns=("drums", "bass", *words[2:])))
    assert "in the same place" in stays["prompt-insensitive"].sentence
    # only words that changed are compared: the others have every right to stay, or to move
    changed = varied()
    changed[1] = FIRST[1]
    partly = maps(changed, prompt="bass flute piano", columns=("bass", "flute", *words[2:]))
    assert "prompt-insensitive" in diagnose(maps(FIRST), other=partly)
    # the same words in another sentence
    again = diagnose(maps(FIRST), other=maps(FIRST, prompt="soft bass drums piano"))
    assert "for the same words in" in again["prompt-insensitive"].sentence


def test_flat_maps_do_not_depend_on_the_prompt_either():
    flat = np.repeat(np.repeat(varied(lattice=(1, 1)), 20, axis=1), 8, axis=2)
    assert "prompt-insensitive" in diagnose(maps(flat), other=maps(flat, **OTHER))
    # what differs within the rounding of flat maps is no difference
    one, two = (softmax(0.004 * RNG.standard_normal((5, *LATTICE))) for _ in range(2))
    assert "prompt-insensitive" in diagnose(maps(one), other=maps(two, **OTHER))


def test_logmean_maps_are_read_as_probabilities():
    values = varied(4)
    logs = np.concatenate([np.log(values[:3]), values[3:]])
    log, plain = (
        diagnose(maps(v, columns=(*WORDS, "(special)"), pooling=p)).sites[0]
        for v, p in ((logs, "logmean"), (values, "sum"))
    )
    assert log.entropy == pytest.approx(plain.entropy, rel=1e-4)
    assert log.time_variation == pytest.approx(plain.time_variation, rel=1e-4)
    assert log.special_mass == pytest.approx(plain.special_mass, rel=1e-4) and math.isnan(log.word_mass)


def test_signed_maps_have_a_variation_but_no_shares():
    signed = varied() - varied()
    diagnosis = diagnose(maps(signed, signs=[1.0, -1.0]))
    row = diagnosis.sites[0]
    assert math.isnan(row.entropy) and math.isnan(row.padding_mass) and row.variation > 0
    assert {"uniform-over-words", "padding-sink"} <= set(diagnosis.not_checked)


def test_words_that_a_prompt_lacks_are_no_broken_cells():
    values = varied()
    values[1] = np.nan
    diagnosis = diagnose(maps(values))
    assert "non-finite" not in diagnosis and diagnosis.sites[0].words == 2
    values[:] = np.nan
    assert diagnose(maps(values))["non-finite"].numbers["cells"] == values.size * 2


def test_several_prompts_are_told_apart():
    two = xr.concat([site(PADDED, prompt="a"), site(varied(), prompt="b")], dim="prompt")
    diagnosis = diagnose({"layer.0": two})
    assert diagnosis["padding-sink"].numbers["mass"] == pytest.approx(PADDED[4].mean(), rel=1e-5)


def test_rows_that_were_not_finite_are_counted_by_the_capture():
    finding = diagnose(captured([seen(nonfinite=3), seen("layer.1", nonfinite=4)]))["non-finite"]
    assert finding.numbers["rows"] == 7 and finding.sites == ("layer.0", "layer.1")


# ---- captures of real pipelines


def test_the_random_pipeline(pipe, tmp_path):
    prompts = "a bass and drums", "a piano and flute"
    captures = []
    for prompt in prompts:
        with capture(pipe, kinds=("cross",), branch="both") as cap:
            generate(pipe, prompt)
        captures.append(cap)
    diagnosis = diagnose(captures[0], other=captures[1])
    # the empty negative prompt has one token: a delta at every site
    finding = diagnosis["unconditional-branch"]
    assert "all on one token" in finding.sentence and finding.numbers["sites"] == 16
    assert diagnosis.not_checked == {}
    assert not {"coverage-gaps", "check-column", "non-finite", "no-cross-attention", "joint-attention"} & {
        f.name for f in diagnosis.findings
    }
    assert len(diagnosis.sites) == 32 and all(0 <= s.check < 2e-4 for s in diagnosis.sites)
    shares = [s for s in diagnosis.sites if s.branch == "conditional"]
    assert all(s.word_mass + s.padding_mass + s.special_mass == pytest.approx(1, abs=1e-3) for s in shares)

    captures[0].maps.save(tmp_path / "maps.zarr")
    loaded = diagnose(AttentionMaps.load(tmp_path / "maps.zarr"))
    assert set(loaded.not_checked) == {"coverage-gaps", "check-column", "prompt-insensitive"}
    for ours, theirs in zip(diagnosis.sites, loaded.sites, strict=True):
        assert ours.entropy == pytest.approx(theirs.entropy, nan_ok=True)
        assert math.isnan(theirs.check)
    for finding in loaded.findings:
        if finding.name != "unconditional-branch":  # without the sites the number of keys is not known
            assert finding == diagnosis[finding.name]

    with pytest.raises(ValueError, match="the same prompt, 'a bass and drums'"):
        diagnose(captures[0], other=captures[0])


def test_full_maps_know_the_roles_of_their_tokens(pipe):
    with capture(pipe, keep="full", layers="mid_block*", kinds=("cross",)) as cap:
        generate(pipe, "a bass and drums", steps=1)
    diagnosis = diagnose({name: array for name, array in cap.maps.items() if "role" in array.coords})
    # the words of the GPT-2 stream are not known; those of the T5 stream are single tokens here
    by_stream = {site.stream: site for site in diagnosis.sites}
    assert by_stream["gpt2"].words == 0 and math.isnan(by_stream["gpt2"].entropy)
    row = by_stream["t5"]
    assert row.words >= 4 and row.word_mass + row.special_mass + row.padding_mass == pytest.approx(1, abs=1e-4)


def test_self_attention_has_rows_in_the_table_and_no_findings_of_words(pipe):
    with capture(pipe, kinds=("self",), layers="mid_block*attn1") as cap:
        generate(pipe, "a bass", steps=1)
    diagnosis = diagnose(cap.maps)
    assert diagnosis.sites and {row.tag for row in diagnosis.sites} == {"self"}
    assert "no-cross-attention" in diagnosis and diagnosis.not_checked["uniform-over-words"] == "no word maps"
    assert "no-cross-attention" not in diagnose(cap)  # the model has it; these maps do not


def test_a_uniform_softmax_is_found_whatever_words_are_spelt_with(pipe):
    """A word of five tokens has five times the share of a word of one; per token they are alike."""
    prompt = "a bass and xylophones"
    with capture(pipe, layers="mid_block*") as cap:
        weights = [m.to_q.weight for m in pipe.unet.mid_block.modules() if hasattr(m, "to_q")]
        before = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight in weights:
                    weight.zero_()
            generate(pipe, prompt, steps=1)
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
    finding = diagnose(cap)["uniform-over-words"]
    assert finding.numbers["entropy"] == pytest.approx(1, abs=1e-6)
    assert "uniform-over-words" not in diagnose(cap.maps)  # which do not know how many tokens a word has


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")
def test_stable_audio_has_the_causes_that_are_known_of_it():
    """Padding that nothing masks, an unconditional half of zeros, a latent without frequencies: read in its source."""
    from tests import tiny

    with capture(tiny.stable_audio(length=24), branch="both") as cap:
        tiny.generate(cap.target, "a bass and drums", audio_end_in_s=0.5)
    diagnosis = diagnose(cap)
    keys = 24 + 2
    finding = diagnosis["unconditional-branch"]
    assert f"1/{keys} on every key" in finding.sentence and finding.numbers["sites"] == 2
    assert diagnosis["padding-sink"].numbers["mass"] > 0.5 and len(diagnosis["padding-sink"].sites) == 2
    axis = diagnosis["no-frequency-axis"]
    assert axis.numbers["seconds_per_column"] == pytest.approx(64 / 4000) and axis.severity == "warning"
    assert "no-cross-attention" not in diagnosis


class SelfOnly(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_model_without_cross_attention_is_diagnosed_from_its_sites():
    cap = capture(SelfOnly(), keep="full")
    with pytest.raises(NothingCaptured), cap:
        cap.target(torch.randn(1, 2, 8, 4))
    diagnosis = diagnose(cap)
    assert "1 unknown" in diagnosis["no-cross-attention"].sentence
    assert diagnosis.sites == () and diagnosis.not_checked["flat-in-time"]


def test_a_module_without_a_backbone():
    x = torch.randn(1, 2, 8, 4)
    with capture(SelfOnly(), keep="full", kinds=("unknown",)) as cap:
        cap.target(x)
    diagnosis = diagnose(cap)
    assert diagnosis.sites[0].lattice == () and 0 < diagnosis.sites[0].entropy < 1
    assert diagnosis.not_checked["padding-sink"] == "the roles of the tokens are not known here"
    assert "resolution-bound" in diagnosis.not_checked


def test_a_capture_that_is_not_finished_is_refused(pipe):
    with capture(pipe, words=["bass"]) as cap:
        with pytest.raises(RuntimeError, match="has not ended"):
            diagnose(cap)
        generate(pipe, "a bass", steps=1)


def test_a_failed_check_column_is_a_problem():
    class Failed:
        sites = [seen(check=0.5)]
        uncovered: list = []

        @property
        def maps(self):
            raise RuntimeError("this capture ended with an error")

    finding = diagnose(Failed())["check-column"]
    assert finding.severity == "problem" and finding.numbers["error"] == 0.5


# ---- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnose(3), TypeError, "need a capture or maps"),
        (lambda: diagnose({"a": xr.DataArray(np.ones(3))}), ValueError, "has dims"),
        (lambda: diagnose(HEALTHY, projected=xr.DataArray(np.ones(3))), ValueError, "must have dims"),
        (lambda: diagnose(HEALTHY, masks={"a": np.ones(3, bool)}), ValueError, "share one .time, mel. shape"),
        (
            lambda: diagnose(HEALTHY, masks={"a": np.ones((3, 4), bool), "b": np.ones((4, 4), bool)}),
            ValueError,
            "share one",
        ),
        (lambda: diagnose(HEALTHY, other=HEALTHY), ValueError, "same prompt"),
        (lambda: diagnose(HEALTHY, other=AttentionMaps({})), ValueError, "no site with word maps in common"),
        (lambda: diagnose(maps(varied(), seed=0), other=maps(varied(), seed=1, **OTHER)), ValueError, "has seed 1"),
        (lambda: diagnose(maps(varied()), other=maps(varied(lattice=(9, 8)), **OTHER)), ValueError, "lattice"),
        (
            lambda: diagnose(
                maps(varied()), other={"layer.0": xr.concat([site(varied(), prompt=p) for p in "xy"], "prompt")}
            ),
            ValueError,
            "1 prompts here and 2",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- the command


def test_the_command_prints_one_document(shared_pipe):
    stdout, stderr = aiba(
        "diagnose", "demo:random", "--prompt", "a bass and drums", "--other", "a piano and flute", "--steps", 1, "--duration", 0.64, "--json"
    )  # fmt: skip
    document = json.loads(stdout)
    assert set(document) == {"findings", "not_checked", "sites"}
    assert {f["name"] for f in document["findings"]} <= set(FINDINGS)
    assert set(document["findings"][0]) == {f.name for f in dataclasses.fields(diagnostics.Finding)}
    assert document["not_checked"] == {} and len(document["sites"]) == 32
    resolution = next(f for f in document["findings"] if f["name"] == "resolution-bound")
    assert "oracle bass" in resolution["numbers"] and "map bass" in resolution["numbers"]
    assert "NaN" not in stdout and "generating 'a piano and flute'" in stderr


def test_the_command_prints_a_report():
    stdout, _ = aiba(
        "diagnose",
        "demo:random",
        "--prompt",
        "a bass",
        "--steps",
        1,
        "--duration",
        0.64,
        "--heads",
        "all",
        "--layers",
        "mid*",
    )
    assert "Sites with maps" in stdout and "unconditional-branch" in stdout
    assert "not checked: prompt-insensitive" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model", "--prompt", "a bass"], "is no registered model"),
        (["demo:random", "--prompt", "..."], "has no words"),
        (["demo:random", "--prompt", "a bass", "--other", "a  bass"], "the other prompt is the prompt itself"),
        (["demo:random", "--prompt", "a bass", "--word", "flute"], "'flute' is not in the prompt"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    stdout, stderr = aiba("diagnose", *arguments, "--json", code=2)
    assert message in json.loads(stdout)["error"] and message in stderr


def test_without_guidance_there_is_no_unconditional_branch(pipe):
    diagnosis = diagnose_model(pipe, "a bass", steps=1, guidance=1.0, duration=0.64, layers="mid*")
    assert "unconditional-branch" in diagnosis.not_checked
    with pytest.raises(CannotGenerate, match="no argument for duration"):
        diagnose_model(SimpleNamespace(), "a bass", steps=None, guidance=None)


def test_conditional_maps():
    both = unconditional(DELTA)
    chosen = conditional_maps(both)["layer.0"]
    assert "branch" not in chosen.dims
    np.testing.assert_array_equal(chosen.values, both["layer.0"].values[0])
    assert conditional_maps(HEALTHY)["layer.0"] is HEALTHY["layer.0"]


# ---- the paper's recipe


def test_the_mean_over_all_keys_is_constant_and_its_logarithm_is_not():
    rows = softmax(np.random.default_rng(1).standard_normal((130, 4, 1025))).transpose(1, 2, 0)
    made = paper_recipe(rows)
    assert made.taken and made.side == 32 and made.dropped == 1
    np.testing.assert_allclose(made.mean, 1 / 130, rtol=1e-12)
    expected = np.log(rows.mean(0)).mean(1)[:1024].reshape(32, 32)
    np.testing.assert_allclose(made.log_mean, expected)
    assert made.log_mean.std() > 1e-3


def test_the_length_rule_looks_at_lengths_only():
    assert not paper_recipe(np.full((50, 77), 1 / 77)).taken  # cross-attention at a coarse level
    assert paper_recipe(np.full((50, 77), 1 / 77), cross_ratio=2).taken
    assert paper_recipe(np.full((50, 8), 1 / 8)).taken


@pytest.mark.parametrize(
    ("rows", "ratio", "message"),
    [
        (np.ones((3, 4)), 0.5, "sum to 1"),
        (np.full((3, 4), np.nan), 0.5, "sum to 1"),
        (np.ones(3), 0.5, "got shape"),
        (np.ones((0, 3)), 0.5, "got shape"),
        (np.full((3, 4), 0.25), 0, "cross_ratio must be positive"),
    ],
)
def test_the_recipe_refuses_what_is_no_softmax(rows, ratio, message):
    with pytest.raises(ValueError, match=message):
        paper_recipe(rows, cross_ratio=ratio)


def test_the_example_separates_the_causes(capsys):
    path = Path(__file__).resolve().parents[1] / "examples" / "flat_maps.py"
    spec = importlib.util.spec_from_file_location("flat_maps", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["flat_maps"] = script
    try:
        spec.loader.exec_module(script)
        rows = script.main([])
    finally:
        del sys.modules["flat_maps"]
    printed = capsys.readouterr().out
    assert all(row.name in printed and row.number in printed for row in rows)
    by = {(row.name, row.number.split(" (")[0]): row for row in rows}
    assert by["mean over all keys", "variation over queries"].with_it < 1e-6
    assert by["mean over all keys", "variation over queries"].without > 0.01
    assert by["mean over all keys, log", "deviation over queries"].with_it > 1e-6
    assert by["unconditional half", "variation of that half"].with_it < 1e-6
    half = by["both halves averaged", "variation of a word's map"]
    assert half.with_it == pytest.approx(half.without / 2, rel=0.2)
    padding = by["padding not masked", "share of the attention on padding"]
    assert padding.with_it == pytest.approx(124 / 130, abs=0.05)
    logs = by["padding not masked", "deviation of the log-mean over queries"]
    assert 10 * logs.with_it < logs.without  # padding flattens the logarithm's mean too
    assert by["square reshape", "seconds from one row to the next"].with_it == pytest.approx(32 * 2048 / 44100)
    assert by["whole window generated", "share of the columns that are cropped away"].with_it == pytest.approx(
        1 - 173 / 1024
    )
    assert by["global token kept", "by how many columns the map is shifted"].with_it == 1
