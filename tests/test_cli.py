"""The command line: what it prints, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import aiba_eval.run as running
from aiba_eval import loading
from aiba_eval.cli.app import app
from aiba_eval.loading import CannotLoad, few_threads, load, sampling_rate
from aiba_eval.outputs import FolderInUse, OutputFolder, dump_json, write_csv
from aiba_hooks import AttentionMaps
from aiba_hooks.plugins import manager

RUNNER = CliRunner()
SHORT = ["--steps", "2", "--duration", "0.64"]


def aiba(*arguments, code=0):
    """Run a command in this process; ``(stdout, stderr)``."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture
def fresh_plugins():
    manager.cache_clear()
    yield
    manager.cache_clear()


@pytest.fixture(scope="module")
def saved(shared_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shared_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """``(folder, stdout, stderr)`` of one run with --json."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = ["--word", "bass", "--word", "drums", "--word", "loud"]
    printed = aiba("run", "demo:random", "--prompt", "a loud bass and drums", *words, *SHORT, "--out", out, "--json")
    return out, *printed


# ---- quick to start


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plugins"], ["--version"]])
def test_nothing_heavy_is_imported_to_say_so_little(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['aiba', *{arguments!r}]\n"
        "from aiba_eval.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'xarray', 'librosa', 'matplotlib', 'diffusers', 'transformers', 'sklearn', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_without_typer_it_says_what_to_install():
    result = python("import sys; sys.modules['typer'] = None\nfrom aiba_eval.cli import main\nmain()")
    assert result.returncode == 2
    assert result.stderr == 'the command line needs typer, which is not installed: pip install "aiba[cli]"\n'


# ---- plugins


def test_plugins_lists_what_each_offers():
    listing = json.loads(aiba("plugins", "--json")[0])
    by_name = {plugin["name"]: plugin for plugin in listing["plugins"]}
    assert by_name["audioldm2"]["backbones"] == ["audioldm2"]
    assert by_name["audioldm2"]["distribution"].startswith("aiba ")
    assert by_name["aiba_hooks.kernels.sdpa"]["kernels"] == ["sdpa"]
    models = {model["name"]: model for model in by_name["demo"]["models"]}
    assert models["demo:random"]["trained"] is False
    text, _ = aiba("plugins")
    assert re.search(r"backbones +\S+ +aiba ", text)
    assert re.search(r"\n +audioldm2 +aiba ", text)
    assert "demo:random: AudioLDM2Pipeline" in text
    assert by_name["musicnet"]["datasets"][0]["licence"] == "CC BY 4.0"
    assert re.search(r"\n +musicnet +aiba ", text)


def test_plugins_lists_those_that_failed(fresh_plugins, tmp_path, monkeypatch):
    (tmp_path / "broken_on_import.py").write_text("import no_such_module_anywhere", encoding="utf-8")
    (tmp_path / "broken_on_call.py").write_text(
        "from aiba_hooks import hookimpl\n@hookimpl\ndef aiba_models():\n    raise RuntimeError('out of order')",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AIBA_PLUGINS", "broken_on_import,broken_on_call,aiba_plugins.demo")
    listing = json.loads(aiba("plugins", "--json")[0])
    assert {failure["name"]: failure["error"] for failure in listing["failures"]} == {
        "broken_on_import": "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        "broken_on_call": "RuntimeError: out of order",
    }
    assert "aiba_plugins.demo" in {plugin["name"] for plugin in listing["plugins"]}
    assert "failed to load: broken_on_call: RuntimeError: out of order" in aiba("plugins")[0]


# ---- run


def test_json_is_one_document_and_progress_is_on_stderr(done):
    _, stdout, stderr = done
    document = json.loads(stdout)
    assert document["prompt"] == "a loud bass and drums"
    assert document["arguments"] == {"num_inference_steps": 2, "guidance_scale": 2.5, "audio_length_in_s": 0.64}
    assert {"aiba", "torch", "diffusers", "python"} <= set(document["versions"])
    assert "generating 'a loud bass and drums'" in stderr
    assert "NaN" not in stdout


def test_run_writes_files_that_can_be_read(done):
    out, stdout, _ = done
    assert sorted(json.loads(stdout)["files"]) == sorted(
        ["audio.wav", "maps.zarr", "scores.csv", "run.json"]
        + [f"figures/{name}.png" for name in ("profile", "overlay-bass", "overlay-drums", "overlay-loud")]
    )
    audio, rate = soundfile.read(out / "audio.wav")
    assert (rate, audio.shape) == (16000, (10240,))
    maps = AttentionMaps.load(out / "maps.zarr")
    words = next(iter(maps.values()))["word"].values.tolist()
    assert words == ["bass", "drums", "loud", "(other)", "(special)"]
    for picture in (out / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["aiba"], record["complete"], record["seed"]) == ("run", True, 0)


def test_every_score_names_its_mask_and_stands_beside_its_references(done):
    out, stdout, _ = done
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    precise = {(row["word"], row["mask"]): row for row in rows if row["metric"] == "average_precision"}
    assert set(precise) == {("bass", "band:paper"), ("bass", "band:measured"), ("drums", "band:measured")}
    row = precise["bass", "band:paper"]
    assert (float(row["low_hz"]), float(row["high_hz"])) == (0, 250)
    assert float(row["chance"]) == float(row["mask_area"]) == 5 / 64
    assert all(row[name] for name in ("value", "mix_energy", "oracle_projection"))
    # chance has no closed form for correlations: an empty cell, not a number
    assert next(r for r in rows if r["metric"] == "profile_pearson")["chance"] == ""
    assert len(json.loads(stdout)["scores"]) == len(rows)


def test_the_notes_say_what_the_numbers_are_not(done):
    notes = json.loads(done[1])["notes"]
    assert notes[0].startswith("demo:random has random weights")
    assert notes[1].startswith("no score for 'loud'")
    assert "cannot test timing" in notes[2]


def test_the_audio_is_what_the_pipeline_gives_without_capture(done, shared_pipe):
    audio, _ = soundfile.read(done[0] / "audio.wav", dtype="float32")
    with few_threads(shared_pipe):
        plain = shared_pipe(
            "a loud bass and drums",
            num_inference_steps=2,
            guidance_scale=2.5,
            audio_length_in_s=0.64,
            generator=torch.Generator().manual_seed(0),
        ).audios[0]
    np.testing.assert_array_equal(audio, plain)


def test_a_saved_folder_gives_what_the_registered_model_gives(done, saved, tmp_path):
    out = tmp_path / "out"
    stdout, _ = aiba("run", saved, "--prompt", "a loud bass and drums", "--word", "bass", *SHORT, "--out", out)
    ours, theirs = (soundfile.read(folder / "audio.wav")[0] for folder in (done[0], out))
    np.testing.assert_array_equal(ours, theirs)
    assert "random weights" not in stdout
    assert "paper 0–250 Hz" in stdout
    assert f"Written to {out}" in stdout.replace("\n", "")


def test_options_reach_the_capture_and_the_projection(tmp_path):
    pattern = "up_blocks.2.attentions.[25].*"
    options = ["--heads", "all", "--spatial", "topk", "--step-weights", "late", "--layers", pattern, "--seed", "3"]
    out = tmp_path / "out"
    aiba("run", "demo:random", "--prompt", "a bass", "--word", "bass", *SHORT, *options, "--out", out, "--json")
    maps = AttentionMaps.load(out / "maps.zarr")
    assert [site.split(".")[3] for site in maps] == ["2", "5"]
    assert "head" in next(iter(maps.values())).dims
    assert next(iter(maps.values())).attrs["seed"] == 3
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["spatial"], record["step_weights"]) == ("topk", "late")


def test_a_former_run_is_replaced_only_when_asked(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    again = ["run", "demo:random", "--prompt", "a bass", "--word", "bass", *SHORT, "--out", out]
    _, stderr = aiba(*again, code=2)
    assert "holds the output of an earlier `aiba run`" in stderr
    assert "--overwrite" in stderr
    assert (out / "figures" / "overlay-drums.png").exists()
    aiba(*again, "--overwrite")
    assert not (out / "figures" / "overlay-drums.png").exists()
    assert (out / "figures" / "overlay-bass.png").exists()
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


# ---- what is wrong is said, with the remedy


@pytest.fixture
def wrong(tmp_path, saved):
    """Models that cannot be loaded, by the name of the mistake."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    coded = tmp_path / "coded"
    coded.mkdir()
    shutil.copy(saved / "model_index.json", coded)
    (coded / "None.py").write_text("raise SystemExit('this code ran')", encoding="utf-8")
    pickled = tmp_path / "pickled"
    shutil.copytree(saved, pickled)
    for weights in pickled.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("demo:nope", "no model is named 'demo:nope'. Registered: demo:"),
        ("nonsense", "is no registered model (demo:"),
        ("{}/empty", "is a folder without a model_index.json"),
        ("{}/file.bin", "is a file, not a folder with a model_index.json"),
        ("{}/coded", "holds Python code (None.py), which AIBA does not run"),
        ("{}/pickled", "AIBA reads safetensors weights only"),
        ("nobody/nothing", "it cannot be fetched from the hub"),
    ],
)
def test_a_model_that_cannot_be_loaded(model, said, wrong):
    stdout, stderr = aiba("run", model.format(wrong), "--prompt", "a bass", "--out", wrong / "out", code=2)
    assert said in stderr.splitlines()[-1]
    assert stdout == ""
    assert not (wrong / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--word", "piano"], "'piano' is not in the prompt 'a bass'. Its words are: a, bass"),
        (["--device", "nonsense:1"], "device 'nonsense:1' cannot be used"),
        (["--layers", "nowhere.*", *SHORT], "no attention call matched what was asked for"),
        (["--budget", "1kB", *SHORT], "past budget="),
    ],
)
def test_options_that_cannot_be_met(options, said, tmp_path):
    _, stderr = aiba("run", "demo:random", "--prompt", "a bass", *options, "--out", tmp_path / "out", code=2)
    assert said in stderr
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_words_is_refused(tmp_path):
    _, stderr = aiba("run", "demo:random", "--prompt", " ...", "--out", tmp_path / "out", code=2)
    assert "the prompt ' ...' has no words to map" in stderr


