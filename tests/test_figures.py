"""Figures: what is on them, that their scales are honest, and that their text does not overlap."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from aiba_eval import MelGrid, figures, metrics, templates

GRID = MelGrid(duration=4.0)


@pytest.fixture
def heats():
    rng = np.random.default_rng(0)
    low = np.linspace(2, 0.5, GRID.mel)[None] * np.ones((GRID.time, 1))
    return {"bass": low, "drums": 0.2 + 0.01 * rng.random(GRID.shape)}


@pytest.fixture
def bands():
    measured = {word: templates.band_mask(word, GRID, "measured") for word in ("bass", "drums")}
    return {"measured band": measured, "paper band": {"bass": templates.band_mask("bass", GRID)}}


def panels_of(figure, count):
    return figure.axes[:count]


def texts_overlap(figure, texts):
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 1
    return any(a.overlaps(b) for a, b in combinations(boxes, 2))


# ---- profile


def test_profile_has_a_panel_a_line_and_templates_for_each_word(heats, bands):
    figure = figures.profile_figure(heats, bands, grid=GRID, title="a bass and drums")
    panels = panels_of(figure, 2)
    assert [axes.get_title(loc="left") for axes in panels] == ["bass", "drums"]
    assert figure.get_suptitle() == "a bass and drums"
    assert panels[-1].get_xlabel() == "Hz (mel scale, slaney)"
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    assert [label.split("\n")[0] for label in labels[0]] == ["attention to 'bass'", "measured band", "paper band"]
    assert [label.split("\n")[0] for label in labels[1]] == ["attention to 'drums'", "measured band"]


def test_profile_draws_attention_over_its_mean(heats, bands):
    figure = figures.profile_figure(heats, bands, grid=GRID)
    line = panels_of(figure, 2)[0].patches[0].get_data()
    np.testing.assert_allclose(line.values, heats["bass"].mean(0) / heats["bass"].mean())
    np.testing.assert_array_equal(line.edges, np.arange(GRID.mel + 1))


def test_profile_says_the_correlation_beside_that_of_the_mix(heats, bands):
    mix = np.linspace(0, 1, GRID.mel)[None] * np.ones((GRID.time, 1))
    figure = figures.profile_figure(heats, bands, grid=GRID, mix=mix)
    text = panels_of(figure, 2)[0].get_legend().get_texts()[1].get_text()
    own = metrics.profile_pearson(heats["bass"], bands["measured band"]["bass"])
    blind = metrics.profile_pearson(mix, bands["measured band"]["bass"])
    assert text == f"measured band\nr = {own:+.2f}, mix energy {blind:+.2f}".replace("-", "−")


def test_bands_are_outlines_and_masks_that_change_over_time_are_areas(heats, bands):
    mask = np.zeros(GRID.shape, bool)
    mask[:64, :8] = True
    figure = figures.profile_figure({"bass": heats["bass"]}, {"its stem": {"bass": mask}, **bands}, grid=GRID)
    twin = figure.axes[1]
    assert [patch.get_fill() for patch in twin.patches] == [True, False, False]
    assert twin.patches[0].get_data().values[:8] == pytest.approx(0.5)


def test_a_template_looks_the_same_in_every_panel(heats, bands):
    targets = {"paper band": bands["paper band"], "measured band": bands["measured band"]}  # drums have the second only
    figure = figures.profile_figure(heats, targets, grid=GRID)
    bass, drums = figure.axes[2:]
    assert drums.patches[0].get_edgecolor() == bass.patches[1].get_edgecolor() != bass.patches[0].get_edgecolor()


def test_a_flat_map_looks_flat(bands):
    flat = 0.3 * (1 + 0.001 * np.random.default_rng(0).random(GRID.shape))
    low, high = panels_of(figures.profile_figure({"bass": flat}, bands, grid=GRID), 1)[0].get_ylim()
    assert low <= 0.9
    assert high >= 1.1
    assert figures.shared_limits({"bass": flat}) == (0.9, 1.1)


def test_panels_share_their_scale(heats, bands):
    first, second = panels_of(figures.profile_figure(heats, bands, grid=GRID), 2)
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim() == (0, GRID.mel)


def test_profile_without_words_is_refused():
    with pytest.raises(ValueError, match="no words"):
        figures.profile_figure({}, {}, grid=GRID)


# ---- overlay


def test_overlay_has_three_panels_in_seconds_and_hertz(heats):
    mel = np.log(np.maximum(heats["bass"], 1e-5))
    figure = figures.overlay_figure(
        mel, heats["bass"], grid=GRID, word="bass", title="a bass", shared_by=["bass", "drums"]
    )
    panels = panels_of(figure, 3)
    assert [axes.get_title() for axes in panels] == [
        "mel spectrogram",
        "attention to 'bass' over it",
        "attention to 'bass'",
    ]
    assert {axes.get_xlabel() for axes in panels} == {"time (s)"}
    assert panels[0].get_xlim() == (0, 4.0)
    assert panels[0].get_ylabel().startswith("Hz")
    bars = [axes.get_ylabel() for axes in figure.axes[3:]]
    assert bars == ["dB below the maximum", "attention ÷ its mean\nscale shared with 'drums'"]


def test_hertz_stand_where_they_are_on_the_mel_axis(heats):
    axes = panels_of(figures.overlay_figure(heats["bass"], heats["bass"], grid=GRID), 1)[0]
    ticks = {label.get_text(): position for label, position in zip(axes.get_yticklabels(), axes.get_yticks())}
    assert ticks["1k"] == pytest.approx(float(GRID.hz_to_row(1000)))
    assert ticks["8k"] == pytest.approx(GRID.mel)
    # AudioLDM2's mel: 2 kHz lies at bin 36 of 64
    assert ticks["2k"] == pytest.approx(36, abs=1)


def test_low_frequencies_and_early_times_are_at_the_lower_left():
    heat = np.ones(GRID.shape)
    heat[:32, :8] = 3.0
    figure = figures.overlay_figure(heat, heat, grid=GRID)
    image = panels_of(figure, 3)[2].images[0]
    assert image.origin == "lower"
    assert image.get_extent() == [0, 4.0, 0, GRID.mel]
    drawn = np.asarray(image.get_array())
    assert drawn.shape == (GRID.mel, GRID.time)
    assert drawn[0, 0] == drawn.max()
    assert drawn[-1, -1] == drawn.min()


def test_the_colour_scale_is_the_shared_one(heats):
    limits = figures.shared_limits(heats)
    for heat in heats.values():
        figure = figures.overlay_figure(heat, heat, grid=GRID, limits=limits)
        assert figure.axes[2].images[0].get_clim() == limits
        assert figure.axes[1].images[1].get_clim() == limits
    assert limits[1] == pytest.approx(heats["bass"].max() / heats["bass"].mean())


def test_spectrogram_is_in_decibels():
    mel = np.full(GRID.shape, np.log(1e-3))
    mel[0, 0] = 0.0  # 60 dB above the rest
    image = np.asarray(figures.overlay_figure(mel, np.ones(GRID.shape), grid=GRID).axes[0].images[0].get_array())
    assert image.max() == 0
    assert image.min() == pytest.approx(-60)


def test_the_mask_is_outlined_and_named(heats):
    mask = templates.band_mask("drums", GRID, "measured")
    figure = figures.overlay_figure(heats["drums"], heats["drums"], grid=GRID, mask=mask, mask_label="its band")
    assert figure.get_supxlabel() == "white outline: its band"
    assert [len(axes.collections) for axes in panels_of(figure, 3)] == [0, 1, 1]


@pytest.mark.parametrize("name", ["mel", "heat", "mask"])
def test_another_shape_is_refused(name):
    arrays = {
        "mel": np.ones(GRID.shape),
        "heat": np.ones(GRID.shape),
        "mask": np.ones(GRID.shape),
        name: np.ones((3, 4)),
    }
    with pytest.raises(ValueError, match=rf"{name} has shape \(3, 4\), the grid is \(128, 64\)"):
        figures.overlay_figure(arrays["mel"], arrays["heat"], grid=GRID, mask=arrays["mask"])


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_map_without_attention_can_be_drawn(value, tmp_path, bands):
    empty = np.full(GRID.shape, value)
    figures.save(figures.profile_figure({"bass": empty}, bands, grid=GRID), tmp_path / "profile.png")
    figures.save(figures.overlay_figure(np.zeros(GRID.shape), empty, grid=GRID), tmp_path / "overlay.png")
    assert len(list(tmp_path.iterdir())) == 2


# ---- reading it


GRIDS = [GRID, MelGrid(64, 256, fmax=24000, sample_rate=48000, scale="htk"), MelGrid(32, 16, duration=1.0, fmax=4000)]


@pytest.mark.parametrize("grid", GRIDS, ids=["default", "wide", "small"])
def test_labels_do_not_overlap(grid):
    heats = {word: np.ones(grid.shape) for word in ("bass", "drums", "a rather long phrase of words")}
    masks = {word: np.eye(*grid.shape) for word in heats}
    profile = figures.profile_figure(heats, {"one": masks, "two": masks}, grid=grid, title="a title")
    panels = panels_of(profile, 3)
    assert not texts_overlap(profile, [*panels[-1].get_xticklabels(), panels[-1].xaxis.label])
    assert not texts_overlap(profile, panels[0].get_yticklabels())
    assert not texts_overlap(profile, [text for axes in panels for text in axes.get_legend().get_texts()])
    overlay = figures.overlay_figure(
        heats["bass"], heats["bass"], grid=grid, word="a rather long phrase", mask=masks["bass"], title="a title"
    )
    panels = panels_of(overlay, 3)
    assert not texts_overlap(overlay, [*panels[0].get_yticklabels(), panels[0].yaxis.label])
    assert not texts_overlap(overlay, [axes.title for axes in panels])


def test_the_same_figure_gives_the_same_bytes(heats, bands, tmp_path):
    paths = [figures.save(figures.profile_figure(heats, bands, grid=GRID), tmp_path / f"{i}.png") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_pyplot_is_not_imported():
    code = (
        "import sys, numpy as np\n"
        "from aiba_eval import MelGrid, figures\n"
        "ones = np.ones((128, 64))\n"
        "figures.profile_figure({'a': ones}, {}); figures.overlay_figure(ones, ones)\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
