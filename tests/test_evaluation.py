"""Evaluations: what a run holds, that it goes on after anything, that workers change nothing, bad input."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from aiba_eval.datasets import freedoom_root, slakh
from aiba_eval.evaluation import (
    ABLATIONS,
    CannotEvaluate,
    Configuration,
    DiskFull,
    NotARun,
    Run,
    Variant,
    evaluate,
    evaluate_on,
    executing,
    items,
    running,
    weights,
)
from aiba_eval.evaluation.reproduce import PUBLISHED, reproduce
from aiba_eval.evaluation.workshop import Source, Workshop, item_id
from aiba_eval.loading import load
from aiba_eval.metrics import METRICS, average_precision
from aiba_eval.outputs import FolderInUse
from aiba_eval.references import oracle_projection
from aiba_eval.scoring import REFERENCES

QUICK = Configuration(seconds=2.56, timesteps=(800,), draws=1, resamples=99, metrics=("average_precision",))
#: ablations that differ in what is captured or how it is aggregated
TRIED = {
    name: ABLATIONS[name] for name in ("all attention", "pooling max", "spatial topk", "steps late", "layers fitted")
}
#: files that hold results; the manifest lists what failed on the way
RESULTS = ("results.parquet", "summary.json")


@pytest.fixture(scope="module")
def unet():
    return load("demo:unet", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pieces():
    return slakh.pieces(freedoom_root(), "test")


def changed(configuration: Configuration, **values: object) -> Configuration:
    return Configuration(**{**vars(configuration), **values})


@pytest.fixture(scope="module")
def whole(unet, pieces, tmp_path_factory) -> Run:
    """A run with everything in it."""
    config = changed(
        QUICK,
        metrics=METRICS,
        variants={"default": Variant(), **TRIED, "nowhere": Variant(layers=("*.nosuchlayer.*",))},
        prompt_swap=True,
        absent=True,
        neutral=True,
        noise_seeds=1,
        reinitialisations=2,
    )
    out = tmp_path_factory.mktemp("whole") / "run"
    return evaluate(unet, pieces[:3], config, validation=pieces[4:6], out=out)


# ---- what a run holds


def test_a_run_has_its_items_with_maps_targets_and_audio(whole, pieces):
    assert whole.complete
    assert not whole.record["failed"]
    assert [item.piece for item in whole.items] == [piece.name for piece in pieces[:3]]
    for item in whole.items:
        arrays = item.fields
        assert arrays["projected"].dims == ("variant", "level", "word", "time", "mel")
        assert list(arrays["word"].values) == list(item.words)
        assert list(arrays["level"].values) == [800]
        assert list(arrays["variant"].values) == ["default", *TRIED, "nowhere"]
        assert {"dominance", "energy", "share"} <= set(arrays["target"].values)
        assert all(word in item.prompt for word in item.words)
        samples, rate = item.audio
        assert rate == 16_000
        assert len(samples) == round(2.56 * rate)
        assert item.maps
        assert item.diagnosis["findings"]
    assert whole.item(whole.items[1].id).path == whole.items[1].path
    with pytest.raises(KeyError, match="no item 'x'"):
        whole.item("x")


def test_projected_maps_and_targets_are_those_that_the_functions_make(whole, unet, pieces):
    item = whole.items[0]
    given = items.material(pieces[0], 0, QUICK)
    assert given.words == item.words
    arrays = item.fields.load()
    for word in item.words:
        np.testing.assert_array_equal(
            arrays["truth"].sel(target="dominance", word=word).values > 0.5, given.truth.masks["dominance"][word]
        )
    rows = whole.scores()
    for row in rows[(rows.item == item.id) & (rows.condition == "own") & (rows.target == "dominance")].itertuples():
        if row.metric != "average_precision":
            continue
        mask = given.truth.masks["dominance"][row.word]
        own = arrays["projected"].sel(variant=row.variant, level=row.level, word=row.word).values
        if not np.isfinite(own).all():
            assert row.variant == "nowhere"
            assert row.reason
            continue
        assert row.value == pytest.approx(average_precision(own, mask))
        assert row.chance == pytest.approx(mask.mean())  # the closed form
        columns, bands = arrays.attrs["finest_lattice"]
        assert row.oracle_projection == pytest.approx(
            average_precision(oracle_projection(mask, (columns, bands)), mask)
        )
        others = [
            average_precision(arrays["projected"].sel(variant=row.variant, level=row.level, word=word).values, mask)
            for word in item.words
            if word != row.word
        ]
        assert row.other_word == pytest.approx(np.mean(others))


def test_scores_have_every_variant_target_metric_and_reference(whole):
    rows = whole.scores()
    own = rows[rows.condition == "own"]
    assert set(own.variant) == {"default", *TRIED, "nowhere"}
    assert set(METRICS) | {"share_spearman"} == set(own[own.variant == "default"].metric)
    assert set(REFERENCES) < set(rows.columns)
    finite = own[(own.variant == "default") & (own.target == "dominance") & (own.metric == "average_precision")]
    assert np.isfinite(finite[["chance", "mix_energy", "oracle_projection", "other_word", "time_shift"]]).all(axis=None)
    assert set(rows.condition) == {"own", "prompt_swap", "seed-1", "fresh-0", "fresh-1"}
    assert (own[own.variant == "nowhere"].value.isna()).all()
    assert any("nowhere" in note for note in whole.record["notes"])


def test_mix_energy_has_no_word_swap_and_fresh_weights_have_their_own_rows(whole):
    contrasts = {(row["map"], row["target"], row["contrast"]): row for row in whole.contrasts()}
    assert contrasts["mix_energy", "dominance", "word_swap"]["value"] == 0
    assert contrasts["oracle_projection", "dominance", "word_swap"]["value"] > 0.2
    names = {(row["name"], row["measure"]) for row in whole.controls()}
    assert {("prompt_swap", "score"), ("seed_variance", "word_swap"), ("reinitialised", "piece_swap")} <= names
    assert {name for name, _ in names} >= {"absent_instrument", "neutral_edit"}
    rows = whole.scores()
    values = rows.groupby("condition").value.apply(lambda v: tuple(v.round(6)))
    assert values["fresh-0"] != values["fresh-1"]


def test_fitted_layer_weights_are_nonnegative_and_sum_to_one(whole):
    fitted = json.loads((whole.path / "layer-weights.json").read_text())
    assert set(fitted) == set(whole.items[0].maps)
    assert min(fitted.values()) >= 0
    assert sum(fitted.values()) == pytest.approx(1)


def test_layer_weights_are_found_again():
    rng = np.random.default_rng(0)
    maps, wanted = rng.random((3, 400)), np.array([0.5, 0.0, 2.0])
    centred = maps - maps.mean(axis=1, keepdims=True)
    target = wanted @ centred
    piece = {"sites": ["a", "b", "c"], "gram": (centred @ centred.T).tolist(), "moment": (centred @ target).tolist()}
    found = weights.fit([piece, piece])
    assert list(found.values()) == pytest.approx([0.2, 0.0, 0.8], abs=1e-6)
    nothing = {"sites": ["a", "b"], "gram": np.eye(2).tolist(), "moment": [-1.0, -1.0]}
    assert weights.fit([nothing]) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="same sites"):
        weights.fit([piece, nothing])


def test_the_papers_protocol(unet, pieces, tmp_path):
    config = Configuration("generate", words=("bass", "drums"), seconds=2.56, steps=3, seeds=(0, 1), resamples=99)
    run = evaluate(unet, pieces[:3], config, out=tmp_path / "run")
    assert {item.id: (item.piece, item.words) for item in run.items} == {
        "bass-0": ("seed-0", ("bass",)),
        "drums-0": ("seed-0", ("drums",)),
        "bass-1": ("seed-1", ("bass",)),
        "drums-1": ("seed-1", ("drums",)),
    }
    assert {"band:paper", "band:measured", "profile"} <= set(run.scores().target)
    bass = run.item("bass-0")
    assert bass.prompt == "a solo bass"
    assert len(bass.audio[0]) / bass.audio[1] == pytest.approx(2.56, abs=0.1)
    row = run.scores().query("item == 'bass-0' and target == 'band:measured' and metric == 'average_precision'").iloc[0]
    mask = bass.fields["truth"].sel(target="band:measured", word="bass").values > 0.5
    other = run.item("drums-0").fields["projected"].sel(variant="default", level=0, word="drums").values
    assert row.other_word == pytest.approx(average_precision(other, mask))


# ---- going on


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "evaluate.json"}


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(unet, pieces, tmp_path):
    config = changed(QUICK, noise_seeds=1)
    started = time.monotonic()
    evaluate(unet, pieces[:4], config, out=tmp_path / "once")
    took = time.monotonic() - started
    rng, killed = random.Random(0), 0
    while killed < 10:
        child = os.fork()
        if child == 0:  # the model is in memory already: only the run is killed
            try:
                evaluate(unet, pieces[:4], config, out=tmp_path / "often")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.1, 0.35) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
    run = evaluate(unet, pieces[:4], config, out=tmp_path / "often")
    assert run.complete
    assert snapshot(tmp_path / "often") == snapshot(tmp_path / "once")


def test_nothing_is_done_twice(unet, pieces, tmp_path, monkeypatch):
    done: list[str] = []
    perform = Workshop._make
    monkeypatch.setattr(
        Workshop, "_make", lambda self, c, name, path: (done.append(f"{c}/{name}"), perform(self, c, name, path))
    )
    evaluate(unet, pieces[:2], QUICK, out=tmp_path / "run")
    assert len(done) == len(set(done)) == 4
    before = snapshot(tmp_path / "run")
    evaluate(unet, pieces[:2], QUICK, out=tmp_path / "run")
    assert len(done) == 4
    more = evaluate(unet, pieces[:2], changed(QUICK, noise_seeds=1), out=tmp_path / "run")  # asked for a control later
    assert {name.split("/")[0] for name in done[4:]} == {"seed-1"}
    assert "seed-1" in set(more.scores().condition)
    assert {
        name: data for name, data in snapshot(tmp_path / "run").items() if name in before and name not in RESULTS
    } == {name: data for name, data in before.items() if name not in RESULTS}


def test_a_full_disk_ends_with_a_message_and_loses_nothing(unet, pieces, tmp_path, monkeypatch):
    write, written = items.write_item, []

    def full(path, *args, **kwargs):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, *args, **kwargs)

    monkeypatch.setattr(items, "write_item", full)
    with pytest.raises(DiskFull, match=r"no room left in .*1 of 2 tasks of 'probing' are kept.*same command again"):
        evaluate(unet, pieces[:2], QUICK, out=tmp_path / "run")
    assert not Run.open(tmp_path / "run").complete
    with pytest.raises(NotARun, match="not complete"):
        Run.open(tmp_path / "run").scores()
    monkeypatch.undo()
    evaluate(unet, pieces[:2], QUICK, out=tmp_path / "run")
    evaluate(unet, pieces[:2], QUICK, out=tmp_path / "other")
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "other")


def test_an_item_that_fails_is_counted_and_tried_again(unet, pieces, tmp_path, monkeypatch):
    probed, calls = items.probed, []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a bolt from the blue")
        return probed(*args, **kwargs)

    monkeypatch.setattr(items, "probed", broken)
    run = evaluate(unet, pieces[:3], QUICK, out=tmp_path / "run")
    second = item_id(pieces[1].name, 0)
    assert run.record["failed"] == {f"own/{second}": "RuntimeError: a bolt from the blue"}
    assert len(run.items) == 2
    assert any("1 tasks failed" in note for note in run.record["notes"])
    run = evaluate(unet, pieces[:3], QUICK, out=tmp_path / "run")
    assert not run.record["failed"]
    assert len(run.items) == 3
    monkeypatch.undo()
    evaluate(unet, pieces[:3], QUICK, out=tmp_path / "smooth")
    # the others' scores are beside the third's maps, too
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "smooth")


def test_a_damaged_piece_is_skipped_with_its_reason(unet, pieces, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(freedoom_root(), root)
    copies = slakh.pieces(root, "test")[:3]
    stem = copies[1].stems[0].path
    stem.write_bytes(b"fLaC" + bytes(200))
    run = evaluate(unet, copies, QUICK, out=tmp_path / "run")
    assert len(run.items) == 2
    (reason,) = run.record["skipped"].values()
    assert stem.name in reason
    assert any("1 items were left out" in note for note in run.record["notes"])


@pytest.mark.slow
def test_workers_give_the_same_bytes(pieces, tmp_path):
    pytest.importorskip("distributed")
    here = evaluate("demo:unet", pieces[:3], QUICK, out=tmp_path / "here", device="cpu")
    there = evaluate("demo:unet", pieces[:3], QUICK, out=tmp_path / "there", device="cpu", dask="local:2")
    assert there.complete
    assert not there.record["failed"]
    assert snapshot(here.path) == snapshot(there.path)


def test_a_worker_that_stays_follows_each_run(pieces, tmp_path, monkeypatch):
    """A worker of a cluster outlives a run; one that asks more of the same folder must not get the first one's configuration."""
    used: list[Workshop] = []
    monkeypatch.setattr(executing, "attempt", lambda workshop, task: used.append(workshop))
    source = Source("demo:unet", "cpu", "float32")

    def in_use(workshop):
        workshop.loaded = threading.Lock()  # as a model, it cannot be pickled
        return workshop

    first, second = (
        pickle.loads(pickle.dumps(in_use(Workshop(tmp_path, config, source, pieces[:1]))))
        for config in (QUICK, changed(QUICK, noise_seeds=1))
    )
    for sent in (first, first, second):
        executing._attempt_there(sent, "own/a")
    assert used[0] is used[1]
    assert not any("loaded" in vars(workshop) for workshop in used)
    assert [workshop.configuration.noise_seeds for workshop in used] == [0, 0, 1]


