"""The embedded trained pipelines: loading, digests, capture on both backbones."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from aiba_hooks import AibaError, capture
from aiba_plugins.backbones.demo_dit import MelDiT
from aiba_plugins.demo import aiba_models, parts, trained, vocabulary
from aiba_plugins.demo.mel_dit import MelDiTPipeline

SHIPPED = pytest.mark.skipif(
    not (trained.available("unet") and trained.available("dit")), reason="the trained weights are not installed"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A weights folder as `examples/training/export.py` writes it, with fresh weights."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, vocoder = parts.vae(), parts.vocoder()
        trained.save(parts.audioldm2(vae, vocoder), "unet", folder)
        trained.save(parts.mel_dit(vae, vocoder), "dit", folder)
    trained.record(folder)
    return folder


@pytest.fixture(scope="module")
def pipes(root):
    loaded = {kind: trained.load(kind, root) for kind in ("unet", "dit")}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


def make(pipe, prompt="a bass and drums", seconds=1.28, steps=2, **options):
    options = {"guidance_scale": 2.5, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, audio_length_in_s=seconds, num_inference_steps=steps, **options).audios


def test_both_pipelines_load_in_float32_and_eval_mode(pipes):
    assert type(pipes["unet"]).__name__ == "AudioLDM2Pipeline"
    assert isinstance(pipes["dit"], MelDiTPipeline)
    for pipe in pipes.values():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                assert not part.training
                assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_shared_parts_are_stored_once(root, pipes):
    assert not (root / "dit" / "vae").exists()
    for part in ("vae", "vocoder"):
        ours, theirs = (getattr(pipes[kind], part).state_dict() for kind in ("unet", "dit"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_loaded_weights_are_the_saved_ones(kind, pipes, tmp_path):
    audio = make(pipes[kind])
    trained.save(pipes["unet"], "unet", tmp_path)
    trained.save(pipes["dit"], "dit", tmp_path)
    trained.record(tmp_path)
    again = trained.load(kind, tmp_path)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(make(again), audio)


def test_the_unet_folder_is_an_ordinary_diffusers_folder(root, pipes):
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(root / "unet", torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(make(stock), make(pipes["unet"]))


def test_the_dit_pipeline_round_trips_complete_too(pipes, tmp_path):
    pipes["dit"].save_pretrained(tmp_path / "whole")
    again = MelDiTPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(make(again), make(pipes["dit"]))


@pytest.fixture
def damaged(root, tmp_path):
    """A copy of the weights that a test may damage."""
    import shutil

    return shutil.copytree(root, tmp_path / "weights")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_truncated_file_is_named(kind, damaged):
    file = damaged / "unet" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(trained.DamagedWeights, match=r"vae.*is cut off: 1000 bytes instead of \d+"):
        trained.load(kind, damaged)


def test_a_changed_file_is_named(damaged):
    file = damaged / "dit" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(trained.DamagedWeights, match=r"transformer.*SHA-256"):
        trained.load("dit", damaged)
    trained.verify("unet", damaged)


def test_a_missing_file_and_a_damaged_list_are_clear_errors(damaged):
    (damaged / "unet" / "unet" / "config.json").unlink()
    with pytest.raises(AibaError, match=r"config\.json is missing"):
        trained.load("unet", damaged)
    (damaged / "digests.json").write_text("{")
    with pytest.raises(AibaError, match="cannot be read"):
        trained.load("dit", damaged)
    (damaged / "digests.json").write_text(json.dumps({}))
    with pytest.raises(AibaError, match="lists no files"):
        trained.load("dit", damaged)


def test_models_are_listed_only_with_their_weights(monkeypatch, root, tmp_path):
    assert trained.available("unet", root)
    assert not trained.available("unet", tmp_path)
    monkeypatch.setattr(trained, "available", lambda kind: False)
    assert [model.name for model in aiba_models()] == ["demo:random"]
    monkeypatch.setattr(trained, "available", lambda kind: True)
    assert [(m.name, m.trained) for m in aiba_models()][1:] == [("demo:unet", True), ("demo:dit", True)]


def test_capture_on_the_unet(pipes):
    plain = make(pipes["unet"])
    with capture(pipes["unet"], words=["bass", "drums"]) as cap:
        audio = make(pipes["unet"])
    np.testing.assert_array_equal(audio, plain)
    shapes = {(a.sizes["time"], a.sizes["frequency"]) for a in cap.maps.values()}
    assert shapes == {(16, 8), (8, 4)}  # nothing at the first level
    assert len(cap.maps) == 7
    assert all(a.attrs.get("stream", "t5") == "t5" for a in cap.maps.values())


def test_capture_on_the_dit(pipes):
    plain = make(pipes["dit"], ["a bass and drums", "piano"])
    with capture(pipes["dit"], words=["bass", "drums"], backbone=MelDiT()) as cap:
        audio = make(pipes["dit"], ["a bass and drums", "piano"])
    np.testing.assert_array_equal(audio, plain)
    assert len(cap.maps) == len(pipes["dit"].transformer.transformer_blocks)
    for array in cap.maps.values():
        assert array.dims == ("prompt", "step", "word", "time")
        assert array.sizes["time"] == 32
        assert array.time.values[0] == pytest.approx(0.02)
        assert array.timestep.values.tolist() == pytest.approx([999, 499])
        # the groups cover every key: what a query gives them adds up to one
        np.testing.assert_allclose(array.isel(prompt=0).sum("word"), 1, atol=1e-5)


def test_the_unconditional_branch_of_the_dit_is_uniform(pipes):
    with capture(pipes["dit"], words=["bass"], branch="unconditional", backbone=MelDiT()) as cap:
        make(pipes["dit"], "bass")
    length = pipes["dit"].tokenizer.model_max_length
    for array in cap.maps.values():
        np.testing.assert_allclose(array.sel(word="bass"), 1 / length, rtol=1e-4)


def test_folding_the_latent_is_lossless_and_keeps_time_last(pipes):
    latent = torch.randn(2, 8, 5, 16)
    folded = pipes["dit"].fold(latent)
    assert folded.shape == (2, 128, 5)
    assert torch.equal(folded[:, 3 * 16 + 7], latent[:, 3, :, 7])
    assert torch.equal(pipes["dit"].unfold(folded), latent)


def test_the_dit_pipeline_s_own_options(pipes):
    pipe = pipes["dit"]
    assert make(pipe, seconds=0.05).shape == (1, 800)
    assert make(pipe, ["bass", "drums"], num_waveforms_per_prompt=2).shape[0] == 4
    latent = make(pipe, output_type="latent")
    assert latent.shape == (1, 8, 32, 16)
    given = torch.randn(1, 8, 32, 16, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(make(pipe, latents=given), make(pipe))
    assert not np.array_equal(make(pipe, negative_prompt="piano"), make(pipe))
    seen = []
    watched = make(pipe, callback_on_step_end=lambda p, i, t, v: seen.append((i, int(t))) or {})
    assert seen == [(0, 999), (1, 499)]
    np.testing.assert_array_equal(watched, make(pipe))
    silent = make(pipe, output_type="latent", callback_on_step_end=lambda p, i, t, v: {"latents": 0 * v["latents"]})
    assert not silent.any()
    with pytest.raises(ValueError, match="latents must have shape"):
        make(pipe, latents=given[:, :, :3])
    with pytest.raises(ValueError, match="positive"):
        make(pipe, seconds=0.0)


def test_every_word_of_the_vocabulary_is_one_token():
    tokenizer = vocabulary.tokenizer()
    for word in vocabulary.words():
        assert len(tokenizer(word).input_ids) == 2, word
    assert tokenizer.unk_token_id not in tokenizer("a kazoo, loudly!").input_ids


@SHIPPED
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_shipped_weights_are_intact_small_and_fast_enough(kind):
    pipe = trained.load(kind)
    pipe.set_progress_bar_config(disable=True)
    names = trained.needed(kind)
    files = [p for p in trained.WEIGHTS.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files if p.relative_to(trained.WEIGHTS).as_posix().startswith(names))
    assert size <= 24e6
    began = time.process_time()
    with capture(pipe, words=["bass", "drums"], backbone=MelDiT() if kind == "dit" else None) as cap:
        audio = make(pipe, seconds=5.0, steps=20)
    assert audio.shape == (1, 80000)
    assert np.isfinite(audio).all()
    assert 1e-3 < np.abs(audio).max() <= 1
    assert time.process_time() - began < 40  # of CPU time: 20 s on 2 cores
    assert len(cap.maps)
