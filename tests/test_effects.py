"""Effect maps: closed cases on a denoiser whose answer is known, and the real pipelines, tiny."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray
from torch import nn

from aiba_eval import MelGrid, effect_map, project, score
from aiba_eval.effects import (
    agreement,
    clean_latent,
    decode_audioldm2,
    edit_maps,
    edit_quantities,
    effect_mass,
    listed,
    presence,
    without_word,
)
from aiba_eval.probe import CannotProbe, add_noise, encode_audioldm2, probe
from aiba_hooks import (
    Backbone,
    Conditioning,
    Lattice,
    NothingCaptured,
    TokenStream,
    UnknownBackbone,
    UnknownWord,
    intervene,
)
from tests.conftest import state

RATE = 16000
COLUMNS, BANDS, TOKENS = 10, 16, 8
WORDS = ("a", "and", "bass", "drums", "piano", "flute")
#: what each word adds to the clean latent, (time, band); "a" and "and" add nothing
PATTERNS = torch.zeros(len(WORDS), COLUMNS, BANDS)
PATTERNS[2, :, :3] = 1.5
PATTERNS[3, ::2, :] = 0.5
PATTERNS[4, 2:6, 5:9] = 2.0
PATTERNS[5, 7:, 12:] = 0.25


class Adder(nn.Module):
    """A denoiser whose clean latent is ``base + sum of the patterns of the words``, by one cross-attention.

    Attention is uniform over a fixed number of keys, values are one-hot words (zero for padding), and each query's output is
    multiplied by the patterns: exactly linear in the values.
    """

    def __init__(self, kind, alphas):
        super().__init__()
        self.to_k = nn.Linear(len(WORDS), len(WORDS), bias=False)
        self.kind, self.alphas, self.calls = kind, alphas, []
        self.blind = False

    def forward(self, sample, timestep, encoder_hidden_states):
        rows = len(sample)
        self.calls.append((rows, int(timestep), sample.clone()))
        query = torch.zeros(rows, 1, COLUMNS * BANDS, len(WORDS))
        text = encoder_hidden_states * (0 if self.blind else TOKENS)
        mixed = F.scaled_dot_product_attention(query, 0 * self.to_k(text)[:, None], text[:, None])[:, 0]
        clean = (mixed * PATTERNS.flatten(1).T).sum(-1).unflatten(1, (1, COLUMNS, BANDS)) - 3
        alpha = self.alphas[int(timestep)]
        noise = (sample - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        if self.kind == "epsilon":
            return noise
        if self.kind == "v_prediction":
            return alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
        return clean


class Synthetic:
    """Its latent is a log-mel of 16 bands at 100 columns a second."""

    _execution_device = torch.device("cpu")

    def __init__(self, kind="epsilon"):
        alphas = torch.linspace(0.999, 0.05, 1000, dtype=torch.float64)
        self.scheduler = SimpleNamespace(alphas_cumprod=alphas, config=SimpleNamespace(prediction_type=kind))
        self.unet = Adder(kind, alphas).eval()

    def encode_prompt(self, prompt, device, num_waveforms_per_prompt=1, do_classifier_free_guidance=False):
        rows = torch.zeros(1, TOKENS, len(WORDS))
        for position, word in enumerate(prompt.replace(",", "").split()):
            rows[0, position, WORDS.index(word)] = 1
        return rows.repeat(num_waveforms_per_prompt, 1, 1)


class SyntheticBackbone(Backbone):
    name = "synthetic"

    def matches(self, target):
        return isinstance(target, Synthetic)

    def conditioning(self, target, arguments, result):
        prompt = arguments["prompt"]
        words = prompt.replace(",", "").split()
        roles = ("word",) * len(words) + ("padding",) * (TOKENS - len(words))
        stream = TokenStream(
            "text",
            (prompt,),
            ((*words, *("",) * (TOKENS - len(words))),),
            (roles,),
            ((*range(len(words)), *(None,) * (TOKENS - len(words))),),
            argument="encoder_hidden_states",
        )
        return Conditioning((prompt,), int(arguments["num_waveforms_per_prompt"]), False, (stream,))

    def lattice(self, site):
        edges = np.linspace(0, 8000, BANDS + 1)
        return Lattice((COLUMNS, BANDS), ("time", "frequency"), seconds_per_column=0.01, frequency_edges=edges)

    def predict(self, target, latents, timestep, conditioning):
        return target.unet(latents, timestep, encoder_hidden_states=conditioning)

    def decode_mel(self, target, latents):
        return latents[:, 0]

    def mel_grid(self, target):
        return MelGrid(mel=BANDS)


GRID = MelGrid(COLUMNS, BANDS)
LATENT = torch.randn(1, 1, COLUMNS, BANDS, generator=torch.Generator().manual_seed(9))


def synthetic(prompt="a bass and drums", pipe=None, **options):
    options = {"latents": LATENT, "grid": GRID, "timesteps": (300,), "draws": 2, **options}
    return effect_map(Synthetic() if pipe is None else pipe, prompt, backbone=SyntheticBackbone(), **options)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1


# ---- closed cases


@pytest.mark.parametrize("remove", ["prompt", "values"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_map_of_a_word_is_the_pattern_that_it_adds(remove, kind):
    maps = synthetic(pipe=Synthetic(kind), remove=remove, timesteps=(5, 300, 999))
    assert maps.dims == ("prompt", "word", "time", "mel")
    assert maps["word"].values.tolist() == ["a", "bass", "and", "drums"]
    for word in maps["word"].values:
        expected = PATTERNS[WORDS.index(word)].numpy()
        np.testing.assert_allclose(maps.sel(word=word)[0], expected, atol=3e-5)


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_the_energy_map_is_the_loss_of_power(remove):
    bass = synthetic("bass drums", remove=remove, quantity="energy", words=["bass"])[0, 0]
    with_it = -3 + PATTERNS[2] + PATTERNS[3]
    expected = torch.exp(2 * with_it) - torch.exp(2 * (with_it - PATTERNS[2]))
    np.testing.assert_allclose(bass, expected, atol=1e-5)
    assert bass.attrs["units"] == "power"


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_the_fit_map_is_the_gain_in_squared_error_against_the_audio(remove):
    bass = synthetic("bass drums", remove=remove, quantity="fit", part="signed", words=["bass"])[0, 0]
    audio, with_it = LATENT[0, 0].double(), (-3 + PATTERNS[2] + PATTERNS[3]).double()
    expected = (with_it - PATTERNS[2] - audio) ** 2 - (with_it - audio) ** 2
    np.testing.assert_allclose(bass, expected, atol=1e-3)
    assert bass.attrs["units"] == "nats²"
    gained = synthetic("bass drums", remove=remove, quantity="fit", words=["bass"])[0, 0]
    np.testing.assert_allclose(gained, expected.clamp_min(0), atol=1e-3)


def test_quantities_of_the_same_predictions_are_those_asked_for_one_by_one():
    pipe, edits = Synthetic(), {"bass": ("bass drums", "drums"), "more": ("bass drums", "bass")}
    options = {"latents": LATENT, "grid": GRID, "timesteps": (5, 300), "draws": 2, "backbone": SyntheticBackbone()}
    asked = [("log", "positive"), ("fit", "signed"), ("energy", "signed")]
    found = edit_quantities(pipe, edits, asked, **options)
    calls = len(pipe.unet.calls)
    for (quantity, part), maps in zip(asked, found, strict=True):
        xarray.testing.assert_identical(maps, edit_maps(pipe, edits, quantity=quantity, part=part, **options))
    assert len(pipe.unet.calls) == 4 * calls  # the three together took as many forwards as each alone


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_a_model_that_ignores_the_text_has_no_effects(remove):
    pipe = Synthetic()
    pipe.unet.blind = True
    assert not synthetic(pipe=pipe, remove=remove, part="signed").any()


def test_what_a_word_takes_away_is_not_in_its_positive_part():
    patterns = PATTERNS[2].clone()
    try:
        PATTERNS[2] = -patterns
        assert synthetic(words=["bass"]).max() < 3e-5
        np.testing.assert_allclose(synthetic(words=["bass"], part="signed")[0, 0], -patterns, atol=3e-5)
    finally:
        PATTERNS[2] = patterns


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_the_same_draws_are_used_with_and_without(remove):
    pipe = Synthetic()
    synthetic(pipe=pipe, remove=remove, words=["bass"], timesteps=(300, 800), draws=2)
    seen = {}
    for _, timestep, sample in pipe.unet.calls:
        seen.setdefault(timestep, []).extend(sample)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(LATENT.shape, generator=generator) for _ in range(2)]
    for timestep, rows in seen.items():
        expected = [add_noise(pipe, LATENT, draw, timestep)[0] for draw in draws]
        assert len(rows) == 4
        for row, wanted in zip(rows, expected * 2, strict=True):
            assert torch.equal(row, wanted)


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_words_and_draws_share_forwards(remove):
    pipe = Synthetic()
    synthetic(pipe=pipe, remove=remove, draws=2, batch=4)
    rows = [n for n, _, _ in pipe.unet.calls]
    assert rows == ([4, 4, 2] if remove == "prompt" else [2] * 5)
    alone = Synthetic()
    one = synthetic(pipe=alone, remove=remove, draws=2, batch=1)
    assert {n for n, _, _ in alone.unet.calls} == {1}
    np.testing.assert_allclose(one, synthetic(remove=remove, draws=2), atol=1e-6)


def test_conditionings_of_unequal_length_do_not_share_a_forward():
    pipe = Synthetic()
    whole = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, **options: whole(prompt, **options)[:, : len(prompt.split())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adder, "forward", lambda self, x, t, encoder_hidden_states: self.calls.append(len(x)) or x)
        maps = synthetic("a bass and drums", pipe=pipe, words=["bass", "bass and"], draws=1, batch=8)
    assert pipe.unet.calls == [1, 1, 1]
    assert not maps.any()


def test_a_conditioning_that_cannot_be_stacked_is_run_row_by_row():
    pipe = Synthetic()
    plain = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, **options: (plain(prompt, **options), prompt)
    own = SyntheticBackbone()
    own.predict = lambda target, latents, timestep, conditioning: target.unet(latents, timestep, conditioning[0])
    maps = effect_map(pipe, "bass drums", latents=LATENT, grid=GRID, draws=3, backbone=own)
    assert {n for n, _, _ in pipe.unet.calls} == {1}
    np.testing.assert_allclose(maps[0, 0], PATTERNS[2], atol=3e-5)


def test_several_prompts_and_latents():
    prompts = ["bass drums", "drums piano"]
    maps = synthetic(prompts, latents=torch.cat([LATENT, -LATENT]))
    assert maps["word"].values.tolist() == ["bass", "drums", "piano"]
    assert np.isnan(maps.sel(word="piano")[0]).all()
    assert np.isnan(maps.sel(word="bass")[1]).all()
    np.testing.assert_allclose(maps.sel(word="piano")[1], PATTERNS[4], atol=3e-5)
    assert maps["without"].values.tolist() == [["drums", "bass", ""], ["", "piano", "drums"]]
    assert np.isnan(effect_mass(maps).values).tolist() == [[False, False, True], [True, False, False]]


def test_levels_can_be_kept_apart():
    maps = synthetic(timesteps=(300, 800), levels="each")
    assert maps.dims == ("prompt", "timestep", "word", "time", "mel")
    assert maps["timestep"].values.tolist() == [300, 800]
    np.testing.assert_allclose(maps.mean("timestep"), synthetic(timesteps=(300, 800)), atol=1e-6)
    assert effect_mass(maps).dims == ("prompt", "timestep", "word")


def test_texts_of_your_own_take_the_place_of_the_cut_prompt():
    texts = {"bass": "and drums", "reordered": "drums and a bass", "nothing": ""}
    maps = synthetic(words=["bass", "reordered", "nothing"], without=texts)
    np.testing.assert_allclose(maps[0, 0], PATTERNS[2], atol=3e-5)
    assert maps[0, 1].max() < 3e-5
    np.testing.assert_allclose(maps[0, 2], PATTERNS[2] + PATTERNS[3], atol=3e-5)
    assert maps["without"].values.tolist() == [["and drums", "drums and a bass", ""]]


def test_phrases_and_occurrences():
    maps = synthetic("bass and bass", words=["bass", "bass#1", "and bass"])
    for row, factor in enumerate((2, 1, 1)):
        np.testing.assert_allclose(maps[0, row], factor * PATTERNS[2], atol=3e-5)
    np.testing.assert_allclose(
        synthetic("bass and bass", words=["bass#1"], remove="values")[0, 0], PATTERNS[2], atol=3e-5
    )


def test_an_edit_is_the_difference_of_two_texts_and_each_text_is_predicted_once():
    pipe = Synthetic()
    edits = {
        "bass": ("bass and drums", "drums"),
        "other way": ("drums", "bass and drums"),
        "swap": ("piano drums", "bass drums"),
    }
    options = {"latents": LATENT, "grid": GRID, "draws": 2, "backbone": SyntheticBackbone()}
    maps = edit_maps(pipe, edits, timesteps=(300, 800), levels="each", part="signed", batch=16, **options)
    assert maps.dims == ("timestep", "word", "time", "mel")
    expected = [PATTERNS[2], -PATTERNS[2], PATTERNS[4] - PATTERNS[2]]
    for level in (300, 800):
        for label, pattern in zip(edits, expected, strict=True):
            np.testing.assert_allclose(maps.sel(timestep=level, word=label), pattern, atol=3e-5)
    assert [n for n, _, _ in pipe.unet.calls] == [4 * 2] * 2  # four texts, two draws, a forward for each level
    assert maps["with"].values.tolist() == [pair[0] for pair in edits.values()]
    assert maps["without"].values.tolist() == [pair[1] for pair in edits.values()]
    mean = edit_maps(pipe, edits, timesteps=(300, 800), **options)
    assert mean.dims == ("word", "time", "mel")
    whole = synthetic("bass and drums", words=["bass"], timesteps=(300, 800), without={"bass": "drums"})
    np.testing.assert_allclose(mean[0], whole[0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="edits is empty"):
        edit_maps(pipe, {}, **options)
    with pytest.raises(ValueError, match="one clean latent, got 2"):
        edit_maps(pipe, edits, **options | {"latents": torch.cat([LATENT, LATENT])})


@pytest.mark.parametrize(
    ("prompt", "word", "left"),
    [
        ("a bass, drums and piano", "drums", "a bass, and piano"),
        ("a bass, drums and piano", "drums and piano", "a bass,"),
        ("Bass. A bass!", "bass", "A!"),
        ("bass and bass", "bass#0", "and bass"),
        ("an acoustic guitar", "acoustic guitar", "an"),
        ("bass", "bass", ""),
    ],
)
def test_a_word_is_cut_out_of_the_prompt(prompt, word, left):
    assert without_word(prompt, word) == left


# ---- the clean latent


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_the_clean_latent_inverts_the_noise(pipe, kind, timestep):
    """With the exact target of each prediction type; for v it is the scheduler's own velocity."""
    pipeline = SimpleNamespace(
        scheduler=SimpleNamespace(
            alphas_cumprod=pipe.scheduler.alphas_cumprod, config=SimpleNamespace(prediction_type=kind)
        )
    )
    clean, drawn = torch.randn(2, 2, 8, 25, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noised = add_noise(pipeline, clean, drawn, timestep)
    velocity = pipe.scheduler.get_velocity(clean, drawn, torch.tensor([timestep] * 2))
    target = {"epsilon": drawn, "v_prediction": velocity, "sample": clean}[kind]
    torch.testing.assert_close(clean_latent(pipeline, noised, target, timestep), clean, atol=1e-6, rtol=1e-6)
    # in float32, x_t's own rounding is what epsilon divides by √ᾱ_t: 1e-6 of it
    signal = float(pipe.scheduler.alphas_cumprod[timestep]) ** 0.5
    single = clean_latent(pipeline, noised.float(), target.float(), timestep)
    assert (single - clean).abs().max() < max(1e-5, 2e-6 / signal)


def test_the_clean_latent_is_the_schedulers(pipe):
    from diffusers import DDIMScheduler

    noised, output = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for kind in ("epsilon", "v_prediction", "sample"):
        config = {**pipe.scheduler.config, "prediction_type": kind}
        scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(1000)
        expected = scheduler.step(output, 300, noised).pred_original_sample
        ours = clean_latent(SimpleNamespace(scheduler=scheduler), noised, output, 300)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_computed_in_float32():
    pipeline = Synthetic("v_prediction")
    half = torch.ones(2, dtype=torch.float16)
    assert clean_latent(pipeline, half, half, 300).dtype == torch.float32


def test_flow_matching_is_refused_by_name():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = Synthetic()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(CannotProbe, match="FlowMatchEulerDiscreteScheduler is for flow matching"):
        synthetic(pipe=pipe)
    with pytest.raises(CannotProbe, match="states prediction_type='score'"):
        synthetic(pipe=Synthetic("score"))
    pipe = Synthetic()
    del pipe.scheduler.alphas_cumprod
    with pytest.raises(CannotProbe, match="SimpleNamespace has no alphas_cumprod"):
        synthetic(pipe=pipe)
    from diffusers import CosineDPMSolverMultistepScheduler

    pipe.scheduler = CosineDPMSolverMultistepScheduler()  # Stable Audio's
    with pytest.raises(CannotProbe, match="CosineDPMSolverMultistepScheduler has no alphas_cumprod"):
        synthetic(pipe=pipe)


def test_an_unknown_backbone_is_refused():
    with pytest.raises(UnknownBackbone, match="no backbone is named 'nonsense'; registered: .*audioldm2"):
        effect_map(Synthetic(), "a bass", latents=LATENT, backbone="nonsense")


def test_pure_noise_holds_no_clean_latent():
    pipe = Synthetic()
    pipe.scheduler.alphas_cumprod[-1] = 0
    with pytest.raises(ValueError, match="timestep 999 is pure noise"):
        clean_latent(pipe, torch.zeros(1), torch.zeros(1), 999)


# ---- the grid


def test_the_map_lands_in_seconds_and_hertz():
    """Piano: columns 2–5 of 10 ms, bands 5–8 of 16, on grids of other extent and resolution."""
    fine = synthetic(words=["piano"], prompt="piano", grid=MelGrid(40, 64))[0, 0]
    peak = fine.where(fine > 1.9, drop=True)
    edges = MelGrid(mel=BANDS).edges
    assert 0.02 <= peak["time"].min() < 0.03
    assert 0.05 < peak["time"].max() <= 0.06
    assert edges[5] <= peak["frequency"].min()
    assert peak["frequency"].max() <= edges[9]
    coarse = synthetic(words=["piano"], prompt="piano", grid=MelGrid(5, 8))[0, 0]
    expected = PATTERNS[4].reshape(5, 2, 8, 2).mean((1, 3))
    np.testing.assert_allclose(coarse, expected, atol=3e-5)
    assert coarse.attrs["finest_lattice"] == [COLUMNS, BANDS]
    assert coarse.attrs["seconds_per_column"] == pytest.approx(0.02)


def test_cells_outside_the_audio_are_missing():
    long = synthetic("bass", grid=MelGrid(20, BANDS, duration=0.2))[0, 0]
    assert np.isfinite(long[:10]).all()
    assert np.isnan(long[10:]).all()
    np.testing.assert_allclose(long[:10], PATTERNS[2], atol=3e-5)
    part = synthetic("drums", grid=MelGrid(4, BANDS, duration=0.04, start=0.03))[0, 0]
    np.testing.assert_allclose(part, PATTERNS[3][3:7], atol=3e-5)


# ---- how much a word does


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_presence_compares_present_absent_and_neutral_words(remove):
    masses = presence(
        Synthetic(),
        ["bass", "drums"],
        absent=["piano", "flute"],
        neutral=["and"],
        latents=LATENT,
        grid=GRID,
        remove=remove,
        draws=1,
        backbone=SyntheticBackbone(),
    )
    assert masses["role"].values.tolist() == ["present", "present", "absent", "absent", "neutral"]
    assert masses["prompt"].values.tolist() == [
        "drums and bass",
        "bass and drums",
        "drums and piano",
        "bass and flute",
        "bass and drums",
    ]
    means = [PATTERNS[WORDS.index(w)].mean() for w in masses["word"].values]
    np.testing.assert_allclose(masses, means, atol=3e-5)
    # bass .28, drums .25 against piano .2, flute .02
    assert masses.attrs["auroc"] == 1.0


def test_presence_by_fit_asks_whether_the_audio_agrees():
    """The audio has drums and a flute; this model adds a pattern for every word, whatever it is given."""
    audio = (PATTERNS[3] + PATTERNS[5] - 3)[None, None]
    options = {"latents": audio, "grid": GRID, "draws": 1, "backbone": SyntheticBackbone()}
    by_mass = presence(Synthetic(), ["drums", "flute"], absent=["piano", "bass"], **options)
    by_fit = presence(
        Synthetic(), ["drums", "flute"], absent=["piano", "bass"], quantity="fit", part="signed", **options
    )
    assert (by_mass.attrs["auroc"], by_fit.attrs["auroc"]) == (0.5, 1.0)
    assert (by_fit.values > 0).tolist() == [True, True, False, False]


def test_presence_over_levels_and_what_it_refuses():
    options = {"latents": LATENT, "grid": GRID, "draws": 1, "backbone": SyntheticBackbone()}
    both = presence(Synthetic(), ["flute"], absent=["bass", "a"], timesteps=(5, 300), levels="each", **options)
    assert both.dims == ("timestep", "word")
    assert both.attrs["auroc"] == [0.5, 0.5]
    alone = presence(Synthetic(), ["flute"], **options)
    assert np.isnan(alone.attrs["auroc"])
    with pytest.raises(ValueError, match=r"absent words \['bass'\] are in the prompt"):
        presence(Synthetic(), ["bass"], absent=["bass"], **options)
    with pytest.raises(ValueError, match="named twice"):
        presence(Synthetic(), ["bass", "bass"], **options)
    with pytest.raises(ValueError, match="present is empty"):
        presence(Synthetic(), [], **options)


def test_words_are_listed():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


# ---- agreement


def on_grid(values, words):
    array = synthetic("bass", words=["bass"])
    return xarray.DataArray(
        np.asarray(values, np.float32)[None],
        dims=array.dims,
        coords={"prompt": ["p"], "word": words, **{c: array[c] for c in ("time", "frequency")}},
        attrs=array.attrs,
    )


def test_agreement_is_spearman_beside_the_other_words():
    rng = np.random.default_rng(0)
    effect = rng.random((3, COLUMNS, BANDS))
    attention = np.exp(effect[[1, 0, 2]])
    attention[2] = rng.random((COLUMNS, BANDS))
    found = agreement(
        on_grid(attention, ["drums", "bass", "(padding)"]), on_grid(effect, ["bass", "drums", "piano"])
    ).isel(prompt=0)
    assert found["word"].values.tolist() == ["bass", "drums"]
    np.testing.assert_allclose(found["spearman"], 1)
    from scipy.stats import spearmanr

    crossed = spearmanr(effect[0].ravel(), effect[1].ravel()).statistic
    np.testing.assert_allclose(found["null"], crossed)
    np.testing.assert_allclose(found["difference"], 1 - crossed)


def test_agreement_of_constant_maps_and_of_one_word_is_not_a_number():
    ramp = np.arange(COLUMNS * BANDS).reshape(1, COLUMNS, BANDS)
    one = agreement(on_grid(ramp, ["bass"]), on_grid(-ramp, ["bass"]))
    assert one["spearman"].item() == pytest.approx(-1)
    assert np.isnan(one["null"]).all()
    assert np.isnan(agreement(on_grid(0 * ramp, ["bass"]), on_grid(ramp, ["bass"]))["spearman"]).all()


def test_agreement_refuses_maps_of_another_grid():
    effect = synthetic(words=["bass"])
    with pytest.raises(ValueError, match="not on one grid"):
        agreement(synthetic(words=["bass"], grid=MelGrid(5, BANDS)), effect)
    with pytest.raises(ValueError, match="not on one grid"):
        agreement(effect.assign_coords(time=effect["time"] * 2), effect)
    with pytest.raises(ValueError, match="no common word"):
        agreement(synthetic(words=["drums"]), effect)
    with pytest.raises(ValueError, match="attention must have dims"):
        agreement(effect[0], effect)


# ---- the real pipelines


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_audioldm2_on_real_audio(pipe, noise, remove):
    torch.manual_seed(3)
    before, generator = state(pipe), torch.get_rng_state()
    options = {"waveform": noise, "sample_rate": RATE, "remove": remove, "timesteps": (300, 800), "draws": 2}
    maps = effect_map(pipe, "a bass and drums", words=["bass", "drums"], **options)
    assert maps.dims == ("prompt", "word", "time", "mel")
    assert maps.shape == (1, 2, 128, 64)
    assert maps.dtype == np.float32
    assert (maps >= 0).all()
    assert (effect_mass(maps) > 1e-5).all()
    np.testing.assert_allclose(maps["time"], (np.arange(128) + 0.5) / 128)
    assert maps["frequency"].values[[0, -1]] == pytest.approx(MelGrid().frequencies[[0, -1]])
    described = {k: maps.attrs[k] for k in ("remove", "quantity", "units", "timesteps", "draws", "seed", "model")}
    assert described == {
        "remove": remove,
        "quantity": "log",
        "units": "nats",
        "timesteps": [300, 800],
        "draws": 2,
        "seed": 0,
        "model": "AudioLDM2Pipeline",
    }
    assert maps.attrs["prediction_type"] == "epsilon"
    assert maps.attrs["finest_lattice"] == [100, 64]
    rows = score(maps, {"bass": np.eye(128, 64, dtype=bool)}, metrics=["average_precision"])
    assert np.isfinite(rows[0]["value"])
    # one by one, and again
    one = effect_map(pipe, "a bass and drums", words=["drums"], batch=1, **options)
    np.testing.assert_allclose(one[0, 0], maps[0, 1], atol=2e-5)
    assert np.array_equal(effect_map(pipe, "a bass and drums", words=["bass", "drums"], **options), maps)
    assert torch.equal(generator, torch.get_rng_state())
    assert state(pipe) == before


def test_the_map_is_the_difference_of_two_decoded_predictions(pipe, noise):
    """Both ways, written out with the pipeline's own parts and its scheduler's own clean latent."""
    options = {"waveform": noise, "sample_rate": RATE, "timesteps": (500,), "draws": 1, "words": ["bass"], "seed": 7}
    grid = MelGrid(100, 64)

    def predicted(text):
        embeds, mask, generated = pipe.encode_prompt(text, "cpu", 1, False)
        output = pipe.unet(
            noised,
            500,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=embeds,
            encoder_attention_mask_1=mask,
        ).sample
        alpha = pipe.scheduler.alphas_cumprod[500]
        clean = (noised - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample[0, 0]

    with torch.no_grad():
        latent = encode_audioldm2(pipe, (noise - noise.mean()) / np.abs(noise - noise.mean()).max() * 0.5, RATE)
        drawn = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
        noised = pipe.scheduler.add_noise(latent, drawn, torch.tensor([500]))
        whole, cut = predicted("a bass and drums"), predicted("a and drums")
        with intervene(pipe, reweight={"bass": 0.0}):
            edited = predicted("a bass and drums")
    for remove, lost in (("prompt", cut), ("values", edited)):
        maps = effect_map(pipe, "a bass and drums", remove=remove, grid=grid, **options)
        np.testing.assert_allclose(maps[0, 0], (whole - lost).clamp_min(0), atol=1e-4)


def test_generated_latents_are_taken_as_they_are(pipe):
    latents = pipe(
        "a bass", num_inference_steps=1, audio_length_in_s=0.64, output_type="latent", guidance_scale=1.0
    ).audios
    maps = effect_map(pipe, "a bass", latents=latents, words=["bass"], draws=1, grid=MelGrid(64, 64))
    assert maps["time"].values[-1] == pytest.approx(0.635)
    assert effect_mass(maps).item() > 0


def test_seeds_differ(pipe, noise):
    one, other = (
        effect_map(pipe, "a bass", waveform=noise, sample_rate=RATE, words=["bass"], draws=1, seed=s) for s in (0, 1)
    )
    assert not np.allclose(one, other, atol=1e-5)


def test_agreement_with_attention_of_the_same_audio(pipe, noise):
    grid, prompt, words = MelGrid(64, 32, duration=0.9), "a bass and drums", ["bass", "drums"]
    effect = effect_map(pipe, prompt, waveform=noise, sample_rate=RATE, words=words, draws=1, grid=grid)
    maps = probe(pipe, noise, RATE, prompt, words=words)
    found = agreement(project(maps, grid), effect)
    assert found["word"].values.tolist() == words
    assert all(np.isfinite(found[name]).all() and (abs(found[name]) <= 2).all() for name in found)


@pytest.mark.parametrize("remove", ["prompt", "values"])
def test_the_diffusion_transformer_has_effect_maps(dit, noise, remove):
    pipe = dit
    maps = effect_map(pipe, "a bass", waveform=noise, sample_rate=RATE, words=["bass"], remove=remove, draws=2)
    assert maps.attrs["prediction_type"] == "v_prediction"
    assert maps.attrs["frequency_resolved"]
    assert maps[0, 0].std("mel").max() > 0


def test_a_probe_of_the_diffusion_transformer_sees_the_same_predictions(dit, noise):
    """What a backbone's ``predict`` runs is what capture observes, on the latents that effect maps are made of."""
    seen = []
    forward = dit.transformer.forward
    dit.transformer.forward = lambda hidden, *rest, **named: seen.append(hidden) or forward(hidden, *rest, **named)
    try:
        maps = probe(dit, noise, RATE, "a bass", timesteps=(300, 800), draws=2)
        effect_map(
            dit, "a bass", waveform=noise, sample_rate=RATE, words=["bass"], timesteps=(300, 800), draws=2, batch=2
        )
    finally:
        dit.transformer.forward = forward
    assert len(maps) == len(dit.transformer.transformer_blocks)
    columns = seen[0].shape[-1]
    for array in maps.values():
        assert (array.sizes["step"], array.sizes["time"]) == (4, columns)
        np.testing.assert_allclose(array["timestep"], [300, 300, 800, 800], atol=1e-3)
    probed, given = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(probed, given[:4])  # with the word: level by level, its two draws
    assert torch.equal(probed, given[4:])  # and without


# ---- what is refused


def test_what_lacks_a_part_says_which(pipe, noise):
    class Other:
        _execution_device = torch.device("cpu")
        scheduler = pipe.scheduler
        vocoder = pipe.vocoder

        def encode_prompt(self, prompt, device, num_waveforms_per_prompt, do_classifier_free_guidance):
            return pipe.encode_prompt(prompt, device, num_waveforms_per_prompt, do_classifier_free_guidance)

    latents = torch.zeros(1, 8, 8, 16)

    def predict(pipeline, latents, timestep, conditioning):
        return latents

    with pytest.raises(CannotProbe, match="Module has no encode_prompt or no scheduler"):
        effect_map(nn.Module(), "a bass", latents=latents)
    with pytest.raises(CannotProbe, match=r"Other has no unet: give its backbone a method predict"):
        effect_map(Other(), "a bass", latents=latents)
    with pytest.raises(CannotProbe, match=r"Other has no image-like VAE.*method decode_mel\(target, latents\)"):
        effect_map(Other(), "a bass", latents=latents, predict=predict)
    with pytest.raises(CannotProbe, match="no image-like VAE"):
        decode_audioldm2(SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace())), latents)
    Other.vocoder = None
    with pytest.raises(CannotProbe, match=r"Other has no vocoder.*mel_grid\(target\)"):
        effect_map(Other(), "a bass", latents=latents, predict=predict)
    own = effect_map(
        Other(),
        "a bass",
        latents=latents,
        words=["bass"],
        predict=predict,
        decode_mel=lambda p, z: z[:, 0],
        mel=MelGrid(mel=16),
    )
    assert not own.any()
    with pytest.raises(ValueError, match="decode_mel returned"):
        effect_map(
            Other(), "a bass", latents=latents, predict=predict, decode_mel=lambda p, z: z[:, 0], mel=MelGrid(mel=8)
        )


