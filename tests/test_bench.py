"""Benchmarks: what they count is exact, what they refuse says why, and what the page shows was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from aiba_eval.bench import growth, models, peers, results, startup, suite
from aiba_eval.bench import race as racing
from aiba_eval.bench.contestants import Contestant, Refused, contestants
from aiba_eval.bench.memory import Memory, measured
from aiba_eval.bench.race import Round, race, summary
from aiba_eval.bench.subjects import BenchBackbone, CannotBench, Setting, Subject
from aiba_eval.cli.app import app
from aiba_hooks import capture

ROOT = Path(__file__).resolve().parents[1]
DIT = Setting("stable-audio-small", seconds=1.0, tokens=16)
UNET = Setting("audioldm2-small", seconds=0.64)


@pytest.fixture(scope="module")
def dit():
    return Subject(DIT)


@pytest.fixture(scope="module")
def unet():
    return Subject(UNET)


@pytest.fixture(scope="module")
def raced(dit):
    return race(dit, ["words", "words-reduced", "tokens", "paper", "paper-all"], rounds=2, steps=3)


# ---- subjects


@pytest.mark.parametrize("name", ["audioldm2", "stable-audio", "stable-diffusion"])
def test_full_size_models_have_the_published_sizes(name):
    subject = Subject(Setting(name, device="meta"))
    parameters = sum(parameter.numel() for parameter in subject.denoiser.parameters())
    assert round(parameters / 1e6) == {"audioldm2": 347, "stable-audio": 1057, "stable-diffusion": 860}[name]


def test_a_subject_is_the_same_at_every_build(dit):
    again = Subject(DIT)
    assert torch.equal(dit.forward(0), again.forward(0))
    assert not torch.equal(dit.forward(0), dit.forward(1))


def test_the_forward_gives_the_shape_of_its_latent(dit, unet):
    assert tuple(dit.forward(0).shape) == (2, 64, 22)
    assert tuple(unet.forward(0).shape) == (2, 8, 16, 16)


def test_lengths_are_rounded_as_pipelines_do():
    audioldm2, stable_audio = models.ARCHITECTURES["audioldm2"], models.ARCHITECTURES["stable-audio"]
    assert models.columns_of(audioldm2, 10.24) == 256
    assert models.columns_of(audioldm2, 8.0) == 200
    assert models.columns_of(stable_audio, stable_audio.seconds) == 1024


def test_a_batch_is_guided_where_it_is_even():
    assert Subject(Setting("audioldm2-small", seconds=0.64, batch=2, device="meta")).guided
    assert not Subject(Setting("audioldm2-small", seconds=0.64, batch=1, device="meta")).guided


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_words_are_captured_at_any_batch(batch):
    subject = Subject(Setting("stable-audio-small", seconds=0.5, tokens=16, batch=batch))
    with capture(subject, words=subject.asked, backbone=BenchBackbone()) as cap:
        subject.encode()
        subject.forward(0)
    array = cap.maps["transformer_blocks.0.attn2"]
    assert array.sizes["time"] == subject.shape.columns
    assert np.allclose(array.sum("word"), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (Setting("no-such"), "audioldm2, stable-audio"),
        (Setting("audioldm2-small", words=16), "16 words do not fit in 16 tokens"),
        (Setting("audioldm2-small", batch=0), "at least 1"),
        (Setting("stable-audio-small", seconds=0.0), "length must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, said):
    with pytest.raises(CannotBench, match=said):
        Subject(setting)


# ---- memory


def test_memory_is_counted_exactly():
    def work():
        kept = torch.zeros(1000, 250)  # 1 MB
        return (kept + 1) @ torch.ones(250, 1), kept  # 1 MB more for the sum, little for the rest

    (product, kept), memory = measured(work)
    assert memory.host_held == (product.numel() + kept.numel()) * 4
    assert 2_000_000 < memory.host_peak <= 2_000_000 + 1000 + 4000 + 64


def test_work_that_keeps_nothing_holds_nothing():
    _, memory = measured(lambda: float(torch.zeros(1000).sum()))
    assert memory.host_held == 0
    assert memory.host_peak >= 4000


def test_memory_beyond_another():
    assert Memory(10, 4, 3, 2).beyond(Memory(6, 4, 1, 0)) == Memory(4, 0, 2, 2)


# ---- contestants


def test_capture_moves_no_output_and_the_paper_only_its_rounding(dit):
    plain = dit.forward(0)
    for name in ("words", "tokens", "all", "paper", "paper-all"):
        with contestants()[name].watch(dit):
            dit.encode()
            seen = dit.forward(0)
        if name.startswith("paper"):
            assert torch.allclose(seen, plain, atol=1e-4)
        else:
            assert torch.equal(seen, plain), name
    assert torch.equal(dit.forward(0), plain)  # and everyone puts back what they replaced


def test_the_paper_and_our_full_maps_are_the_same_numbers(unet):
    """Two ways that share no code: softmax written out, and the kernel asked again."""
    with contestants()["paper"].watch(unet) as watch:
        unet.forward(0)
    theirs = watch.read()
    with capture(unet, keep="full", backbone=BenchBackbone()) as cap:
        unet.encode()
        unet.forward(0)
    assert set(cap.maps) == set(theirs)
    assert (
        len(theirs) == 32
    )  # of three transformers at 16 positions, one reads the text and one the generated embeddings
    for site, array in cap.maps.items():
        conditional = theirs[site][0, 1]  # of the first step, the second row
        rows = array.transpose(..., "time", "frequency", "key").values.reshape(conditional.shape)
        assert np.allclose(rows, conditional, atol=1e-5), site


def test_the_paper_sees_every_attention_where_it_is_asked_to(unet):
    with contestants()["paper-all"].watch(unet) as watch:
        unet.forward(0)
    assert len(watch.read()) == 96
    assert all(np.allclose(maps.sum(-1), 1, atol=1e-4) for maps in watch.read().values())


def test_rotary_embeddings_reach_the_models_own_processor(dit):
    """diffusers drops what a processor's signature does not name, and says so in a log only."""
    seen = []
    module = dict(dit.denoiser.named_modules())["transformer_blocks.0.attn1"]
    inner = module.processor

    def spy(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        seen.append(rotary_emb is not None)
        return inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    module.set_processor(spy)
    try:
        with contestants()["paper-all"].watch(dit):
            dit.forward(0)
    finally:
        module.set_processor(inner)
    assert seen == [True]


def test_libraries_that_are_not_installed_are_named(dit, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    result = race(dit, ["daam", "amd-fast"], rounds=1, steps=2)
    rows = {row["contestant"]: row for row in summary(result)}
    assert rows["daam"]["not_run"] == "not installed: pip install daam"
    assert "attention-map-diffusers" in rows["amd-fast"]["not_run"]


def test_a_library_that_lacks_one_of_its_own_is_told_apart(dit, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'spacy'", name="spacy")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    with pytest.raises(Refused, match="daam needs spacy"), contestants()["daam"].watch(dit):
        pass


def test_a_library_that_fails_on_the_model_is_told_and_ours_is_not_hidden(dit, monkeypatch):
    def broken(subject):
        raise TypeError("no such layer")

    foreign = Contestant("other", "", broken, foreign=True)
    own = Contestant("own", "", broken)
    monkeypatch.setattr(racing, "contestants", lambda: {**contestants(), "other": foreign, "own": own})
    rows = summary(race(dit, ["other"], rounds=1, steps=2))
    assert rows[1]["not_run"] == "TypeError: no such layer"
    with pytest.raises(TypeError, match="no such layer"):
        race(dit, ["own"], rounds=1, steps=2)


def test_a_library_that_records_nothing_did_not_run(unet, monkeypatch):
    class Trace:
        all_heat_maps = ()

        def __init__(self, pipeline):
            self.pipeline = pipeline

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(peers, "_library", lambda *names: types.SimpleNamespace(trace=Trace))
    rows = summary(race(unet, ["daam"], rounds=1, steps=2))
    assert rows[1]["not_run"] == "it ran and recorded nothing"


# ---- races


def test_everyone_runs_every_round_and_the_bare_model_is_first(raced):
    assert raced.entries[0].contestant.name == "bare"
    assert {len(entry.rounds) for entry in raced.entries} == {2}
    for entry in raced.entries:
        for one in entry.rounds:
            assert 0 < one.forward < one.whole
            assert one.first < one.whole
            assert one.whole == pytest.approx(one.enter + one.first + 2 * one.forward + one.read)


def test_retained_memory_is_the_maps_and_little_else(raced, dit):
    """Exact: two blocks, three steps, 22 columns (23 queries), 3 groups besides the 2 words."""
    rows = {row["contestant"]: row for row in summary(raced)}
    queries, keys, steps, blocks = 23, 18, 3, 2
    paper = 4 * 2 * queries * keys * blocks * steps
    assert rows["paper"]["memory"]["host_held"] == paper
    assert rows["paper"]["maps"] == paper
    assert rows["paper-all"]["memory"]["host_held"] == paper + 4 * 2 * queries * queries * blocks * steps
    columns = 2 + len(["(other)", "(special)", "(padding)", "(duration)"])
    words = 4 * queries * columns * blocks * steps
    assert rows["words"]["maps"] == 4 * (queries - 1) * columns * blocks * steps
    assert words <= rows["words"]["memory"]["host_held"]
    assert rows["words-reduced"]["maps"] == rows["words"]["maps"] / steps
    assert rows["words-reduced"]["memory"]["host_held"] < rows["words"]["memory"]["host_held"]
    assert rows["tokens"]["maps"] == 4 * (queries - 1) * keys * blocks * steps
    assert raced.full == {"cross": 4 * 2 * 6 * queries * keys * blocks, "self": 4 * 2 * 6 * queries * queries * blocks}


def test_ratios_are_paired_within_rounds(raced):
    """A slow round is slow for all: the ratio of each round counts, not the ratio of medians."""
    bare, words = raced.entries[0], raced.entries[1]

    def rounds(factor):
        return [Round(0, 1, one * factor, 0, one, one * factor, one) for one in (1.0, 10.0, 2.0)]

    slow, fast = rounds(1), rounds(1.5)
    made = racing.Race(
        raced.subject,
        3,
        [racing.Entry(bare.contestant, None, slow), racing.Entry(words.contestant, None, fast, Memory(0, 0))],
        {},
        Memory(0, 0),
    )
    row = summary(made)[1]
    assert row["forward_ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert row["forward"]["median"] == 3.0


def test_spread_is_median_and_quartiles():
    assert racing.spread([5, 1, 2, 3, 4]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize(
    ("options", "said"), [({"rounds": 0}, "0 rounds"), ({"steps": 1}, "1 steps"), ({"chosen": ["wrods"]}, "'wrods'")]
)
def test_races_that_cannot_be_run_are_refused(dit, options, said):
    with pytest.raises(CannotBench, match=said):
        race(dit, **{"chosen": ["words"], "rounds": 1, "steps": 2, **options})


# ---- start-up


def test_entering_is_timed_without_weights():
    subject = Subject(Setting("stable-audio-small", device="meta"))
    seconds = startup.enter_seconds(subject, repeats=2)
    assert len(seconds) == 2
    assert all(0 < passed < 30 and 0 < busy < 30 for passed, busy in seconds)
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "aiba_hooks.interception"


# ---- results


def test_the_document_names_machine_and_versions(raced):
    document = results.document([raced], rounds=2, before=results.machine())
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["threads"] == torch.get_num_threads()
    text = results.markdown(json.loads(json.dumps(document)))
    assert f"torch {torch.__version__}" in text
    assert "stable-audio-small" in text and "float32" in text and "batch 2" in text
    rows = [line for line in text.splitlines() if line.startswith("| words |")]
    assert len(rows) == 1
    assert rows[0].count("|") == len(results.HEADINGS) + 1


def test_a_contestant_that_did_not_run_has_its_reason_in_the_table():
    row = {"contestant": "daam", "keeps": "", "not_run": "not installed: pip install daam"}
    race_row = {"setting": {"device": "cpu"}}
    assert results.cells(race_row, row)[:2] == ["daam", "not run: not installed: pip install daam"]
    assert len(results.cells(race_row, row)) == len(results.HEADINGS)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (-(2**21), "−2 MiB"), (5 * 2**30, "5 GiB")]
)
def test_sizes_as_people_read_them(count, shown):
    assert results.size(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.00123, "1.23 ms"), (12.44, "12.4 s"), (0.5, "500 ms")])
def test_times_as_people_read_them(seconds, shown):
    assert results.duration(seconds) == shown
    assert results.duration(0.18, 2) == "180 ms"


def test_a_shared_machine_is_named(raced):
    document = results.document([raced], rounds=2, before=results.machine())
    idle = {**document["machine"], "cores": 4, "load": 0.5, "load_after": 1.0}
    assert "shared" not in results.markdown({**document, "machine": idle})
    assert "The machine was shared" in results.markdown({**document, "machine": {**idle, "load": 7.5}})


# ---- growth


@pytest.fixture(scope="module")
def grown():
    axes = {"words": (2, 4), "tokens": (64,), "steps": (6,), "length": (2,), "batch": (4,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "BASE", {"words": 2, "tokens": 16, "steps": 2, "length": 1, "batch": 2})
        return growth.grow("stable-audio-small", axes, rounds=1)


def rows_at(grown, axis, curve="words"):
    return [row for row in grown if (row["axis"], row["curve"]) == (axis, curve)]


def test_memory_grows_with_queries_words_and_steps_and_not_with_keys(grown):
    base, four = (row["maps"] for row in rows_at(grown, "words"))
    groups = 4  # (other), (special), (padding), (duration); 12 words in 16 tokens leave 3 of padding
    assert four / base == pytest.approx((4 + groups) / (2 + groups))
    moved = {axis: rows_at(grown, axis)[0]["maps"] / base for axis in ("tokens", "steps", "length", "batch")}
    assert moved == pytest.approx({"tokens": 1, "steps": 3, "length": 43 / 22, "batch": 2})


def test_what_is_held_beside_maps_is_one_selector(grown):
    base, more = rows_at(grown, "words")[0], rows_at(grown, "tokens")[0]
    columns = 2 + 4 + 1  # words, groups, and the sum of all keys
    assert 0 < more["held"] - base["held"] <= 2 * (64 - 16) * columns * 4 * 1.1


def test_averaged_steps_hold_the_same_whatever_their_number(grown):
    base, more = rows_at(grown, "words", "words-reduced")[0], rows_at(grown, "steps", "words-reduced")[0]
    assert base["maps"] == more["maps"]
    assert 0 <= more["held"] - base["held"] <= 4 * 16  # a timestep for each of four more steps


def test_the_figure_has_a_column_for_each_axis(grown, tmp_path):
    growth.figure(grown, tmp_path / "growth.png", "title")
    made = (tmp_path / "growth.png").read_bytes()
    assert made.startswith(b"\x89PNG")
    width, height = int.from_bytes(made[16:20], "big"), int.from_bytes(made[20:24], "big")
    assert width == pytest.approx(5 * 3.1 * 110, abs=2)
    assert height == pytest.approx(5.6 * 110, abs=2)


def test_growth_refuses_an_axis_that_there_is_not():
    with pytest.raises(CannotBench, match="no axis 'layers'"):
        growth.grow("stable-audio-small", {"layers": (1,)})


def test_every_value_of_the_axes_fits():
    for axis, values in growth.AXES.items():
        for value in values:
            setting, steps = growth.setting_at("stable-audio-small", axis, value)
            assert steps >= 2
            assert setting.words <= (setting.tokens or 0) - 1


# ---- the command


def aiba(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def quick(monkeypatch):
    """Start-up is measured in fresh processes, which takes seconds: here one is enough."""
    measured = startup.startup
    monkeypatch.setattr(suite, "startup", lambda model, **options: measured(model, repeats=1, **options))


def test_the_command_writes_and_prints(tmp_path, quick):
    out = tmp_path / "bench"
    arguments = ["bench", "--model", "stable-audio-small", "--contestant", "words", "--length", 1, "--tokens", 16]
    arguments += ["--rounds", 1, "--steps", 2, "--threads", 1, "--device", "cpu", "--out", out]
    printed, progress = aiba(*arguments)
    assert "with reading" in printed and "words" in printed and "importing capture, beyond torch" in printed
    assert "rounds" in progress
    document = json.loads((out / "results.json").read_text())
    assert [row["contestant"] for row in document["races"][0]["contestants"]] == ["bare", "words"]
    assert 0 < document["startup"]["import"]["median"] < 60
    assert (out / "table.md").read_text() == results.markdown(document)
    _, said = aiba(*arguments, code=2)
    assert "--overwrite" in said
    printed, _ = aiba(*arguments, "--overwrite", "--json")
    assert json.loads(printed)["races"][0]["model"] == "stable-audio-small"


def test_the_command_measures_growth(tmp_path, monkeypatch):
    monkeypatch.setitem(growth.AXES, "words", (1, 2))
    monkeypatch.setattr(growth, "BASE", {**growth.BASE, "tokens": 16, "length": 1, "steps": 2})
    out = tmp_path / "growth"
    printed, _ = aiba("bench", "--growth", "--axis", "words", "--rounds", 1, "--device", "cpu", "--out", out)
    assert "averaged" in printed
    document = json.loads((out / "growth.json").read_text())
    assert {row["value"] for row in document["rows"]} == {1, 2}
    assert (out / "growth.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "audioldm3"], "audioldm3"),
        (["--contestant", "nobody"], "nobody"),
        (["--growth", "--model", "audioldm2", "--model", "stable-audio"], "one model"),
        (["--growth", "--axis", "colour"], "colour"),
        (["--device", "tpu"], "cpu or cuda"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_builds_anything(arguments, said, tmp_path):
    out = tmp_path / "bench"
    _, stderr = aiba("bench", "--out", out, *arguments, code=2)
    assert said in stderr
    assert not out.exists()


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(CannotBench, match="sees no GPU"):
        suite.place("cuda", "auto")
    assert suite.place("auto", "auto") == ("cpu", "float32")


def test_the_command_help_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from aiba_eval.cli.app import app; "
        "CliRunner().invoke(app, ['bench', '--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the page


def page_script():
    path = ROOT / "examples" / "benchmarks" / "performance_page.py"
    spec = importlib.util.spec_from_file_location("performance_page", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_shows_what_was_measured():
    """Every table of the page is what the document beside it renders to, and every document has its place."""
    script = page_script()
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    documents = {file.stem: json.loads(file.read_text()) for file in (ROOT / "docs" / "measurements").glob("*.json")}
    assert documents
    for name, document in documents.items():
        assert script.marked(page, name).group() == script.rendered(document, name), name
    filled = re.findall(r"<!-- measured: (\S+) -->\n(?!<!-- end -->)", page)
    assert set(filled) == set(documents)


def test_the_page_is_written_by_its_script(tmp_path, raced, grown):
    script = page_script()
    docs, out = tmp_path / "docs", tmp_path / "out"
    for folder in (docs / "images", out / "race", out / "grown"):
        folder.mkdir(parents=True)
    markers = "<!-- measured: cpu -->\nold\n<!-- end -->\n\n<!-- measured: growth -->\n<!-- end -->\n"
    (docs / "performance.md").write_text(f"# Page\n\n{markers}\nrest\n")
    document = results.document([raced], rounds=2, before=results.machine())
    (out / "race" / "results.json").write_text(json.dumps(document))
    growth.figure(grown, out / "grown" / "growth.png")
    kept = {**document, "races": None, "model": "m", "summary": "s", "device": "cpu", "dtype": "float32"}
    del kept["races"]
    (out / "grown" / "growth.json").write_text(json.dumps({**kept, "base": growth.BASE, "rows": grown}))
    script.main([f"cpu={out / 'race'}", f"growth={out / 'grown'}"], docs)
    page = (docs / "performance.md").read_text()
    assert "old" not in page and page.endswith("\nrest\n")
    assert results.markdown(document) in page
    assert (docs / "images" / "growth.png").exists() and "images/growth.png" in page
    assert json.loads((docs / "measurements" / "cpu.json").read_text()) == json.loads(json.dumps(document))
    with pytest.raises(ValueError, match="no marker '<!-- measured: gpu -->'"):
        script.main([f"gpu={out / 'race'}"], docs)
