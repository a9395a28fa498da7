"""Closed forms against simulation, and the reference maps."""

import math

import numpy as np
import pytest
import torch

from aiba_eval import MelGrid, metrics, references

SHAPE = (16, 12)
OPTIONS = {"threshold": 0.6, "thresholds": (0.0, 0.3, 0.6, 0.9), "mel_tolerance": 1, "time_tolerance": 1}


def mask_of(area, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    mask.ravel()[rng.permutation(mask.size)[: round(area * mask.size)]] = True
    return mask


@pytest.mark.parametrize("area", [0.1, 0.3, 0.7])
def test_chance_is_what_shuffled_cells_score(area):
    rng = np.random.default_rng(1)
    mask, saliency = mask_of(area), rng.random(SHAPE) ** 3
    draws = [metrics.evaluate(rng.permutation(saliency.ravel()).reshape(SHAPE), mask, **OPTIONS) for _ in range(400)]
    expected = references.chance(mask, saliency, **OPTIONS)
    assert tuple(expected) == metrics.METRICS
    for name, level in expected.items():
        scores = np.array([d[name] for d in draws])
        error = 4 * scores.std() / math.sqrt(len(draws))
        if name.startswith(("profile", "temporal")):
            assert math.isnan(level)
            assert abs(scores.mean()) < error
        elif name == "average_precision":
            exact = references.chance_average_precision(mask.mean(), mask.size)
            assert abs(scores.mean() - exact) < error
            assert 0 < exact - level < (1 + math.log(mask.size)) / mask.size
        elif name.startswith("iou"):
            assert scores.mean() == pytest.approx(level, abs=error + 0.005)  # a ratio of expectations
        else:
            assert abs(scores.mean() - level) < error + 1e-12, name


def test_closed_forms():
    assert references.chance_average_precision(0.3) == 0.3
    assert references.chance_average_precision(0.5, 2) == pytest.approx((1 + 0.5) / 2)  # first or second of two
    assert references.chance_iou(0.2, 1.0) == pytest.approx(0.2)
    assert references.chance_iou(0.2, 0.0) == references.chance_iou(0.0, 0.0) == 0.0
    assert references.chance_f1(19 / 64, 1.0) == pytest.approx(0.458, abs=1e-3)
    assert references.chance_f1(5 / 64, 1.0) == pytest.approx(0.145, abs=1e-3)
    assert references.chance_f1(0.0, 0.0) == 0.0


def test_uniform_map_scores_chance_and_all_on_what_it_says():
    mask = mask_of(0.25)
    saliency = references.uniform(MelGrid(time=16, mel=12))
    got, level = metrics.evaluate(saliency, mask), references.chance(mask, saliency)
    for name in metrics.METRICS:
        if math.isnan(level[name]):
            assert math.isnan(got[name])
        else:
            assert got[name] == pytest.approx(level[name])
    barely = np.ones(SHAPE)
    barely[np.argwhere(~mask)[0][0], np.argwhere(~mask)[0][1]] = 0.0  # all on but one cell
    everything = references.all_on(mask)
    precision, recall, f1 = metrics.precision_recall_f1(barely, mask)
    near = {"iou": metrics.iou(barely, mask), "precision": precision, "recall": recall, "f1": f1}
    assert everything == pytest.approx(near, abs=2e-3)
    assert references.uniform().shape == (128, 64)


@pytest.mark.parametrize("value", [0, 1])
def test_trivial_masks_have_no_chance_level(value):
    mask = np.full(SHAPE, value, bool)
    assert all(math.isnan(v) for v in references.chance(mask, np.ones(SHAPE)).values())
    assert all(math.isnan(v) for v in references.all_on(mask).values())


def test_chance_without_a_map_knows_what_does_not_depend_on_it():
    level = references.chance(mask_of(0.25))
    known = {k for k, v in level.items() if not math.isnan(v)}
    assert known == {"average_precision", "pointing_game", "mass_accuracy", "rank_accuracy"}


def test_mix_energy():
    wave = np.sin(2 * np.pi * 100 * np.arange(32000) / 16000)
    grid = MelGrid()
    for scale in ("log", "power"):
        energy = references.mix_energy(wave, 16000, grid, scale=scale)
        assert energy.shape == (128, 64)
        assert energy.min() >= 0
        assert (energy.argmax(1) <= 3).all()
    assert not references.mix_energy(np.zeros(32000), 16000).any()
    log = references.mix_energy(wave, 16000)
    np.testing.assert_allclose(log + np.log(1e-5), grid.spectrogram(wave, 16000), atol=1e-5)
    with pytest.raises(ValueError, match="scale"):
        references.mix_energy(wave, 16000, scale="dB")


def test_class_prior():
    masks = [mask_of(0.3, seed) for seed in range(5)]
    prior = references.class_prior(masks)
    np.testing.assert_allclose(prior, np.tile(np.mean(masks, axis=(0, 1)), (16, 1)))
    np.testing.assert_allclose(references.class_prior(iter(masks), frequency_only=False), np.mean(masks, axis=0))
    with pytest.raises(ValueError, match="no masks"):
        references.class_prior([])
    with pytest.raises(ValueError, match=r"\(16, 12\), then \(12, 16\)"):
        references.class_prior([masks[0], masks[1].T])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        references.class_prior([np.ones(3)])


@pytest.mark.parametrize("lattice", [(128, 64), (32, 4), (100, 8), (25, 2), (64, 1)])
def test_oracle_projection_is_area_down_and_bilinear_up(lattice):
    mask = mask_of(0.3, shape=(128, 64))
    rows = torch.as_tensor(mask[None, None].astype(float))
    if all(n % m == 0 for n, m in zip(mask.shape, lattice)):
        down = torch.nn.functional.adaptive_avg_pool2d(rows, lattice)
    else:  # exact areas through the least common multiple
        fine = np.repeat(mask, lattice[0], 0).reshape(lattice[0], -1, 64).mean(1)
        down = torch.as_tensor(np.repeat(fine, lattice[1], 1).reshape(lattice[0], lattice[1], -1).mean(2))[None, None]
    expected = torch.nn.functional.interpolate(down, size=(128, 64), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(references.oracle_projection(mask, lattice), expected.numpy(), atol=1e-12)


def test_oracle_projection_uses_the_finest_lattice():
    mask = np.zeros((128, 64), bool)
    mask[:, :5] = True
    several = references.oracle_projection(mask, [(25, 2), (100, 8), (50, 4)])
    np.testing.assert_array_equal(several, references.oracle_projection(mask, (100, 8)))
    np.testing.assert_array_equal(references.oracle_projection(mask, (128, 64)), mask)
    precisions = [metrics.average_precision(references.oracle_projection(mask, (25, n)), mask) for n in (64, 8, 1)]
    assert precisions[0] == 1
    assert precisions[0] >= precisions[1] > precisions[2]
    assert precisions[2] == pytest.approx(mask.mean())
    for lattice in ((0, 4), (2.5, 4), (8,), [(1, 2, 3)]):
        with pytest.raises(ValueError, match="lattice"):
            references.oracle_projection(mask, lattice)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        references.oracle_projection(np.ones(5), (2, 2))


def test_prior_times_mix():
    rng = np.random.default_rng(0)
    prior, mix = rng.random(SHAPE), rng.random(SHAPE) * 9
    product = references.prior_times_mix(prior, mix)
    assert product[3, 4] == prior[3, 4] * mix[3, 4]
    np.testing.assert_array_equal(references.prior_times_mix(prior, np.ones(SHAPE)), prior)
    with pytest.raises(ValueError, match=r"one shape, got \(16, 12\) and \(12, 16\)"):
        references.prior_times_mix(prior, mix.T)
    with pytest.raises(ValueError, match="mix must be finite and non-negative"):
        references.prior_times_mix(prior, np.log(mix))


def test_time_shift_moves_time_only():
    saliency = np.random.default_rng(0).random(SHAPE)
    shifted = references.time_shift(saliency, 0.25)
    for t in range(SHAPE[0]):
        np.testing.assert_array_equal(shifted[(t + 4) % 16], saliency[t])
    np.testing.assert_array_equal(references.time_shift(saliency), np.roll(saliency, 6, axis=0))
    band = np.zeros(SHAPE, bool)
    band[:, :3] = True
    assert metrics.average_precision(shifted, band) == pytest.approx(metrics.average_precision(saliency, band))
    assert sum(references.SHIFTS) == pytest.approx(1)
    for wrong in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="cannot be shifted"):
            references.time_shift(saliency, wrong)
    with pytest.raises(ValueError, match=r"\(16,\)"):
        references.time_shift(saliency[:, 0])
