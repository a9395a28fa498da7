"""Reports: what the tables say, that no text becomes markup, that missing parts are said and fatal nowhere, exports."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import xarray as xr
from typer.testing import CliRunner

from aiba_eval import metrics
from aiba_eval.cli.app import app
from aiba_eval.evaluation import NotARun, Run
from aiba_eval.outputs import FolderInUse
from aiba_eval.report import (
    Entries,
    Table,
    packing,
    selection,
    strips,
    table1,
    table3,
    tables,
    views,
    write_export,
    write_report,
)
from aiba_eval.report.entries import BESIDE, REFERENCES, Key
from aiba_eval.report.export import CannotExport
from aiba_eval.report.page import html_table, json_block, page
from aiba_eval.report.paper import contrast_table, control_table
from aiba_eval.report.table import Line, Number, fixed, latex_text
from tests.report_runs import GRID, HOSTILE, LEVELS, PROMPT, SITES, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "probe", pieces=10)


@pytest.fixture(scope="module")
def entries(run):
    return Entries(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", pieces=2, hostile=True)


@pytest.fixture(scope="module")
def html(entries):
    return page(entries, items=3)


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self.texts = [], [], []
        self._raw = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else self._raw
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        if tag == self._raw:
            self._raw = None

    def handle_data(self, data):
        if self._raw:
            tag, attributes, text = self.raw[-1]
            self.raw[-1] = (tag, attributes, text + data)
        else:
            self.texts.append(data)

    def blocks(self):
        return [json.loads(t) for tag, a, t in self.raw if tag == "script" and a.get("type") == "application/json"]


# ---- tables


def test_numbers_are_written_alike_everywhere():
    assert str(Number(0.4064, 0.3, 0.45)) == "0.406 [0.300, 0.450]"
    assert str(Number(-0.05, digits=2)) == "−0.05"
    assert str(Number(0.05, 0.01, 0.09, digits=2, signed=True)) == "+0.05 [+0.01, +0.09]"
    assert str(Number(math.nan)) == "–"
    assert fixed(-0.0001, 2) == "0.00"  # not minus zero
    assert fixed(-0.0001, 2, signed=True) == "0.00"


NASTY = Table(
    "nasty",
    r"50% of_{x} & \input{secret} <b>",
    ("A|B", "AP"),
    (Line("group", ("<i>g</i>",)), Line("main", ("*x* ^~#$", Number(0.5, 0.4, 0.6))), Line("reference", ("`r`", ""))),
    ("note [link](javascript:1)",),
)


def test_a_table_escapes_what_its_language_would_read():
    text = NASTY.latex()
    body = text.replace(r"\begin{table}", "").replace(r"\input", "!")
    assert r"\textbackslash{}input\{secret\}" in text and "!" not in body
    assert r"50\% of\_\{x\} \& " in text and r"\textasciicircum{}\textasciitilde{}\#\$" in text
    assert r"0.500 {\scriptsize [0.400, 0.600]}" in text
    assert text.count(r"\begin") == text.count(r"\end") and r"\toprule" in text and r"\bottomrule" in text
    for line in [line for line in NASTY.markdown().splitlines() if line.startswith("|")]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert "\\[link\\]" in NASTY.markdown() and "\\<i\\>g" in NASTY.markdown()
    assert "&lt;i&gt;g&lt;/i&gt;" in html_table(NASTY) and "<i>" not in html_table(NASTY)


def test_a_table_gives_its_rows_as_data():
    assert NASTY.rows() == [
        {"group": "<i>g</i>", "kind": "main", "A|B": "*x* ^~#$", "AP": 0.5, "AP low": 0.4, "AP high": 0.6},
        {"group": "<i>g</i>", "kind": "reference", "A|B": "`r`", "AP": ""},
    ]
    assert latex_text("a\nb") == "a b"


def test_table_1_has_every_class_with_its_references_beside(entries):
    table = table1(entries, "dominance", 300)
    rows = table.rows()
    groups = list(dict.fromkeys(row["group"] for row in rows))
    assert groups[:3] == ["bass (10 pieces)", "drums (9 pieces)", "all words (10 pieces)"]
    assert [g.split()[0] for g in groups[3:]] == ["micro", "macro", "positive-weighted"]
    assert table.columns[0] == "Class" and table.columns[1:] == (
        "Precision", "Recall", "F1", "IoU", "AP", "Profile r", "Pointing",
    )  # fmt: skip
    own = entries.scores.query("variant == 'default' and level == 300 and target == 'dominance' and word == 'bass'")
    own = own[own.metric == "average_precision"]
    bass = {row["Class"]: row for row in rows if row["group"] == groups[0]}
    assert bass["model"]["AP"] == pytest.approx(own["value"].mean())
    assert bass["model"]["AP low"] < bass["model"]["AP"] < bass["model"]["AP high"]
    for name in BESIDE:
        assert bass[REFERENCES[name]]["AP"] == pytest.approx(own[name].mean()), name


def test_averages_over_classes_are_of_counted_cells(entries):
    rows = [row for row in table1(entries, "dominance", 800).rows() if row["group"].startswith("micro")]
    counts = {}
    for item in entries.items:
        arrays = item.fields.load()
        for word in item.words:
            heat = arrays["projected"].sel(variant="default", level=800, word=word).values
            mask = arrays["truth"].sel(target="dominance", word=word).values > 0.5
            counts[word] = counts.get(word, 0) + np.array(metrics.confusion(heat, mask))
    expected = metrics.averaged(list(counts.values()))["micro"]
    own = next(row for row in rows if row["Class"] == "model")
    assert (own["Precision"], own["Recall"]) == pytest.approx((expected["precision"], expected["recall"]))
    tp, fp, fn, tn = np.sum(list(counts.values()), axis=0)
    chance = next(row for row in rows if row["Class"] == "chance")
    # per class, cells of the same density anywhere: the recall is the density
    shares = {w: ((c[0] + c[1]) / c.sum(), c[0] + c[2]) for w, c in counts.items()}
    assert chance["Recall"] == pytest.approx(
        sum(q * n for q, n in shares.values()) / sum(n for _, n in shares.values())
    )
    assert {row["Class"] for row in rows} == {"model", "chance", "mix energy", "oracle projection"}
    assert tp + fn > 0 and fp + tn > 0


def test_table_3_has_a_line_for_each_ablation_and_no_reference_twice(entries):
    rows = table3(entries, "dominance", 300).rows()
    assert [row["Variant"] for row in rows if row["kind"] == "main"] == ["default", "spatial max"]
    first, second = (i for i, row in enumerate(rows) if row["kind"] == "main")
    assert [row["Variant"] for row in rows[1:second]] == [REFERENCES[name] for name in BESIDE]
    again = rows[second + 1 :]
    before = {row["Variant"]: row for row in rows[first + 1 : second]}
    assert all(row != before[row["Variant"]] for row in again)
    assert "mix energy" not in {row["Variant"] for row in again}  # it does not depend on the variant's maps


def test_tables_of_a_run_begin_with_the_primary_target(entries):
    names = [table.name for table in tables(entries)]
    assert names[:2] == ["table1-dominance-300", "table3-dominance-300"]
    assert "table1-band-measured-800" in names
    with pytest.raises(ValueError, match="no scores against 'nothing' at level 300"):
        table1(entries, "nothing", 300)
    with pytest.raises(ValueError, match="no scores against"):
        table3(entries, "dominance", 5)


def test_contrasts_and_controls_become_tables(entries):
    rows = contrast_table(entries).rows()
    assert [row["Map"] for row in rows] == ["model, t = 300", "model, t = 800", "class prior"]
    assert rows[0]["Word swap"] == pytest.approx(entries.contrasts[0]["value"])
    (row,) = control_table(entries).rows()
    assert (row["Control"], row["Observed"], row["n"]) == ("reinitialised: word swap, t = 300", 0.19, "20")


# ---- items


def test_the_choice_spans_the_scores_and_hears_every_word(entries):
    ranked = [item.id for item in selection.choose(entries, 10)]
    margin = selection.margins(entries)
    assert ranked == sorted(ranked, key=lambda name: -margin[name])
    chosen = [item.id for item in selection.choose(entries, 3)]
    assert chosen[0] == ranked[0] and chosen[-1] == ranked[-1] and len(set(chosen)) == 3
    assert {word for item in selection.choose(entries, 2) for word in item.words} == {"bass", "drums"}
    assert len(selection.choose(entries, 99)) == 10
    with pytest.raises(ValueError, match="at least one item, got 0"):
        selection.choose(entries, 0)


def test_a_rare_word_takes_the_place_of_an_item_that_nobody_misses(entries):
    worst = selection.choose(entries, 10)[-2]
    object.__setattr__(worst, "words", ("bass", "drums", "flute"))
    try:
        chosen = selection.choose(entries, 3)
        assert worst in chosen
        assert {"bass", "drums", "flute"} == {word for item in chosen for word in item.words}
    finally:
        object.__setattr__(worst, "words", ("bass", "drums"))


def unpack(packed):
    codes = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).astype(float)
    codes = codes.reshape(-1, *packed["shape"][-2:])
    out = np.full(codes.shape, np.nan)
    for image, code, low, high in zip(out, codes, packed["low"], packed["high"], strict=True):
        if low is not None:
            image[...] = np.where(code == packing.MISSING, np.nan, low + code / 254 * (high - low))
    return out.reshape(packed["shape"])


def test_images_survive_eight_bits():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 100, (2, 3, 5, 4))
    values[0, 1] = np.nan
    values[1, 2, 0, 0] = np.nan
    values[0, 0] = 7.0
    got = unpack(packing.images(values))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(values))
    assert np.nanmax(np.abs(got - values)) <= np.nanmax(np.ptp(np.nan_to_num(values), axis=(2, 3))) / 508 * 1.01
    np.testing.assert_allclose(got[0, 0], 7.0)


def test_masks_and_audio_survive():
    mask = np.random.default_rng(0).random((7, 9)) > 0.5
    raw = np.unpackbits(np.frombuffer(base64.b64decode(packing.bits(mask)), np.uint8))[: mask.size]
    np.testing.assert_array_equal(raw.reshape(mask.shape), mask)
    wave = np.sin(np.arange(1000) / 9).astype(np.float32) * 1.2
    stereo = np.stack([wave, wave], axis=1)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(packing.flac(stereo, 16000))))
    assert rate == 16000 and samples.shape == (1000,)
    assert np.abs(samples - np.clip(wave, -1, 1)).max() < 1e-4


def test_a_view_holds_the_maps_of_variants_and_of_every_layer(entries):
    item = entries.items[0]
    view = views.view_of(entries, item)
    got = unpack(view["variants"])
    own = item.fields["projected"].load()
    expected = (own / own.mean(("time", "mel"))).values
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= np.ptp(expected, axis=(3, 4)).max() / 508 * 1.01
    assert view["sites"]["names"] == ["all layers, averaged", *SITES]
    assert view["sites"]["lattices"] == ["16 × 8", "16 × 8", "8 × 4", "16 × 8"]
    assert view["sites"]["levels"] == [f"t = {level}" for level in LEVELS]
    single = unpack(view["sites"])
    assert single.shape == (4, 2, 2, 64, 64)
    maps = item.maps["mid.attn2"].sel(word="drums").isel(prompt=0, step=1)
    assert np.corrcoef(single[2, 1, 1, 4::8, 8::16].ravel(), maps.values.ravel())[0, 1] > 0.95
    assert view["targets"]["dominance"].keys() == {"bass", "drums"} and "share" not in view["targets"]
    assert view["duration"] == pytest.approx(2.0) and view["ticks"][0] == [0.0, "0"]
    assert not view["missing"]


def test_many_layers_and_steps_are_thinned_and_it_is_said(tmp_path, monkeypatch):
    made = Entries(make_run(tmp_path / "run", pieces=1, protocol="generate"))
    view = views.view_of(made, made.items[0])
    assert view["sites"]["levels"] == ["mean over steps", *view["sites"]["levels"][1:]]
    assert len(view["sites"]["levels"]) == 1 + views.STEPS and view["sites"]["levels"][-1] == "step 12 of 12"
    assert "sample of the generation's" in view["sites"]["note"]
    for budget in (60_000, 9_000, 3_000):
        monkeypatch.setattr(views, "BUDGET", budget)
        sites = views.view_of(made, made.items[0])["sites"]
        assert math.prod(sites["shape"]) <= budget, budget
        assert len(sites["names"]) == sites["shape"][0] and len(sites["levels"]) == sites["shape"][1]
    assert "of 3 layers" in sites["note"] and "step positions" in sites["note"]


# ---- the page


def test_the_page_needs_nothing_from_anywhere(html):
    code = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|srcset|<link|<iframe|<object|<base", code)
    assert not re.search(r"https?:", html)
    parsed = Parsed(html)
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else(html):
    parsed = Parsed(html)
    policy = next(a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    code = [text for tag, a, text in parsed.raw if tag == "script" and a.get("type") != "application/json"]
    style = [text for tag, _, text in parsed.raw if tag == "style"]
    assert len(code) == len(style) == 1
    for kind, (text,) in (("script", code), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


def test_no_text_of_a_run_becomes_markup(hostile):
    text = page(Entries(hostile), items=2)
    clean = Parsed(page(Entries(hostile), items=2).replace("\u2028", ""))
    parsed = Parsed(text)
    assert "{{ 7 * 7 }}" in "".join(parsed.texts) or "{{ 7 * 7 }}" in json.dumps(parsed.blocks())
    assert not [tag for tag, _ in parsed.elements if tag in ("img", "i", "b onclick", "u", "em")]
    assert len([1 for tag, a in parsed.elements if tag == "script" and "type" not in a]) == 1
    assert [block["prompt"] for block in parsed.blocks()] == [PROMPT, PROMPT]
    assert [block["words"] for block in parsed.blocks()] == [list(HOSTILE["words"])] * 2
    everything = "".join(parsed.texts)
    for value in (HOSTILE["model"], HOSTILE["reason"], HOSTILE["variants"][1], HOSTILE["words"][1]):
        assert value in everything, value
    assert HOSTILE["piece"] in everything
    assert len(clean.elements) == len(parsed.elements)


def test_json_in_a_script_cannot_end_it():
    block = str(json_block({"a": "</script><!--<script>&\u2028\u2029", "b": math.nan}))
    assert not set(block) & set("<>&\u2028\u2029")
    assert json.loads(block) == {"a": "</script><!--<script>&\u2028\u2029", "b": None}


def test_the_page_says_what_it_shows(html, entries):
    parsed = Parsed(html)
    text = " ".join(" ".join(parsed.texts).split())
    mean = entries.means[Key("default", 300, "dominance", "all", "average_precision")]
    assert f"{fixed(mean.value)} [{fixed(mean.low)}, {fixed(mean.high)}]" in text
    for words in ("3 of 10 items", "the disk was away", "shorter than a window", "no band for it", "resolution-bound"):
        assert words in text, words
    assert "Tasks that failed 1" in text and "Items skipped 1" in text
    assert [level for tag, _ in parsed.elements if (level := re.fullmatch(r"h1", tag))] and "Word swap" in text
    labels = {a.get("for") for tag, a in parsed.elements if tag == "label"}
    inputs = {a["id"] for tag, a in parsed.elements if tag in ("input", "select") and "id" in a}
    assert inputs <= labels, inputs - labels
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_score_is_drawn_among_its_references(entries):
    group = strips.summary_groups(entries)[0]
    assert group.open and group.title.startswith("AP against")
    first = group.strips[0]
    entry = entries.means[Key("default", 300, "dominance", "all", "average_precision")]
    assert first.value == pytest.approx(100 * entry.value, abs=0.01)
    places = {mark.name: mark.place for mark in first.marks}
    assert places["chance"] == pytest.approx(100 * entry.references["chance"], abs=0.01)
    assert {"mix_energy", "class_prior", "prior_times_mix", "oracle_projection"} <= places.keys()
    assert "chance" in first.spoken and first.text in first.spoken
    signed = strips.strip("x", "", "profile_pearson", -0.5, math.nan, 2.0, {"mix_energy": 0.0, "chance": math.nan})
    assert (signed.value, signed.low, signed.high) == (25.0, None, 100.0)
    assert [(mark.name, mark.place) for mark in signed.marks] == [("mix_energy", 50.0)]


def test_the_same_run_gives_the_same_page(run, html):
    assert page(Entries(Run.open(run.path)), items=3) == html


# ---- what is not there


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"maps": False}, "did not keep the maps of single layers"),
        ({"audio": False}, "holds no audio of this item"),
        ({"controls": False}, "No control of the model was measured"),
        ({"scores": False}, "This run is not complete"),
        ({"pieces": 1}, "1 of 1 items"),
    ],
)
def test_missing_parts_are_said(tmp_path, missing, said):
    text = page(Entries(make_run(tmp_path / "run", **{"pieces": 2, **missing})), items=8)
    parsed = Parsed(text)
    everything = " ".join("".join(parsed.texts).split()) + json.dumps(parsed.blocks())
    assert said in everything
    assert len(parsed.blocks()) == missing.get("pieces", 2)
    for block in parsed.blocks():
        assert (block["sites"] is None) == ("maps" in missing)
        assert (block["audio"] is None) == ("audio" in missing)
        assert block["spectrogram"]["shape"][1] == GRID.mel


def test_a_run_without_a_finished_item_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", pieces=0, scores=False)
    written = write_report(run, figures=False)
    text = (written.out / "report.html").read_text(encoding="utf-8")
    assert "No item is finished" in text and "There are no tables" in text
    assert [name for name in written.files if name.startswith("tables/")] == []
    assert any(note.startswith("no summary: ") for note in written.notes)


def test_damaged_audio_is_said_and_the_rest_is_there(tmp_path):
    run = make_run(tmp_path / "run", pieces=1)
    (run.path / "items" / "own" / "item-0-0" / "audio.flac").write_bytes(b"no audio")
    (block,) = Parsed(page(Entries(run), items=1)).blocks()
    assert block["audio"] is None and "audio" in block["missing"] and block["sites"] is not None


# ---- files


def test_a_report_writes_page_tables_and_figures_and_replaces_its_own(tmp_path):
    run = make_run(tmp_path / "run", pieces=2)
    other = make_run(tmp_path / "other", pieces=2, seed=1)
    told = []
    written = write_report(run, items=1, against=other.path, progress=lambda *state: told.append(state))
    assert written.out == run.path / "report" and written.files[0] == "report.html"
    assert {f"tables/table1-dominance-300.{kind}" for kind in ("md", "tex", "html")} <= set(written.files)
    drawn = [name.rpartition("/")[2] for name in written.files if name.startswith("figures/")]
    assert drawn == ["profile.png", "overlay-bass.png", "overlay-drums.png", "side-by-side.png"]
    assert all((written.out / name).stat().st_size > 0 for name in written.files)
    assert ("drawing figures", 0, 1) in told
    (written.out / "notes.txt").write_text("mine")
    again = write_report(run.path, items=1, figures=False)
    assert not (again.out / "figures").exists() and (again.out / "notes.txt").read_text() == "mine"
    assert Run.open(run.path).items  # the run is a run still


def test_foreign_folders_are_left_alone(tmp_path):
    run = make_run(tmp_path / "run", pieces=1, maps=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "report.html").write_text("mine")
    with pytest.raises(FolderInUse, match="not empty"):
        write_report(run, out=foreign, figures=False)
    with pytest.raises(FolderInUse, match="not empty"):
        write_export(run, "csv", out=foreign)
    assert [path.name for path in foreign.iterdir()] == ["report.html"]
    assert (foreign / "report.html").read_text() == "mine"
    with pytest.raises(NotARun, match="foreign"):
        write_report(foreign)
    with pytest.raises(ValueError, match="at least one item, got 0"):
        write_report(run, items=0)


def test_a_strangers_run_writes_nothing_outside_the_folder(tmp_path):
    run = make_run(tmp_path / "deep" / "run", pieces=1)
    about = run.path / "items" / "own" / "item-0-0" / "item.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"id": "../../../../evil"}))
    summary = run.path / "summary.json"
    summary.write_text(summary.read_text().replace('"dominance"', '"../../../evil"'))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(run.path)}
    written = write_report(run, items=1)
    write_export(run, "netcdf", maps=True)
    write_export(run, "latex")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(run.path)} == before
    assert all((written.out / name).resolve().is_relative_to(written.out) for name in written.files)
    assert "tables/table1--evil-300.md" in written.files


def test_the_wheel_holds_the_templates():
    from pathlib import Path

    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).resolve().parents[1]
    held = {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}
    names = [path.name for path in (root / "aiba_eval" / "report" / "templates").iterdir()]
    assert len(names) == 5
    assert {f"aiba_eval/report/templates/{name}" for name in names} <= held


# ---- exports


def test_csv_holds_every_score_and_mean(entries, tmp_path):
    written = write_export(entries.run, "csv", out=tmp_path / "csv")
    assert written.files == ["scores.csv", "summary.csv", "contrasts.csv", "controls.csv"]
    with (written.out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = entries.run.scores()
    assert len(rows) == len(scores)
    values = [float(row["value"]) if row["value"] else math.nan for row in rows]
    np.testing.assert_array_equal(values, scores["value"])
    with (written.out / "summary.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(entries.run.summary())


def test_latex_is_one_document_of_all_tables(entries, tmp_path):
    written = write_export(entries.run, "latex", out=tmp_path / "latex")
    document = (written.out / "tables.tex").read_text(encoding="utf-8")
    inputs = re.findall(r"\\input\{(.+?)\}", document)
    assert set(inputs) == set(written.files) - {"tables.tex"} and "controls.tex" in inputs
    for name in inputs:
        text = (written.out / name).read_text(encoding="utf-8")
        assert text.isascii(), [c for c in text if not c.isascii()]
        rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1, name


def test_netcdf_holds_the_same_numbers(entries, tmp_path):
    written = write_export(entries.run, "netcdf", out=tmp_path / "nc", maps=True)
    assert written.files == ["scores.nc", "summary.nc", *(f"maps/{item.id}.nc" for item in entries.items)]
    scores = entries.run.scores()
    with xr.open_dataset(written.out / "scores.nc", engine="scipy") as data:
        assert data.sizes["pair"] == 19 and data.attrs["model"] == "demo:fake" and data.level.dtype == np.int32
        assert int(np.isfinite(data["value"]).sum()) == int(scores["value"].notna().sum())
        for _, row in scores.sample(20, random_state=0).iterrows():
            pair = np.flatnonzero((data["item"].values == row["item"]) & (data["word"].values == row["word"]))
            where = {name: row[name] for name in ("variant", "level", "target", "metric")}
            one = data.isel(pair=int(pair[0])).sel(where)
            np.testing.assert_array_equal([float(one["value"]), float(one["chance"])], [row["value"], row["chance"]])
            assert str(one["piece"].values) == row["piece"] and float(one["mask_area"]) == row["mask_area"]
    with xr.open_dataset(written.out / "summary.nc", engine="scipy") as data:
        where = {"variant": "default", "level": 300, "target": "dominance", "word": "bass"}
        one = data.sel(where, drop=True).sel(metric="average_precision")
        entry = entries.means[Key(**where, metric="average_precision")]
        assert (float(one["value"]), float(one["n"])) == (entry.value, entry.n)
        assert float(one["reference_value"].sel(reference="chance")) == entry.references["chance"]
    item = entries.items[0]
    with xr.open_dataset(written.out / "maps" / f"{item.id}.nc", engine="scipy") as data:
        np.testing.assert_array_equal(data["projected"], item.fields["projected"])
        assert data.attrs["prompt"] == item.prompt and list(data.attrs["finest_lattice"]) == [16, 8]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    run = make_run(tmp_path / "run", pieces=1, scores=False, maps=False)
    for form, options, message in (
        ("csv", {}, "has no scores yet"),
        ("parquet", {}, "is one of csv, latex, netcdf, got 'parquet'"),
        ("csv", {"maps": True}, "with the format netcdf, not csv"),
    ):
        with pytest.raises(CannotExport, match=message):
            write_export(run, form, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_names_from_a_run_do_not_break_exports(hostile, tmp_path):
    for form in ("csv", "latex", "netcdf"):
        write_export(hostile, form, out=tmp_path / form, maps=form == "netcdf")
    with xr.open_dataset(tmp_path / "netcdf" / "scores.nc", engine="scipy") as data:
        assert set(data["word"].values) == set(HOSTILE["words"])
        assert str(data["piece"].values[0]).startswith(HOSTILE["piece"])
    text = (tmp_path / "latex" / "table3-dominance-300.tex").read_text(encoding="utf-8")
    assert r"\textless{}u\textgreater{}max" in text


# ---- commands


def aiba(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_commands(tmp_path):
    run = make_run(tmp_path / "run", pieces=2, maps=False)
    out, _ = aiba("report", run.path, "--no-figures", "--items", 1)
    assert "Table 1: demo:fake" in out and "mix energy" in out and "report.html" in out
    out, _ = aiba("report", run.path, "--no-figures", "--json", "--out", tmp_path / "r")
    document = json.loads(out)
    assert document["files"][0] == "report.html" and document["tables"]["table1-dominance-300"]["rows"]
    out, _ = aiba("export", run.path, "--format", "netcdf", "--json")
    document = json.loads(out)
    assert document["format"] == "netcdf" and document["files"] == ["scores.nc", "summary.nc"]
    assert (run.path / "export-netcdf" / "scores.nc").is_file()
    out, _ = aiba("export", run.path, "--format", "csv")
    assert "4 files" in out


def test_the_commands_say_what_to_do(tmp_path):
    _, err = aiba("report", tmp_path, code=2)
    assert "aiba evaluate" in err
    run = make_run(tmp_path / "run", pieces=1, scores=False, maps=False)
    out, err = aiba("export", run.path, "--format", "csv", "--json", code=2)
    assert "no scores yet" in err and "no scores yet" in json.loads(out)["error"]


# ---- a real run


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    from aiba_eval.datasets import freedoom_root, slakh
    from aiba_eval.evaluation import Configuration, Variant, evaluate

    pieces = slakh.pieces(freedoom_root(), "test")
    config = Configuration(
        seconds=2.56,
        timesteps=(800,),
        draws=1,
        resamples=99,
        metrics=("average_precision", "f1"),
        variants={"default": Variant(), "spatial max": Variant(spatial="max")},
    )
    return evaluate("demo:unet", pieces[:2], config, out=tmp_path_factory.mktemp("real") / "run", device="cpu")


def test_a_real_run_has_a_whole_report(real):
    written = write_report(real, items=1, figures=False)
    rows = next(table for table in written.tables if table.name == "table1-dominance-800").rows()
    own = next(row for row in rows if row["group"].startswith("all words") and row["kind"] == "main")
    scores = real.scores().query("variant == 'default' and target == 'dominance' and metric == 'average_precision'")
    assert own["AP"] == pytest.approx(scores.groupby("piece")["value"].mean().mean())
    assert {row["Class"] for row in rows if row["group"].startswith("micro")} >= {"model", "chance", "mix energy"}
    (block,) = Parsed((written.out / "report.html").read_text(encoding="utf-8")).blocks()
    assert len(block["sites"]["names"]) > 3 and block["audio"] and not block["missing"]
    assert Table and next(table for table in written.tables if table.name == "table3-dominance-800").lines