def test_somebodys_folder_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    for command in (["run", "demo:random", "--prompt", "a bass", "--overwrite"], ["demo"]):
        _, stderr = aiba(*command, "--out", tmp_path, code=2)
        assert f"{tmp_path} is not empty and is no former output folder of `aiba {command[0]}`" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_is_one_json_document_too(tmp_path):
    stdout, stderr = aiba("run", "demo:nope", "--prompt", "a bass", "--out", tmp_path / "out", "--json", code=2)
    assert json.loads(stdout)["error"] in stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    _, stderr = aiba("run", "demo:random", "--prompt", "a bass", "--out", tmp_path / "out", code=2)
    assert 'pip install "aiba[diffusers]"' in stderr


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, tmp_path):
    def bug(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(running, "run", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        aiba("run", "demo:random", "--prompt", "a bass", "--out", tmp_path / "out")


# ---- demo and stems


def test_demo_prints_a_table_and_where_everything_is(tmp_path, monkeypatch):
    import aiba_eval.demo as demonstration

    real = demonstration.demo
    small = {"steps": 1, "duration": 0.64, "seconds": 0.64, "timesteps": (300,), "prompts": ["a bass"]}
    monkeypatch.setattr(demonstration, "demo", lambda *args, **kwargs: real(*args, **{**kwargs, **small}))
    stdout, stderr = aiba("demo", "--model", "demo:random", "--pieces", 1, "--out", tmp_path / "out")
    assert "t=300" in stdout
    assert "dominance" in stdout
    assert "demo:random has random weights" in stdout
    assert "demo-random/generated/1-a-bass/" in stdout
    assert "probing real mixes" in stderr
    document = json.loads(aiba("demo", "--model", "demo:random", "--pieces", 1, "--out", tmp_path / "out", "--json")[0])
    assert document["probed"]["pieces"]
    assert document["summary"][0]["mask"] == "dominance"
    assert (tmp_path / "out" / "scores.csv").exists()


def test_stems_render_passes_its_options_on(monkeypatch, tmp_path):
    import aiba_eval.stems as stems
    from aiba_eval.stems.render import Progress, RenderSummary

    given = {}

    def render(out, *, progress, **options):
        given.update(options, out=out)
        progress(Progress(1, 1, "Track00001", "freedoom/one", "rendered"))
        return RenderSummary(out, 1, 0, (("freedoom/two", "has no bass"),), 60.0, 240.0, {"train": 1}, 1)

    monkeypatch.setattr(stems, "render", render)
    options = ["--source", "freedoom", "--sample-rate", 16000, "--require", "bass", "--require", "guitar|piano"]
    stdout, _ = aiba("stems", "render", tmp_path, *options)
    assert "1 pieces rendered, 0 kept from before, 1 skipped: 1.0 min of 1 tunes (1 train)" in stdout
    assert given["sources"] == ("freedoom",)
    assert given["require"] == ("bass", "guitar|piano")
    assert given["sample_rate"] == 16000
    assert json.loads(aiba("stems", "render", tmp_path, "--json")[0])["splits"] == {"train": 1}


def test_stems_errors_say_what_to_do(tmp_path):
    _, stderr = aiba("stems", "render", tmp_path / "set", "--sample-rate", 8000, code=2)
    assert "sample_rate is one of 16000, 44100, not 8000" in stderr


# ---- loading


def test_devices_and_dtypes(saved, capfd):
    half = load(str(saved), dtype="bfloat16")
    assert (half.device, half.dtype, half.origin, half.trained) == ("cpu", "bfloat16", "folder", None)
    assert {part.dtype for part in (half.pipeline.unet, half.pipeline.vae, half.pipeline.vocoder)} == {torch.bfloat16}
    narrow = load("demo:random", dtype="bfloat16")
    assert narrow.pipeline.unet.dtype == torch.bfloat16
    assert not capfd.readouterr().err
    assert load("demo:random").dtype == "float32"
    with pytest.raises(CannotLoad, match="unknown dtype 'float8'; choose auto, float32"):
        load(str(saved), dtype="float8")


def test_bars_of_other_libraries_are_left_as_found(saved):
    from diffusers.utils import logging as theirs

    load(str(saved))
    assert theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        load(str(saved))
        assert not theirs.is_progress_bar_enabled()
    finally:
        theirs.enable_progress_bar()


def test_sampling_rates():
    def part(**values):
        return types.SimpleNamespace(**values)

    assert sampling_rate(part(vocoder=part(config=part(sampling_rate=16000)), vae=part())) == 16000
    assert sampling_rate(part(vae=part(config=part(), sampling_rate=44100))) == 44100
    with pytest.raises(CannotLoad, match="SimpleNamespace does not say its sampling rate"):
        sampling_rate(part(vae=part()))


def test_big_models_keep_their_threads(monkeypatch, shared_pipe):
    before = torch.get_num_threads()
    with few_threads(shared_pipe):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    monkeypatch.setattr(loading, "TINY", 10)
    with few_threads(shared_pipe):
        assert torch.get_num_threads() == before


# ---- generating


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ({"callback_on_step_end"}, [("what", 0, 2), ("what", 1, 2), ("what", 2, 2)]),
        ({"callback", "callback_steps"}, [("what", 0, 2), ("what", 1, 2), ("what", 2, 2)]),
        ({"prompt"}, [("what", 0, 2), ("what", 0, None)]),
    ],
)
def test_progress_uses_whichever_callback_there_is(accepted, expected):
    told = []
    call = running._callback(dict.fromkeys(accepted), "what", 2, lambda *state: told.append(state))
    for step in range(2):
        if "callback" in call:
            assert call["callback_steps"] == 1
            call["callback"](step, 900, None)
        elif call:
            assert call["callback_on_step_end"](None, step, 900, {"latents": 1}) == {"latents": 1}
    assert told == expected


