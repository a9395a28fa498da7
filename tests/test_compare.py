"""Comparing two models: closed cases with models whose answer is known, the measures by hand, resuming, the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import nn
from typer.testing import CliRunner

from aiba_eval import MelGrid, compare, figures, project
from aiba_eval.clip_maps import CannotCompare, Store, clip_maps, edits_of
from aiba_eval.clips import TARGETS, Clip, make_clips
from aiba_eval.comparing import MINIMUM_PIECES, _beside_fresh, _contrasts, _Mass, _partners, compare_on
from aiba_eval.datasets import Piece, Stem, freedoom_root, slakh
from aiba_eval.demo import at_timestep
from aiba_eval.effects import effect_map
from aiba_eval.fresh import CannotReinitialise, with_fresh_weights
from aiba_eval.metrics import average_precision
from aiba_eval.outputs import FolderInUse, OutputFolder
from aiba_eval.probe import CannotProbe, probe
from aiba_hooks import Backbone, Conditioning, Lattice, TokenStream, hookimpl
from aiba_hooks.plugins import manager

RATE, SECONDS, BANDS, TOKENS = 16000, 0.64, 16, 8
COLUMNS = round(SECONDS * 100)
GRID = MelGrid(COLUMNS, BANDS, duration=SECONDS)
#: four bands for each instrument, from the lowest
INSTRUMENTS = ("bass", "guitar", "piano", "flute")
WORDS = (*INSTRUMENTS, "and", "a", "song", "with")
FLOOR = -11.0


# ---- models whose answer is known


class Denoiser(nn.Module):
    """The clean log-mel of a text: in each named instrument's bands what the model believes, silence elsewhere.

    It believes a fixed level (``"text"``), or what it hears there in the noised latent (``"audio"``). One cross-attention of
    equal weights, one-hot values.
    """

    def __init__(self, kind):
        super().__init__()
        self.to_k = nn.Linear(len(WORDS), len(WORDS), bias=False)
        nn.init.eye_(self.to_k.weight)
        self.kind, self.forwards = kind, 0

    def forward(self, sample, timestep, encoder_hidden_states):
        self.forwards += 1
        text = encoder_hidden_states * TOKENS
        query = torch.zeros(len(sample), 1, sample.shape[2] * BANDS, len(WORDS))
        said = F.scaled_dot_product_attention(query, 0 * self.to_k(text)[:, None], text[:, None])[:, 0]
        named = said[..., : len(INSTRUMENTS)].unflatten(1, sample.shape[2:]).clamp(0, 1)
        own = torch.arange(BANDS)[:, None] // 4 == torch.arange(len(INSTRUMENTS))
        share = (named * own).sum(-1)[:, None]
        heard = torch.full_like(sample, 3.0) if self.kind == "text" else (sample - FLOOR).clamp_min(0)
        return FLOOR + share * heard


class Pipe:
    """Its latent is the log-mel itself, 16 bands at 100 columns a second."""

    _execution_device = torch.device("cpu")

    def __init__(self, kind, rate=RATE):
        self.scheduler = SimpleNamespace(
            alphas_cumprod=torch.linspace(0.99999, 0.05, 1000, dtype=torch.float64),
            config=SimpleNamespace(prediction_type="sample"),
        )
        self.vocoder = SimpleNamespace(config=SimpleNamespace(sampling_rate=rate))
        self.unet = Denoiser(kind).eval()

    @property
    def components(self):
        return {"unet": self.unet}

    def encode_prompt(self, prompt, device, num_waveforms_per_prompt=1, do_classifier_free_guidance=False):
        rows = torch.zeros(1, TOKENS, len(WORDS))
        for position, word in enumerate(prompt.replace(",", "").split()):
            rows[0, position, WORDS.index(word)] = 1
        return rows.repeat(num_waveforms_per_prompt, 1, 1)


class KnownBackbone(Backbone):
    name = "known"
    seconds = SECONDS

    def matches(self, target):
        return isinstance(target, Pipe)

    def conditioning(self, target, arguments, result):
        prompt = arguments["prompt"]
        words = prompt.replace(",", "").split()
        blank = TOKENS - len(words)
        stream = TokenStream(
            "text",
            (prompt,),
            ((*words, *("",) * blank),),
            (("word",) * len(words) + ("padding",) * blank,),
            ((*range(len(words)), *(None,) * blank),),
            argument="encoder_hidden_states",
        )
        return Conditioning((prompt,), int(arguments["num_waveforms_per_prompt"]), False, (stream,))

    def lattice(self, site):
        columns = site.arguments["sample"].shape[2]
        return Lattice(
            (columns, BANDS),
            ("time", "frequency"),
            seconds_per_column=0.01,
            frequency_edges=MelGrid(mel=BANDS).edges,
        )

    def encode(self, target, waveform, sample_rate):
        columns = round(self.seconds * 100)
        mel = MelGrid(columns, BANDS, duration=self.seconds).spectrogram(waveform, sample_rate)
        return torch.from_numpy(mel)[None, None]

    def predict(self, target, latents, timestep, conditioning):
        return target.unet(latents, timestep, encoder_hidden_states=conditioning)

    def decode_mel(self, target, latents):
        return latents[:, 0]

    def mel_grid(self, target):
        return MelGrid(mel=BANDS)


class Plugin:
    def __init__(self, backbone):
        self.backbone = backbone

    @hookimpl
    def aiba_backbones(self):
        return [self.backbone]


@pytest.fixture(autouse=True)
def known():
    """The backbone, registered as a plugin's."""
    plugin = Plugin(KnownBackbone())
    manager().pluggy.register(plugin)
    yield plugin.backbone
    manager().pluggy.unregister(plugin)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Five pieces of 1.28 s: each instrument is noise in its own four bands, on and off in a pattern of the piece."""
    root = tmp_path_factory.mktemp("music")
    edges = MelGrid(mel=BANDS).edges
    found = []
    for number in range(5):
        rng = np.random.default_rng(number)
        samples = round(2 * SECONDS * RATE)
        stems = []
        for instrument in [w for k, w in enumerate(INSTRUMENTS) if k != number % 4]:
            k = INSTRUMENTS.index(instrument)
            spectrum = np.fft.rfft(rng.standard_normal(samples))
            frequency = np.fft.rfftfreq(samples, 1 / RATE)
            inside = (frequency > edges[4 * k] + 60) & (frequency < edges[4 * k + 4] - 60)
            wave = np.fft.irfft(spectrum * inside, samples)
            wave *= np.repeat(rng.permutation([0.02, 0.02, 1, 1] * 4), samples // 16)
            path = root / f"{number}-{instrument}.wav"
            soundfile.write(path, (0.1 * wave / wave.std()).astype(np.float32), RATE, subtype="FLOAT")
            stems.append(Stem(instrument, instrument, instrument, None, False, path, None))
        name = f"piece{number}"
        found.append(Piece(name, "test", root, stems[0].path, RATE, 2 * SECONDS, "CC0", "made", tuple(stems)))
    return found


OPTIONS = {
    "seconds": SECONDS,
    "timesteps": (5, 300),
    "draws": 1,
    "most": 3,
    "absent": 1,
    "grid": MelGrid(COLUMNS, BANDS),
    "labels": ("text", "audio"),
    "resamples": 199,
}


@pytest.fixture(scope="module")
def result(music):
    plugin = Plugin(KnownBackbone())
    manager().pluggy.register(plugin)
    try:
        return compare(Pipe("text"), Pipe("audio"), music, **OPTIONS)
    finally:
        manager().pluggy.unregister(plugin)


def test_a_model_that_hears_passes_every_contrast(result):
    where = {"model": "audio", "map": "effect", "level": 5}
    for measure in ("above_chance", "word_swap", "piece_swap"):
        assert result.find(measure, **where)["low"] > 0.05, measure
    assert result.find("score", **where)["value"] > 0.8
    for measure in ("presence", "power_presence", "fit_presence"):
        assert result.find(measure, **where)["value"] == 1
    assert result.find("neutral_share", **where)["value"] == pytest.approx(0, abs=1e-6)
    for target in ("energy", "share"):
        for measure in ("word_swap", "piece_swap"):
            assert result.find(measure, target=target, **where)["low"] > 0, (target, measure)


def test_a_model_that_only_reads_does_not_hear_the_piece(result):
    where = {"model": "text", "map": "effect", "level": 5}
    assert result.find("word_swap", **where)["low"] > 0.1
    assert result.find("piece_swap", **where)["value"] == pytest.approx(0, abs=1e-6)
    assert result.find("presence", **where)["value"] == pytest.approx(0.5)
    assert result.find("presence_by_word", **where)["value"] == pytest.approx(0.5)
    # what it adds for a word is the right sound for that word, and the wrong one for another
    for measure in ("fit_presence", "fit_presence_by_word"):
        assert result.find(measure, **where)["value"] == pytest.approx(1)
    assert result.find("neutral_share", **where)["value"] == pytest.approx(0, abs=1e-6)


def test_even_attention_scores_chance_and_has_no_contrast(result):
    for model in ("text", "audio"):
        where = {"model": model, "map": "attention", "level": 300}
        assert result.find("ratio", **where)["value"] == pytest.approx(1)
        for measure in ("above_chance", "word_swap", "piece_swap"):
            assert result.find(measure, **where)["value"] == pytest.approx(0, abs=1e-9)
        assert result.find("score", **where)["pieces"] == 5
    for row in result.profiles:
        assert row["entropy"] == pytest.approx(1)
        assert row["word_mass"] + row["padding_mass"] == pytest.approx(1)
        assert row["special_mass"] == 0
    assert {(row["model"], row["level"]) for row in result.profiles} == {
        (m, t) for m in ("text", "audio") for t in (5, 300)
    }


def test_references_stand_beside(result):
    blind = {row["map"] for row in result.rows if row["level"] is None}
    assert blind == {"mix_energy", "class_prior", "prior_mix", "oracle_projection"}
    assert result.find("word_swap", map="mix_energy")["value"] == 0
    assert result.find("score", map="mix_energy")["value"] < result.find("score", map="prior_mix")["value"]
    assert result.find("score", map="oracle_projection", model="text")["value"] > 0.99
    # priors of the other pieces have seen this one in theirs: no piece swap
    assert result.find("piece_swap", map="class_prior")["pieces"] == 0
    assert np.isnan(result.find("piece_swap", map="prior_mix")["value"])


def test_priors_come_from_training_pieces(music):
    options = OPTIONS | {"timesteps": (5,)}
    found = compare(Pipe("text"), Pipe("audio"), music[:3], training=music[3:], **options)
    assert found.find("piece_swap", map="class_prior")["value"] == pytest.approx(0, abs=1e-9)
    assert found.find("word_swap", map="class_prior")["value"] > 0.1


def test_models_are_tested_pairwise_over_pieces(result):
    tests = {(t["map"], t["level"], t["measure"]): t for t in result.tests}
    assert len(tests) == 2 * (3 + 6)  # levels × (attention + effect)
    heard = tests["effect", 5, "piece_swap"]
    # five pieces, all one way: 2 of 32 sign patterns are as extreme
    assert heard["p"] == pytest.approx(2 / 32)
    assert heard["difference"] == pytest.approx(
        result.find("piece_swap", model="text", map="effect", level=5)["value"]
        - result.find("piece_swap", model="audio", map="effect", level=5)["value"]
    )
    assert heard["high"] < -0.05
    assert tests["attention", 5, "score"]["p"] == 1
    assert all(test["p_holm"] >= test["p"] for test in result.tests)


def test_two_runs_of_one_model_do_not_differ(music):
    found = compare(Pipe("audio"), Pipe("audio"), music[:3], **OPTIONS | {"timesteps": (5,), "labels": None})
    assert found.models == ("Pipe (1)", "Pipe (2)")
    assert {test["difference"] for test in found.tests} == {0}
    assert {test["p_holm"] for test in found.tests} == {1}


def test_a_model_without_a_decoder_has_attention_only(music, known, monkeypatch):
    def refuse(target, latents):
        raise CannotProbe("Pipe has no decoder")

    plain = known.decode_mel
    monkeypatch.setattr(
        known, "decode_mel", lambda target, z: refuse(target, z) if target.unet.kind == "text" else plain(target, z)
    )
    found = compare(Pipe("text"), Pipe("audio"), music[:3], **OPTIONS | {"timesteps": (5,)})
    assert {row["map"] for row in found.rows if row["model"] == "text"} == {"attention", "oracle_projection"}
    assert "text has attention maps only: Pipe has no decoder" in found.notes
    assert {test["map"] for test in found.tests} == {"attention"}
    assert found.find("word_swap", model="audio", map="effect", level=5)["value"] > 0.1


def test_attention_alone_may_be_asked_for(music, known):
    found = compare(Pipe("text"), Pipe("audio"), music[:3], **OPTIONS | {"timesteps": (5,), "effects": False})
    assert {row["map"] for row in found.rows if row["model"]} == {"attention", "oracle_projection"}
    assert "text has attention maps only: effect maps were not asked for" in found.notes


# ---- the table


def test_the_table_is_wide_and_undefined_cells_are_empty(result):
    rows = result.table(target="energy")
    row = next(r for r in rows if (r["model"], r["map"], r["level"]) == ("audio", "effect", 5))
    found = result.find("word_swap", target="energy", model="audio", map="effect", level=5)
    assert row["word_swap"] == (found["value"], found["low"], found["high"])
    text = result.markdown()
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(result.table())
    assert "nan" not in str(result)
    with pytest.raises(KeyError, match="0 rows"):
        result.find("word_swap", model="audio", map="effect", level=7)
    with pytest.raises(KeyError, match="rows have"):
        result.find("score")


def test_classes_with_enough_pieces_have_rows(result, music, monkeypatch):
    assert {row["word"] for row in result.rows} == {"all"}
    assert any(f"fewer than {MINIMUM_PIECES} pieces are in the means only: bass" in note for note in result.notes)
    monkeypatch.setattr("aiba_eval.comparing.MINIMUM_PIECES", 4)
    found = compare(Pipe("text"), Pipe("audio"), music, **OPTIONS | {"timesteps": (5,)})
    assert {row["word"] for row in found.rows} == {"all", "guitar", "piano", "flute"}  # bass is in three
    row = found.find("word_swap", model="audio", map="effect", level=5, word="piano")
    assert row["pieces"] == 4
    assert row["value"] > 0.1


# ---- clips


def test_a_clip_is_the_sum_of_what_its_prompt_names(music):
    clips, skipped = make_clips(music, INSTRUMENTS, GRID, seconds=SECONDS, windows=2, most=2, absent=1)
    assert not skipped
    assert [clip.piece for clip in clips] == [piece.name for piece in music for _ in range(2)]
    for clip in clips:
        piece = next(p for p in music if p.name == clip.piece)
        assert len(clip.words) == 2
        assert clip.prompt == f"{clip.words[0]} and {clip.words[1]}"
        assert clip.absent == tuple(set(INSTRUMENTS) - set(piece.instruments))
        whole = np.sum([piece.stem(w, clip.start, SECONDS) for w in clip.words], axis=0)
        whole = whole - whole.mean()
        np.testing.assert_allclose(clip.mix, 0.5 * whole / np.abs(whole).max(), atol=1e-5)
        assert set(clip.targets) == set(TARGETS)
        one, other = (clip.targets["dominance"][w] for w in clip.words)
        assert not (one & other).any()
        share = clip.targets["share"][clip.words[0]]
        np.testing.assert_array_equal(share > 0.5, one)
    alone, _ = make_clips(music[3:4], INSTRUMENTS, GRID, seconds=SECONDS, windows=2, most=2, absent=1)
    assert [clip.start for clip in alone] == [clip.start for clip in clips if clip.piece == music[3].name]
    other, _ = make_clips(music, INSTRUMENTS, GRID, seconds=SECONDS, windows=2, most=2, absent=1, seed=1)
    assert [clip.start for clip in other] != [clip.start for clip in clips]


def test_pieces_without_two_playing_instruments_are_skipped_and_counted(music, tmp_path):
    solo = dataclasses.replace(music[0], name="solo", stems=music[0].stems[:1])
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(round(2 * SECONDS * RATE), np.float32), RATE)
    rest = dataclasses.replace(music[0].stems[1], path=path)
    resting = dataclasses.replace(music[0], name="resting", stems=(music[0].stems[0], rest))
    brief = dataclasses.replace(music[0], name="brief", seconds=0.5)
    pieces = [*music, solo, resting, brief]
    found = compare(Pipe("text"), Pipe("audio"), pieces, **OPTIONS | {"timesteps": (5,)})
    assert found.skipped["solo"].startswith("fewer than two named instruments")
    assert found.skipped["resting"] == "fewer than two instruments play in any of 8 windows of 0.64 s"
    assert found.skipped["brief"] == "0.50 s long, shorter than a clip of 0.64 s"
    assert any(note.startswith("3 pieces were left out (") for note in found.notes)
    with pytest.raises(CannotCompare, match="none of 1 pieces can be used .solo: fewer than two"):
        compare(Pipe("text"), Pipe("audio"), [solo], **OPTIONS)


# ---- the measures by hand


def some_clips(rng, count=4):
    clips = []
    for number in range(count):
        words = tuple(str(w) for w in rng.permutation(INSTRUMENTS)[:3])
        masks = {w: rng.random((6, 5)) < 0.4 for w in words}
        targets = {"dominance": masks, "energy": masks, "share": {w: rng.random((6, 5)) for w in words}}
        clips.append(Clip(f"p{number // 2}", 0.0, words, (), np.zeros(1, np.float32), RATE, targets))
    return clips


def test_swaps_are_against_the_other_words_and_the_other_pieces():
    rng = np.random.default_rng(0)
    clips = some_clips(rng, 6)
    maps = [{w: rng.random((6, 5)) for w in clip.words} for clip in clips]
    partners = _partners(clips, 0)
    records = _contrasts(clips, maps, "dominance", partners)
    assert len(records) == 18
    for record, (i, word) in zip(records, [(i, w) for i, c in enumerate(clips) for w in c.words], strict=True):
        mask = clips[i].targets["dominance"][word].ravel()

        def ap(values, mask=mask):
            return average_precision_score(mask, values.ravel())

        others = [ap(maps[i][v]) for v in clips[i].words if v != word]
        elsewhere = [j for j, c in enumerate(clips) if c.piece != clips[i].piece and word in c.words]
        assert set(partners[i, word]) <= set(elsewhere)
        assert len(partners[i, word]) == min(4, len(elsewhere))
        own = ap(maps[i][word])
        assert record["score"] == pytest.approx(own)
        assert record["chance"] == pytest.approx(mask.mean())
        assert record["word_swap"] == pytest.approx(own - np.mean(others))
        if elsewhere:
            swapped = np.mean([ap(maps[j][word]) for j in partners[i, word]])
            assert record["piece_swap"] == pytest.approx(own - swapped)
        else:
            assert np.isnan(record["piece_swap"])


def test_presence_is_the_share_of_pairs_that_the_present_word_wins():
    def masses(**of):
        return {tuple(key.split("_")): value for key, value in of.items()}

    mass = _Mass(
        ["a", "a", "b", "c"],
        [
            masses(present_bass=2.0, present_piano=1.0, absent_flute=1.0),
            masses(present_bass=3.0, present_piano=0.0, absent_flute=1.0),
            masses(present_flute=2.0, present_piano=5.0, absent_bass=2.0, neutral_and=1.0),
            masses(present_flute=0.5, absent_bass=9.0),
        ],
    )
    assert mass.presence() == {"a": 1.0, "b": 0.5, "c": 0.0}  # in place of bass, bass; flute; flute
    assert mass.roles("neutral") == {"b": 1.0}
    assert mass.roles("present") == {"a": 1.5, "b": 3.5, "c": 0.5}
    # only clips of two words are compared with each other: bass 2 and 3 against b's 2, flute 2 against a's 1 and 1
    assert mass.presence_by_word() == (0.5 + 1 + 1 + 1) / 4
    assert mass.presence_by_word_row({"seed": 0, "resamples": 1999})["pieces"] == 2  # too few for an interval
    assert np.isnan(mass.presence_by_word_row({"seed": 0, "resamples": 1999})["low"])


def test_the_interval_of_presence_by_word_resamples_pieces():
    rng = np.random.default_rng(0)
    of = [
        {("present" if i % 2 else "absent", "bass"): float(rng.normal(1.0 * (i % 2))), ("present", f"other{i}"): 0.0}
        for i in range(16)
    ]
    # a word more where bass is absent, so that every clip has two words
    for i in range(0, 16, 2):
        of[i]["present", "more"] = 0.0
    mass = _Mass([f"p{i}" for i in range(16)], of)
    row = mass.presence_by_word_row({"seed": 0, "resamples": 1999})
    yes = np.array([m["present", "bass"] for m in of[1::2]])
    no = np.array([m["absent", "bass"] for m in of[::2]])
    assert row["value"] == pytest.approx((yes[:, None] > no).mean())
    boot = []
    for _ in range(4000):
        drawn = rng.integers(16, size=16)
        a, b = yes[drawn[drawn % 2 == 1] // 2], no[drawn[drawn % 2 == 0] // 2]
        if len(a) and len(b):
            boot.append((a[:, None] > b).mean())
    low, high = np.percentile(boot, [2.5, 97.5])
    assert abs(row["low"] - low) < 0.15
    assert abs(row["high"] - high) < 0.15
    assert row["low"] < row["value"] < row["high"]


def test_a_figure_stands_outside_its_fresh_distribution_or_not():
    row = {"model": "m", "map": "effect", "level": 5, "target": "dominance", "word": "all", "measure": "word_swap"}
    share = {**row, "target": "", "measure": "neutral_share"}
    rows = [
        {**row, "value": 0.3},
        {**share, "value": 0.1},
        {**row, "target": "energy", "value": 9.0},
        {**row, "word": "bass", "value": 9.0},
        {**row, "level": 300, "value": 9.0},
    ]
    drawn = {
        ("m", "effect 5 dominance word_swap"): [0.0, 0.1, 0.2],
        ("m", "effect 5 energy word_swap"): [9.5, 0.1],
        ("m", "effect 5  neutral_share"): [0.05, 0.5],
    }
    found = _beside_fresh(rows, drawn)
    assert [(f["measure"], f["target"], f["outside"], f["p"]) for f in found] == [
        ("word_swap", "dominance", True, 1 / 4),
        ("neutral_share", "", False, 2 / 3),
        ("word_swap", "energy", False, 2 / 3),
    ]
    assert not _beside_fresh([{**row, "value": 0.2}], drawn)[0]["outside"]


def test_present_and_absent_words_are_edited_alike():
    """The same context, the same place, the same length: what an untrained model does to shorter texts is no presence."""
    clip = Clip("p", 0.0, ("bass", "drums", "piano"), ("flute", "organ", "reed", "brass"), np.zeros(1), RATE, {})
    edits, roles = edits_of(clip)
    contexts = [edits[f"present {word}"][1] for word in clip.words]
    assert [edits[f"absent {word}"][1] for word in clip.absent] == [*contexts, contexts[0]]
    assert edits["present bass"] == ("drums, piano and bass", "drums and piano")
    assert edits["absent flute"] == ("drums, piano and flute", "drums and piano")
    assert edits["absent organ"] == ("bass, piano and organ", "bass and piano")
    assert edits["map drums"] == ("bass, drums and piano", "bass and piano")
    assert edits["neutral without and"] == ("bass, drums and piano", "bass, drums piano")
    assert edits["neutral reversed"][1] == "piano, drums and bass"
    assert [role for role, _ in roles] == ["present"] * 3 + ["absent"] * 4 + ["neutral"] * 3


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"words": ["bass", "kazoo"]}, CannotCompare, "no piece has 'kazoo'; the pieces' instruments are bass, flute"),
        ({"words": ["bass"]}, CannotCompare, "none of 5 pieces can be used"),
        ({"timesteps": (1000,)}, CannotCompare, "text: timestep 1000 is outside 0–999"),
        ({"layers": "encoder*"}, CannotCompare, r"text: no site matches layers=\['encoder\*'\]"),
        ({"timesteps": ()}, ValueError, "need timesteps, draws, windows, batch, resamples >= 1"),
        ({"draws": 0}, ValueError, "'draws': 0"),
        ({"most": 1}, ValueError, "most=1"),
        ({"labels": ("a", "a")}, ValueError, "both models are labelled 'a'"),
    ],
)
def test_what_cannot_be_compared_is_said(music, options, error, message):
    with pytest.raises(error, match=message):
        compare(Pipe("text"), Pipe("audio"), music, **OPTIONS | options)


def test_models_of_other_rates_or_lengths_cannot_be_compared(music, known):
    with pytest.raises(CannotCompare, match="text makes audio of 16000 Hz and audio makes audio of 44100 Hz"):
        compare(Pipe("text"), Pipe("audio", rate=44100), music, **OPTIONS)
    known.seconds = 0.32
    with pytest.raises(CannotCompare, match=r"the maps of text cover 0\.32 of 0\.64 s and 16 of 16 mel rows"):
        compare(Pipe("text"), Pipe("audio"), music, **OPTIONS)
    with pytest.raises(CannotCompare, match="two pieces are called 'piece0'"):
        compare(Pipe("text"), Pipe("audio"), [*music, music[0]], **OPTIONS)


def test_few_pieces_have_no_interval(music):
    found = compare(Pipe("text"), Pipe("audio"), music[:2], **OPTIONS | {"timesteps": (5,)})
    assert "fewer than 3 pieces: no intervals and no tests" in found.notes
    assert found.tests == []
    row = found.find("word_swap", model="audio", map="effect", level=5)
    assert row["value"] > 0.1
    assert np.isnan(row["low"])
    assert row["pieces"] == 2


# ---- stored results


def same(one, other):
    assert json.dumps(one.rows, sort_keys=True) == json.dumps(other.rows, sort_keys=True)
    assert one.tests == other.tests
    assert one.profiles == other.profiles


def test_a_stopped_run_goes_on_and_gives_the_same(music, tmp_path):
    out = tmp_path / "out"
    text, audio = Pipe("text"), Pipe("audio")
    options = OPTIONS | {"timesteps": (5,)}
    whole = compare(text, audio, music[:3], **options)
    text.unet.forwards = audio.unet.forwards = 0

    def stop(what, done, total):
        if what == "measuring both models" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(text, audio, music[:3], out=out, progress=stop, **options)
    assert json.loads((out / "compare.json").read_text())["complete"] is False
    before = text.unet.forwards, audio.unet.forwards
    found = compare(text, audio, music[:3], out=out, **options)
    again = text.unet.forwards - before[0], audio.unet.forwards - before[1]
    assert again == (before[0] // 2, before[1] * 2)  # two pieces were done by the one, one by the other
    same(found, whole)
    held = sorted(path.name for path in (out / "work").glob("*/*"))
    assert held == sorted(f"{piece.name}.npz" for piece in music[:3] for _ in range(2))
    # nothing is left to do
    count = text.unet.forwards
    same(compare(text, audio, music[:3], out=out, **options), whole)
    assert text.unet.forwards == count


def test_another_configuration_is_refused(music, tmp_path):
    out = tmp_path / "out"
    text, audio = Pipe("text"), Pipe("audio")
    options = OPTIONS | {"timesteps": (5,), "out": out}
    compare(text, audio, music[:3], **options)
    with pytest.raises(FolderInUse, match=r"another configuration \(draws 1 there and 2 now\).*--overwrite"):
        compare(text, audio, music[:3], **options | {"draws": 2})
    with pytest.raises(FolderInUse, match=r"pieces .* there and .* now"):
        compare(text, audio, music[:4], **options)
    with torch.no_grad():
        audio.unet.to_k.weight += 1
    with pytest.raises(FolderInUse, match="models .* there and .* now"):
        compare(text, audio, music[:3], **options)
    count = text.unet.forwards
    found = compare(text, audio, music[:3], overwrite=True, **options)
    assert text.unet.forwards > count
    assert found.out == out
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FolderInUse, match="is no former output folder of `aiba compare`"):
        compare(text, audio, music[:3], **options | {"out": tmp_path})


def test_fresh_weights_are_stored_one_by_one(music, tmp_path):
    built = []

    def rebuild(pipeline, seed):
        built.append((pipeline.unet.kind, seed))
        return Pipe(["text", "audio"][seed % 2])

    options = OPTIONS | {"timesteps": (5,), "out": tmp_path / "out", "reinitialise": rebuild}
    one = compare(Pipe("text"), Pipe("audio"), music[:3], reinitialisations=1, **options)
    assert built == [("text", 0), ("audio", 0)]
    two = compare(Pipe("text"), Pipe("audio"), music[:3], reinitialisations=2, **options)
    assert built[2:] == [("text", 1), ("audio", 1)]
    assert {len(row["fresh"]) for row in one.fresh} == {1}
    fresh = {(row["model"], row["map"], row["measure"]): row for row in two.fresh if row["target"] in ("", "dominance")}
    # the first of each is a model that reads, the second one that hears: the figures that compare reports of these
    for measure in (
        "score",
        "word_swap",
        "piece_swap",
        "presence",
        "power_presence",
        "fit_presence",
        "fit_presence_by_word",
        "neutral_share",
    ):
        expected = [two.find(measure, model=m, map="effect", level=5)["value"] for m in ("text", "audio")]
        for model in ("text", "audio"):
            assert fresh[model, "effect", measure]["fresh"] == pytest.approx(expected, abs=1e-9)
    # against every target, for every kind of map; this attention is constant, and has no correlation with shares
    held = {(row["map"], row["target"]) for row in two.fresh if row["measure"] == "word_swap"}
    assert held == {(kind, target) for kind in ("attention", "effect") for target in TARGETS} - {("attention", "share")}
    assert not fresh["text", "effect", "piece_swap"]["outside"]
    assert any("2 fresh initialisations: intervals" in note for note in two.notes)
    # one model's alone
    some = compare(Pipe("text"), Pipe("audio"), music[:3], reinitialisations={"audio": 2}, **options)
    assert len(built) == 4
    assert {row["model"] for row in some.fresh} == {"audio"}
    assert some.fresh == [row for row in two.fresh if row["model"] == "audio"]
    assert any("no fresh initialisations of text: intervals" in note for note in some.notes)
    for asked, message in (({"sound": 1}, "'sound'"), (-1, "reinitialisations=-1"), ({"audio": -1}, "'audio': -1")):
        with pytest.raises(ValueError, match=message):
            compare(Pipe("text"), Pipe("audio"), music[:3], reinitialisations=asked, **options)


def test_stored_maps_are_read_as_they_were(music, tmp_path):
    clips, _ = make_clips(music[:1], INSTRUMENTS, GRID, seconds=SECONDS, absent=1)
    made = clip_maps("m", Pipe("audio"), clips[0], GRID, timesteps=(5, 300), draws=1, seed=0)
    blind = dataclasses.replace(
        made, effect=None, masses=None, reason="why", sites=[{**made.sites[0], "entropy": np.nan}]
    )
    folder = OutputFolder(tmp_path / "out", "compare", configuration={})
    first = Store(folder).piece("a/b: c", "piece", lambda: [made, blind])
    read = Store(folder).piece("a/b: c", "piece", lambda: pytest.fail("read, not made"))
    assert first[0] is made
    for one, other in zip(first, read, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if field.name in ("attention", "effect", "masses"):
                assert (a is None and b is None) or np.array_equal(a, b)
            elif field.name == "sites":
                assert json.dumps(a) == json.dumps(b)
            else:
                assert a == b
    assert Store(folder).piece("a_b: c", "piece", lambda: []) == []  # another label
    assert Store(folder).numbers("m", "0", lambda: {"x": float("nan"), "y": 1.0})["y"] == 1
    again = Store(folder).numbers("m", "0", dict)
    assert np.isnan(again["x"])
    assert again["y"] == 1


# ---- real pipelines


def test_the_unet_and_the_transformer_on_shipped_pieces(pipe, dit, tmp_path):
    """Every figure of a real pair against the parts that it is made of, called one by one."""
    pieces = slakh.pieces(freedoom_root(), "test")[:3]
    options = {"seconds": SECONDS, "timesteps": (300,), "draws": 1, "absent": 1, "most": 2, "resamples": 199}
    out = tmp_path / "out"
    found = compare(pipe, dit, pieces, labels=("unet", "dit"), out=out, **options)
    assert sorted(found.files) == sorted(
        ["compare.json", "results.json", "scores.csv", "tests.csv", "table.md"]
        + [f"figures/{name}.png" for name in ("maps-300", "contrasts", "sites")]
    )
    assert all((out / name).stat().st_size > 0 for name in found.files)
    held = json.loads((out / "results.json").read_text())
    assert held["models"] == ["unet", "dit"]
    assert len(held["rows"]) == len(found.rows)
    assert json.loads((out / "compare.json").read_text())["complete"] is True

    grid = MelGrid(128, 64, duration=SECONDS)
    clips, _ = make_clips(pieces, held["configuration"]["words"], grid, seconds=SECONDS, most=2, absent=1)
    for label, model in (("unet", pipe), ("dit", dit)):
        looked, done = [], []
        for clip in clips:
            maps = probe(model, clip.mix, clip.sample_rate, clip.prompt, timesteps=(300,), draws=1)
            attention = project(at_timestep(maps, 300), grid)
            less = {word: next(o for o in clip.words if o != word) for word in clip.words}
            effect = effect_map(
                model,
                clip.prompt,
                waveform=clip.mix,
                sample_rate=clip.sample_rate,
                words=list(clip.words),
                without=less,
                draws=1,
                grid=grid,
                batch=1,
            )
            masks = {w: m for w, m in clip.targets["dominance"].items() if 0.02 < m.mean() < 0.9}
            looked.append([average_precision(attention.sel(word=w)[0], mask) for w, mask in masks.items()])
            done.append([average_precision(effect.sel(word=w)[0], mask) for w, mask in masks.items()])
        for kind, scores in (("attention", looked), ("effect", done)):
            mean = np.mean([np.mean(of) for of in scores if of])
            assert found.find("score", model=label, map=kind, level=300)["value"] == pytest.approx(mean, abs=1e-4)
    assert any("the attention of dit has no frequency axis" in note for note in found.notes)
    assert not any("the attention of unet has no" in note for note in found.notes)
    time_only = found.find("score", map="oracle_projection", model="dit")["value"]
    assert time_only < found.find("score", map="oracle_projection", model="unet")["value"]


def test_fresh_weights_of_real_pipelines(pipe, dit):
    for model, part in ((pipe, "unet"), (dit, "transformer")):
        before = torch.get_rng_state()
        made = with_fresh_weights(model, 0)
        assert torch.equal(before, torch.get_rng_state())
        assert type(made) is type(model)
        assert made.vae is model.vae
        assert made.vocoder is model.vocoder
        own, fresh = getattr(model, part).state_dict(), getattr(made, part).state_dict()
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in fresh.items()}
        changed = [k for k in own if not torch.equal(own[k], fresh[k])]
        assert len(changed) > 0.4 * len(own)  # norms and biases begin at constants
        assert not any(m.training for m in getattr(made, part).modules())
        texts = [p for p in ("text_encoder_2", "text_encoder") if hasattr(model, p)]
        state, theirs = (getattr(p, texts[0]).state_dict() for p in (model, made))
        assert any(not torch.equal(state[k], theirs[k]) for k in state)
    fresh = [with_fresh_weights(dit, seed).transformer.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(value, fresh[1][key]) for key, value in fresh[0].items())
    assert not all(torch.equal(value, fresh[2][key]) for key, value in fresh[0].items())
    with pytest.raises(CannotReinitialise, match="unet .Denoiser. has no configuration"):
        with_fresh_weights(Pipe("text"), 0)
    with pytest.raises(CannotReinitialise, match="Module does not list its components"):
        with_fresh_weights(nn.Module(), 0)


# ---- the command


def aiba(*arguments, code=0):
    from aiba_eval.cli.app import app

    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def test_the_command_compares_and_resumes(tmp_path):
    out = tmp_path / "out"
    short = ["--pieces", 3, "--seconds", SECONDS, "--draws", 1, "--timestep", 300, "--absent", 1, "--out", out]
    text, progress = aiba("compare", "demo:random", "demo:random", *short)
    assert "measuring both models …" in progress
    assert max(map(len, text.partition("•")[0].splitlines())) <= 80
    for shown in (
        "demo:random (1)",
        "oracle_projection",
        "word swap",
        "neutral ÷ present",
        "Holm",
        "• 3 pieces, 3 clips",
    ):
        assert shown in text
    document = json.loads(aiba("compare", "demo:random", "demo:random", *short, "--json")[0])
    assert {test["difference"] for test in document["tests"]} == {0}
    assert document["out"] == str(out)
    assert "results.json" in document["files"]
    _, error = aiba("compare", "demo:random", "demo:random", *short, "--seed", 1, code=2)
    assert "seed 0 there and 1 now" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stems", "nowhere"], "no Slakh layout under nowhere"),
        (["--split", "night"], "has no split 'night'"),
        (["--word", "kazoo"], "no piece has 'kazoo'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path):
    assert message in aiba("compare", "demo:random", "demo:random", *arguments, "--out", tmp_path / "o", code=2)[1]


def test_sets_without_a_training_split_take_priors_of_the_other_pieces(monkeypatch):
    asked = {}
    monkeypatch.setattr("aiba_eval.comparing.compare", lambda a, b, pieces, **o: asked.update(o, pieces=pieces))
    compare_on("a", "b", max_pieces=2, seed=3)
    assert [piece.split for piece in asked["pieces"]] == ["test", "test"]
    assert asked["training"] is None
    assert asked["seed"] == 3
    compare_on("a", "b", training="validation")
    assert {piece.split for piece in asked["training"]} == {"validation"}
    compare_on("a", "b", split="validation", training="validation")
    assert asked["training"] is None


# ---- the evidence


def test_the_evidence_says_what_is_shown_and_what_is_not(result, tmp_path):
    path = Path(__file__).parents[1] / "examples" / "evidence_effects.py"
    spec = importlib.util.spec_from_file_location("evidence_effects", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def row(value, low, **key):
        key = {"map": "effect", "target": "", "word": "all", "model": "demo:dit", **key}
        return {**key, "value": value, "low": low, "high": 0.9, "pieces": 22}

    rows = [
        row(0.2, 0.1, measure="word_swap", target="dominance", level=300),
        row(0.18, 0.1, measure="word_swap", target="dominance_60", level=300),
        row(0.04, -0.01, measure="piece_swap", target="dominance", level=300),
        row(0.04, 0.01, measure="piece_swap", target="dominance_60", level=300),
        row(0.8, 0.7, measure="presence", level=800),
        row(0.7, 0.6, measure="power_presence", level=800),
        row(0.1, 0.05, measure="neutral_share", level=300),
        row(0.3, 0.2, measure="neutral_share", level=800),
    ]
    keys = ("model", "map", "level", "target", "measure", "value")
    fresh = [{**{k: r[k] for k in keys}, "fresh": [-0.01, 0.02], "p": 1 / 3, "outside": True} for r in rows[:3]]
    made = dataclasses.replace(result, models=script.MODELS, rows=rows, fresh=fresh)
    shown = script.requirements(made)
    met = {(r["measure"], r["target"], r["level"]): (r["met"], r["outside_fresh"]) for r in shown}
    assert met == {
        ("word_swap", "dominance", 300): (True, True),
        ("word_swap", "dominance_60", 300): (False, True),
        ("piece_swap", "dominance", 300): (False, True),  # its interval is not above 0
        ("piece_swap", "dominance_60", 300): (True, None),
        ("presence", "", 800): (True, None),
        ("power_presence", "", 800): (False, None),
        ("neutral_share", "", 300): (True, None),
        ("neutral_share", "", 800): (False, None),
    }
    text = script.document(made, shown, [r | {"high": 0.3} for r in rows])
    assert (
        "| demo:dit effect t = 300 word_swap (dominance) | at least 0.19, interval above 0 | 0.200 [0.100, 0.900], n = 22 |"
        in text
    )
    assert [line.endswith("| shown |") for line in text.splitlines() if line.startswith("| demo:dit effect t")] == [
        True,
        *[False] * 7,
    ]
    assert "| 300 | dominance_60 | 0.180 [0.100, 0.300] | 0.040 [0.010, 0.300] |" in text  # of the sweep
    assert "| demo:dit effect | 300 | word_swap (dominance) | 0.200 | −0.010 to 0.020 | 0.333 | yes |" in text
    assert "Noise levels" not in script.document(made, shown)


# ---- figures


def test_the_side_by_side_figure_has_a_row_for_each_word_and_a_scale_for_each_column():
    grid = MelGrid(16, 8, duration=1.0)
    rng = np.random.default_rng(0)
    words = ("bass", "drums")
    masks = {w: rng.random(grid.shape) < 0.3 for w in words}
    flat = {w: np.full(grid.shape, 0.2) for w in words}
    loud = {"bass": rng.random(grid.shape), "drums": 5 * rng.random(grid.shape) ** 4}
    mel = np.log(rng.random(grid.shape) + 1e-3)
    figure = figures.side_by_side_figure(mel, masks, {"A attention": flat, "B effect": loud}, grid=grid, title="t")
    panels = np.array(figure.axes).reshape(2, 4)
    assert [axes.get_title() for axes in panels[0]] == ["mix", "mask", "A\nattention", "B\neffect"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["bass\nHz", "drums\nHz"]
    np.testing.assert_array_equal(panels[1, 1].images[0].get_array(), masks["drums"].T)
    shown = [axes.images[0] for axes in panels[:, 3]]
    np.testing.assert_allclose(shown[1].get_array(), (loud["drums"] / loud["drums"].mean()).T)
    assert shown[0].get_clim() == shown[1].get_clim() == figures.shared_limits(loud)
    assert panels[0, 2].images[0].get_clim() == (0.9, 1.1)
    assert panels[1, 2].get_xlabel() == "÷ mean: 0.9 to 1.1"
    with pytest.raises(ValueError, match="the column 'A' has no map of 'drums'"):
        figures.side_by_side_figure(mel, masks, {"A": {"bass": loud["bass"]}}, grid=grid)
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.side_by_side_figure(mel, {}, {"A": {}}, grid=grid)


def test_the_contrast_figure_draws_values_intervals_and_fresh_ranges(result):
    key = {"model": "audio", "map": "effect", "level": 5, "target": "dominance", "measure": "word_swap"}
    fresh = [{**key, "fresh": [-0.1, 0.05]}]
    figure = figures.contrast_figure(result.rows, result.models, fresh)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert set(panels) == {"AP − chance", "word swap (AP)", "piece swap (AP)", "presence (AUROC)"}
    swap = panels["word swap (AP)"]
    assert [label.get_text() for label in swap.get_xticklabels()] == [
        f"{kind}\nt = {level}" for kind in ("attention", "effect") for level in (5, 300)
    ]
    text, audio = swap.containers
    row = result.find("word_swap", model="audio", map="effect", level=5)
    assert audio[2].get_height() == pytest.approx(row["value"])
    line = swap.collections[1].get_segments()[2]
    np.testing.assert_allclose(line[:, 1], [row["low"], row["high"]])
    grey = [patch for patch in swap.patches if patch not in (*text, *audio)]
    assert [(patch.get_y(), round(patch.get_height(), 6)) for patch in grey] == [(-0.1, 0.15)]
    heard = panels["presence (AUROC)"].containers[1][0]
    assert (heard.get_y(), heard.get_height()) == (0.5, 0.5)
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.contrast_figure([], ("a", "b"))


def test_the_site_figure_has_a_line_for_each_level_and_does_not_stretch_a_flat_one(result):
    figure = figures.site_figure(result.profiles, result.models)
    entropy, mass = figure.axes[:2]
    assert entropy.get_title(loc="left") == "text: entropy over words"
    assert [line.get_label() for line in entropy.lines[:2]] == ["t = 5", "t = 300"]
    assert entropy.get_ylim()[0] <= 0.9
    assert mass.get_ylim() == (-0.02, 1.02)
    padding = next(line for line in mass.lines if line.get_label() == "padding, t = 5")
    expected = [r["padding_mass"] for r in result.profiles if (r["model"], r["level"]) == ("text", 5)]
    np.testing.assert_allclose(padding.get_ydata(), expected)
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.site_figure([], ("a", "b"))
