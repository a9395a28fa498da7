"""The demo and its parts: probing real audio, scoring against stems, means over pieces, and an output that is its own."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from aiba_eval import MelGrid, references, templates
from aiba_eval.datasets import Piece
from aiba_eval.demo import (
    default_models,
    demo,
    probe_piece,
    prompt_of,
    score_pieces,
    shipped_pieces,
)
from aiba_eval.loading import Loaded
from aiba_eval.outputs import FolderInUse
from aiba_eval.probe import (
    CannotProbe,
    FrontEnd,
    add_noise,
    encode_audioldm2,
    normalise,
    predict_audioldm2,
    probe,
)
from aiba_eval.scoring import REFERENCES as EVERY
from aiba_hooks import AttentionMaps, Model, UnknownWord, hookimpl
from aiba_hooks.plugins import manager

RATE = 16000
REFERENCES = [name for name in EVERY if name != "other_piece"]
SMALL = {"steps": 2, "duration": 0.64, "seconds": 1.28, "max_pieces": 2, "prompts": ["a bass and drums"]}


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1


@pytest.fixture(scope="module")
def loaded(shared_pipe):
    return Loaded("demo:random", shared_pipe, "plugin", False, "cpu", "float32")


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    return demo(loaded, out=tmp_path_factory.mktemp("demo") / "out", **SMALL)


# ---- the front end


def test_front_end_is_read_off_the_vocoder(shared_pipe):
    assert FrontEnd.of(shared_pipe) == FrontEnd(sample_rate=16000, hop_length=160, bands=64, fmax=8000.0)


def test_waveforms_are_normalised_as_the_training_audio_was(noise):
    wave = normalise(noise * 0.01 + 0.2)
    assert abs(wave.mean()) < 1e-6
    assert np.abs(wave).max() == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_allclose(normalise(np.stack([noise, noise])), normalise(noise), atol=1e-6)
    assert not normalise(np.zeros(100)).any()


def test_encoding_is_the_mean_of_the_vae_on_the_log_mel(shared_pipe, noise):
    import librosa

    with torch.no_grad():
        latents = encode_audioldm2(shared_pipe, noise, RATE)
        # AudioLDM2's front end, written out: reflection padding, magnitudes, slaney filters, ln(max(·, 1e-5))
        padded = np.pad(noise, 432, mode="reflect")
        magnitudes = np.abs(librosa.stft(padded, n_fft=1024, hop_length=160, win_length=1024, center=False))
        mel = np.log(
            np.maximum(librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=64, fmin=0, fmax=8000) @ magnitudes, 1e-5)
        )
        pixels = torch.from_numpy(mel.T[None, None].astype(np.float32))
        expected = shared_pipe.vae.encode(pixels).latent_dist.mean * shared_pipe.vae.config.scaling_factor
    assert latents.shape == (1, 8, 25, 16)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)


def test_audio_that_does_not_fill_a_latent_column_is_padded(shared_pipe, noise):
    with torch.no_grad():
        assert encode_audioldm2(shared_pipe, noise[:15900], RATE).shape[2] == 25
        assert encode_audioldm2(shared_pipe, noise[:15300], RATE).shape[2] == 24


def test_another_sample_rate_has_the_same_length(shared_pipe, noise):
    with torch.no_grad():
        assert encode_audioldm2(shared_pipe, np.repeat(noise, 2), 2 * RATE).shape == (1, 8, 25, 16)


# ---- the probe


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_noise_is_the_schedulers(shared_pipe, timestep):
    clean, drawn = torch.randn(1, 8, 25, 16), torch.randn(1, 8, 25, 16)
    expected = shared_pipe.scheduler.add_noise(clean, drawn, torch.tensor([timestep]))
    torch.testing.assert_close(add_noise(shared_pipe, clean, drawn, timestep), expected)


def test_the_denoiser_is_called_as_the_pipeline_calls_it(pipe):
    """With the pipeline's own latents and timestep, the prediction is the pipeline's."""
    seen = []

    def keep(module, args, kwargs, output):
        seen.append((args, output[0]))

    hook = pipe.unet.register_forward_hook(keep, with_kwargs=True)
    try:
        pipe("a bass", num_inference_steps=1, audio_length_in_s=0.64, guidance_scale=1.0)
    finally:
        hook.remove()
    ((latents, timestep), expected) = seen[0]
    with torch.no_grad():
        conditioning = pipe.encode_prompt("a bass", pipe.device, 1, False)
        assert torch.equal(predict_audioldm2(pipe, latents, timestep, conditioning), expected)


def test_a_probe_gives_maps_at_each_level_and_draw(pipe, noise):
    maps = probe(pipe, noise, RATE, "a bass and drums", words=["bass"], timesteps=(300, 800), draws=2)
    assert len(maps) == 16
    array = maps["up_blocks.2.attentions.2.transformer_blocks.0.attn2"]
    assert array.dims == ("prompt", "step", "word", "time", "frequency")
    assert array["timestep"].values.tolist() == [300, 300, 800, 800]
    assert array.sizes["time"] == 13
    assert array["time"].values[-1] < 1.04
    # the same draws at every level, different draws within one
    assert not np.allclose(array[:, 0], array[:, 1])
    total = array.sum("word").values
    np.testing.assert_allclose(total, 1, atol=1e-4)


def test_a_probe_repeats_and_leaves_the_generator(pipe, noise):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (probe(pipe, noise, RATE, "a bass", seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for site in first:
        assert np.array_equal(first[site], second[site])
    other = probe(pipe, noise, RATE, "a bass", seed=5)
    assert any(not np.array_equal(first[site], other[site]) for site in first)


def test_a_probe_follows_the_audio(pipe, noise):
    one, other = (probe(pipe, wave, RATE, "a bass", timesteps=(0,)) for wave in (noise, np.sin(np.arange(RATE) / 8)))
    assert any(not np.allclose(one[site], other[site], atol=1e-4) for site in one)


def test_own_encode_and_predict_serve_another_backbone(pipe, noise):
    calls = []

    def encode(pipeline, waveform, sample_rate):
        calls.append((len(waveform), sample_rate))
        return torch.zeros(1, 8, 16, 16)

    def predict(pipeline, latents, timestep, conditioning):
        calls.append(int(timestep))
        return predict_audioldm2(pipeline, latents, timestep, conditioning)

    probe(pipe, noise, RATE, "a bass", timesteps=(500,), encode=encode, predict=predict)
    assert calls == [(RATE, RATE), 500]


def test_a_backbone_may_bring_its_own_predict(pipe, noise, monkeypatch):
    backbone = next(b for b in manager().collect("aiba_backbones") if b.matches(pipe))
    asked = []

    def predict(self, target, latents, timestep, conditioning):
        asked.append(int(timestep))
        return predict_audioldm2(target, latents, timestep, conditioning)

    monkeypatch.setattr(type(backbone), "predict", predict, raising=False)
    probe(pipe, noise, RATE, "a bass", timesteps=(500,))
    assert asked == [500]


def test_what_cannot_be_probed_says_what_it_lacks(pipe, noise):
    class Other:
        scheduler = None

        def encode_prompt(self):
            return None

        _execution_device = torch.device("cpu")
        vae = pipe.vae

    with pytest.raises(CannotProbe, match="Module has no encode_prompt"):
        probe(torch.nn.Module(), noise, RATE, "a bass")
    with pytest.raises(CannotProbe, match="Other has no mel vocoder"):
        probe(Other(), noise, RATE, "a bass")
    with pytest.raises(CannotProbe, match="Other has no unet: give its backbone a method predict"):
        predict_audioldm2(Other(), None, None, None)
    with pytest.raises(ValueError, match="timestep 1000 is outside 0–999"):
        probe(pipe, noise, RATE, "a bass", timesteps=(1000,))
    with pytest.raises(ValueError, match="at least one timestep"):
        probe(pipe, noise, RATE, "a bass", timesteps=())
    with pytest.raises(UnknownWord):
        probe(pipe, noise, RATE, "a bass", words=["piano"])


# ---- pieces


def test_a_piece_is_probed_with_its_instruments(pipe):
    piece = shipped_pieces()[0]
    probed = probe_piece(pipe, piece, seconds=1.28, timesteps=(300,))
    assert set(probed.dominance) <= set(piece.instruments)
    assert all(word in probed.prompt for word in probed.dominance)
    masks = np.sum([mask.astype(int) for mask in probed.dominance.values()], axis=0)
    assert masks.max() <= 1
    assert probed.projected[300].attrs["seconds_per_column"] * 128 == pytest.approx(1.28)


def test_dominance_is_of_the_pieces_own_stems(pipe):
    piece = shipped_pieces()[0]
    probed = probe_piece(pipe, piece, seconds=1.28, timesteps=(300,))
    grid = MelGrid(duration=1.28)
    mels = {word: grid.power(piece.stem(word, seconds=1.28), piece.sample_rate) for word in piece.instruments}
    for word, mask in probed.dominance.items():
        np.testing.assert_array_equal(mask, templates.dominance_mask(mels, word))


def test_prompts_name_instruments():
    assert prompt_of(["bass"]) == "a solo bass"
    assert prompt_of(["bass", "drums", "piano"]) == "bass, drums and piano"


def test_a_piece_that_no_prompt_can_name_is_refused(pipe):
    piece = shipped_pieces()[0]
    unnamed = Piece(**{**{f: getattr(piece, f) for f in piece.__dataclass_fields__}, "stems": ()})
    with pytest.raises(ValueError, match="no instrument that a prompt can name"):
        probe_piece(pipe, unnamed)


def test_the_class_prior_comes_from_the_other_pieces(made, pipe):
    probed = [probe_piece(pipe, piece, seconds=1.28, timesteps=(300,)) for piece in shipped_pieces()[:2]]
    rows = score_pieces(probed)
    assert {row["mask"] for row in rows} == {"dominance", "band:paper", "band:measured"}
    row = next(r for r in rows if (r["piece"], r["word"], r["mask"]) == (probed[0].piece, "bass", "dominance"))
    assert row["metric"] == "average_precision"
    prior = references.class_prior([probed[1].dominance["bass"]])
    from aiba_eval import metrics

    assert row["class_prior"] == metrics.average_precision(prior, probed[0].dominance["bass"])
    alone = score_pieces(probed[:1])
    assert all(np.isnan(r["class_prior"]) for r in alone)


# ---- the whole


def test_everything_that_is_listed_is_there_and_readable(made):
    assert all((made.out / name).exists() for name in made.files)
    on_disk = {p.relative_to(made.out).as_posix() for p in made.out.rglob("*.png")}
    assert on_disk == {name for name in made.files if name.endswith(".png")}
    for name in made.files:
        if name.endswith(".zarr"):
            assert len(AttentionMaps.load(made.out / name)) == 16
        elif name.endswith(".wav"):
            audio, rate = soundfile.read(made.out / name)
            assert (rate, len(audio)) == (16000, int(0.64 * 16000))


def test_scores_stand_beside_their_references(made):
    with (made.out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.scores)
    assert {"model", "piece", "timestep", "mask", "word", "metric", "value", *REFERENCES} <= set(rows[0])
    precise = [row for row in rows if row["metric"] == "average_precision" and row["mask"] == "dominance"]
    for row in precise:
        assert float(row["chance"]) == pytest.approx(float(row["mask_area"]))
        assert float(row["oracle_projection"]) > float(row["chance"])


def test_the_summary_says_how_many_pieces(made):
    record = json.loads((made.out / "demo.json").read_text(encoding="utf-8"))
    assert record["complete"] is True
    assert record["models"]["demo:random"]["trained"] is False
    bass = [
        r
        for r in record["summary"]
        if (r["word"], r["mask"], r["metric"], r["reference"]) == ("bass", "dominance", "average_precision", "chance")
    ]
    assert [row["timestep"] for row in bass] == [300, 800]
    assert all(row["n"] == 2 for row in bass)


def test_it_says_that_the_weights_are_random(made):
    assert made.notes[0].startswith("demo:random has random weights")


def test_untrained_maps_score_near_chance(made):
    (chance,) = [
        r
        for r in made.summary
        if (r["metric"], r["mask"], r["word"], r["reference"], r["timestep"])
        == ("average_precision", "dominance", "all", "chance", 300)
    ]
    assert 0.7 < chance["ratio"] < 1.4


def test_the_same_seed_gives_the_same_scores_over_the_former_output(made, loaded):
    (made.out / "mine.txt").write_text("a note", encoding="utf-8")
    (made.out / "demo-random" / "pieces" / "stale.txt").write_text("not in the manifest", encoding="utf-8")
    again = demo(loaded, out=made.out, **SMALL)
    assert again.files == made.files
    assert len(again.scores) == len(made.scores)
    for one, other in zip(made.scores, again.scores):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_equal(other[key], one[key])
    assert (made.out / "mine.txt").read_text(encoding="utf-8") == "a note"
    assert (made.out / "demo-random" / "pieces" / "stale.txt").exists()


def test_another_seed_gives_other_scores(made, loaded, tmp_path):
    other = demo(loaded, out=tmp_path / "o", seed=1, **{**SMALL, "prompts": [], "max_pieces": 1})
    ours = [row["value"] for row in made.scores if row["metric"] == "average_precision"]
    assert [row["value"] for row in other.scores if row["metric"] == "average_precision"] != ours


def test_a_folder_of_others_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(FolderInUse, match="is not empty and is no former output folder of `aiba demo`"):
        demo("no such model", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_pieces_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="pieces is empty"):
        demo(out=tmp_path, pieces=[])
    with pytest.raises(ValueError, match="models is empty"):
        demo([], out=tmp_path)


def test_the_trained_demo_models_are_the_default(monkeypatch):
    assert set(default_models()) <= {m.name for m in manager().collect("aiba_models")}

    class Plugin:
        @hookimpl
        def aiba_models(self):
            return [Model("other:unet", "", object), Model("demo:mine", "", object)]

    plugin = Plugin()
    manager().pluggy.register(plugin)
    try:
        assert "demo:mine" in default_models()
        assert not {"other:unet", "demo:random"} & set(default_models())
    finally:
        manager().pluggy.unregister(plugin)
    monkeypatch.setattr("aiba_eval.demo.registered", lambda: [])
    assert default_models() == ["demo:random"]


def test_two_models_stand_side_by_side(loaded, tmp_path):
    other = replace(loaded, name="demo:other")
    both = demo([loaded, other], out=tmp_path / "o", **{**SMALL, "max_pieces": 1, "seconds": 0.64})
    assert list(both.record["models"]) == ["demo:random", "demo:other"]
    for name in ("demo-random", "demo-other"):
        assert (both.out / name / "generated" / "1-a-bass-and-drums" / "audio.wav").is_file()
    one, two = ([row for row in both.summary if row["model"] == name] for name in both.record["models"])
    assert len(one) == len(two) > 0
    # the same weights, noise and pieces: the same scores
    np.testing.assert_equal([{**row, "model": ""} for row in one], [{**row, "model": ""} for row in two])
    with pytest.raises(ValueError, match="demo:random is given twice"):
        demo([loaded, loaded], out=tmp_path / "p", **{**SMALL, "max_pieces": 1, "seconds": 0.64, "prompts": []})