def test_a_model_without_cross_attention_refuses_values():
    pipe = Synthetic()
    pipe.unet.forward = lambda sample, timestep, encoder_hidden_states: sample
    with pytest.raises(NothingCaptured):
        synthetic(pipe=pipe, remove="values", words=["bass"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": "both"}, "remove must be one of 'prompt', 'values'; got 'both'"),
        ({"quantity": "db"}, "quantity must be one of"),
        ({"part": "negative"}, "part must be one of"),
        ({"levels": "all"}, "levels must be one of"),
        ({"draws": 0}, "at least one timestep, draw"),
        ({"timesteps": ()}, "at least one timestep, draw"),
        ({"prompt": []}, "at least one prompt"),
        ({"timesteps": (1000,)}, "timestep 1000 is outside 0–999"),
        ({"words": []}, "distinct and at least one"),
        ({"words": ["bass", "bass"]}, "distinct and at least one"),
        ({"latents": None}, "pass either waveform="),
        ({"waveform": np.zeros(9), "sample_rate": RATE}, "pass either waveform="),
        ({"latents": None, "waveform": np.zeros(9)}, "pass either waveform="),
        ({"latents": LATENT.repeat(3, 1, 1, 1)}, "3 latents for 1 prompts"),
        ({"without": {"bass": "a"}, "remove": "values"}, "without= says"),
        ({"without": {"bass": "a"}, "prompt": ["bass", "drums"]}, "without= says"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**options)


def test_a_word_that_no_prompt_has_is_refused():
    with pytest.raises(UnknownWord, match="'organ' is not in the prompt"):
        synthetic(words=["organ"])