# ---- bad input


def test_what_cannot_be_evaluated(unet, pieces, tmp_path):
    with pytest.raises(CannotEvaluate, match="'probe' or 'generate', got 'listen'"):
        Configuration("listen")
    with pytest.raises(CannotEvaluate, match="draws"):
        Configuration(draws=0)
    with pytest.raises(CannotEvaluate, match="each once"):
        Configuration(timesteps=(300, 300))
    with pytest.raises(CannotEvaluate, match="average_precision among them"):
        Configuration(metrics=("iou",))
    with pytest.raises(CannotEvaluate, match="controls of real audio"):
        Configuration("generate", absent=True)
    with pytest.raises(CannotEvaluate, match="first variant"):
        Configuration(variants={"late": Variant(steps="late")})
    with pytest.raises(CannotEvaluate, match="pooling is one of"):
        Variant(pooling="median")
    with pytest.raises(CannotEvaluate, match="'colour=red' is no part"):
        Variant.parse("colour=red")
    assert Variant.parse("pooling=max, layers=up*|mid*, top_k=3") == Variant(
        pooling="max", layers=("up*", "mid*"), top_k=3
    )
    fitted = changed(QUICK, variants={"default": Variant(), "fitted": Variant(layer_weights="fitted")})
    with pytest.raises(CannotEvaluate, match="validation"):
        evaluate(unet, pieces[:2], fitted, out=tmp_path / "a")
    with pytest.raises(CannotEvaluate, match="two pieces are called"):
        evaluate(unet, [pieces[0], pieces[0]], QUICK, out=tmp_path / "a")
    with pytest.raises(CannotEvaluate, match="no pieces"):
        evaluate(unet, [], QUICK, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(CannotEvaluate, match="shorter than a window of 60 s"):
        evaluate(unet, pieces[:2], changed(QUICK, seconds=60.0), out=tmp_path / "b")
    with pytest.raises(CannotEvaluate, match="has no band"):
        evaluate(unet, pieces[:2], Configuration("generate", words=("kazoo",)), out=tmp_path / "c")
    with pytest.raises(CannotEvaluate, match="no dataset 'nosuch'"):
        evaluate_on(unet, QUICK, dataset="nosuch")
    with pytest.raises(CannotEvaluate, match="not travel"):
        evaluate(unet.pipeline, pieces[:2], QUICK, out=tmp_path / "d", dask="local:1")
    with pytest.raises(CannotEvaluate, match="local:N"):
        evaluate("demo:unet", pieces[:2], QUICK, out=tmp_path / "e", dask="local:many", device="cpu")


def test_a_dataset_without_splits_is_taken_whole(unet, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        running, "evaluate", lambda model, pieces, configuration, **options: given.update(options, pieces=pieces)
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for stem in ("bass", "drums"):
            soundfile.write(tmp_path / name / f"{stem}.wav", np.full(16000, 0.1), 16000)
    evaluate_on(unet, QUICK, dataset="stem-folder", root=tmp_path)
    assert [piece.name for piece in given["pieces"]] == ["a", "b"]
    assert given["training"] is None
    assert given["validation"] == ()
    with pytest.raises(CannotEvaluate, match="no split 'night'; it has no splits"):
        evaluate_on(unet, QUICK, dataset="stem-folder", root=tmp_path, split="night")
    with pytest.raises(CannotEvaluate, match="no split 'night'; it has validation, test"):
        evaluate_on(unet, QUICK, dataset="slakh", split="night")


def test_other_folders_are_left_alone(unet, pieces, tmp_path):
    with pytest.raises(NotARun, match="give a folder that `aiba evaluate` wrote"):
        Run.open(tmp_path)
    (tmp_path / "evaluate.json").write_text("[]")
    with pytest.raises(NotARun, match="no manifest"):
        Run.open(tmp_path)
    with pytest.raises(FolderInUse, match="not empty"):
        evaluate(unet, pieces[:2], QUICK, out=tmp_path)
    evaluate(unet, pieces[:2], QUICK, out=tmp_path / "run")
    with pytest.raises(FolderInUse, match="draws"):
        evaluate(unet, pieces[:2], changed(QUICK, draws=2), out=tmp_path / "run")


def test_disk_errors_are_found_behind_others():
    def nested() -> BaseException:
        try:
            try:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            except OSError as error:
                raise RuntimeError("while writing") from error
        except RuntimeError as error:
            return error

    assert executing._full(nested())
    assert not executing._full(OSError(errno.EACCES, "Permission denied"))


def test_item_names_are_file_names_and_stay_apart():
    assert item_id("Track00001", 0) == "Track00001-0"
    odd = [item_id(name, 0) for name in ("A - B", "A_-_B", "Ä - B", "../A", "x" * 300 + "é")]
    assert len(set(odd)) == len(odd)
    assert all("/" not in name and len(name) < 100 for name in odd)


# ---- the command


def test_the_command_and_published_protocols(tmp_path):
    from aiba_eval.cli.app import app

    runner = CliRunner()
    options = ["--pieces", "2", "--seconds", "2.56", "--draws", "1", "--metric", "average_precision", "--device", "cpu"]
    options += ["--variant", "late: spatial=max", "--out", str(tmp_path / "run")]
    made = runner.invoke(app, ["evaluate", "demo:unet", *options, "--json"])
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document["configuration"]["variants"]["late"]["spatial"] == "max"
    assert document["contrasts"]
    shown = runner.invoke(app, ["evaluate", "demo:unet", *options])  # nothing is left to do
    assert "dominance" in shown.stdout
    assert "aiba report" in shown.stdout
    wrong = runner.invoke(app, ["evaluate", "demo:unet", "--protocol", "listen"])
    assert wrong.exit_code == 2
    assert "'probe' or 'generate'" in wrong.stderr
    none = runner.invoke(app, ["reproduce", "aiba-1925"])
    assert none.exit_code == 2
    assert "aiba-2025" in none.stderr


def test_the_published_protocol_is_the_papers():
    parts = PUBLISHED["aiba-2025"].parts
    generate = parts["generate"]
    assert (generate.steps, generate.guidance, generate.seconds, generate.seeds) == (50, 2.5, 8.0, (0,))
    assert (generate.time, generate.mel) == (128, 64)
    assert generate.variants["default"] == Variant()
    assert PUBLISHED["aiba-2025"].model == "cvssp/audioldm2"


@pytest.mark.slow
def test_a_published_protocol_runs_on_the_embedded_backbone(tmp_path):
    changes = {"seconds": 2.56, "steps": 2, "draws": 1, "resamples": 99, "words": ("bass", "drums")}
    runs = reproduce("aiba-2025", model="demo:unet", out=tmp_path, changes=changes, max_pieces=2, device="cpu")
    assert set(runs) == {"generate", "probe"}
    assert all(run.complete and not run.record["failed"] for run in runs.values())