def test_progress_counts_denoiser_steps(pipe):
    told = []
    running.generate(pipe, "a bass", steps=3, duration=0.64, progress=lambda *state: told.append(state[1:]))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_a_pipeline_cannot_be_asked_for(pipe):
    class Plain:
        def __call__(self, prompt):
            return None

    with pytest.raises(running.CannotGenerate, match=r"Plain has no argument for duration \(none of audio_length_in_s"):
        running.generate(Plain(), "a bass", duration=3.0)


def test_nan_audio_is_not_written(pipe, monkeypatch):
    real = pipe.mel_spectrogram_to_waveform
    monkeypatch.setattr(pipe, "mel_spectrogram_to_waveform", lambda mel: real(mel) * float("nan"))
    with pytest.raises(running.CannotGenerate, match=r"NaN or infinite samples of 10240.*--dtype float32"):
        running.generate(pipe, "a bass", steps=1, duration=0.64)
    monkeypatch.undo()


def test_instruments_are_found_in_words():
    names = {word: running.instrument_of(word) for word in ("drum", "acoustic guitar", "Bass#1", "loud")}
    assert names == {"drum": "drums", "acoustic guitar": "guitar", "Bass#1": "bass", "loud": None}


def test_file_names_differ():
    taken = ["figures/overlay-a-b.png"]
    assert running.file_name("a b", taken) == "a-b-2"
    assert running.file_name("../../etc", taken) == "etc"
    assert running.file_name("!", taken) == "word"
    assert len(running.file_name("x" * 300, taken)) == 60


# ---- outputs


def test_a_manifest_cannot_remove_what_is_outside(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path)
    listed = ["../precious.txt", str(precious), "link/precious.txt", ".", "", "gone/nothing", 3]
    (out / "run.json").write_text(json.dumps({"aiba": "run", "files": listed}), encoding="utf-8")
    OutputFolder(out, "run", overwrite=True).file("audio.wav").touch()
    assert precious.read_text(encoding="utf-8") == "mine"
    assert (out / "audio.wav").exists()


def test_an_interrupted_output_can_be_replaced(tmp_path):
    first = OutputFolder(tmp_path / "out", "run")
    first.file("deep/half.wav").write_text("half", encoding="utf-8")
    second = OutputFolder(tmp_path / "out", "run", overwrite=True)
    assert (tmp_path / "out" / "deep" / "half.wav").exists()  # nothing is removed before something is written
    second.file("whole.wav").touch()
    second.finish({})
    assert not (tmp_path / "out" / "deep").exists()
    with pytest.raises(FolderInUse, match="is no former output folder of `aiba demo`"):
        OutputFolder(tmp_path / "out", "demo", overwrite=True)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FolderInUse, match="out is a file"):
        OutputFolder(tmp_path / "out", "run", overwrite=True)


def test_undefined_numbers_are_null_and_empty(tmp_path):
    values = {"a": float("nan"), "b": np.float32(0.5), "c": [np.int64(2), float("inf")], "d": tmp_path}
    assert json.loads(dump_json(values)) == {"a": None, "b": 0.5, "c": [2, None], "d": str(tmp_path)}
    write_csv(tmp_path / "t.csv", [{"a": float("nan"), "b": 1}, {"c": "x,y"}])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines() == ["a,b,c", ",1,", ',,"x,y"']
