"""The picture in README.md: a real mix, what the model attends to for one of its words, and where that instrument is.

    python examples/readme_picture.py [--model demo:random] [--word bass] [--out docs/images/attention.png]

The mix is the first test piece of the stem set that ships with the package. It is noised to a known level, the denoiser
runs once under capture, and the outline shows the cells that the instrument's own stem dominates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aiba_eval import MelGrid, figures, project, templates
from aiba_eval.datasets import freedoom_root, slakh
from aiba_eval.loading import load
from aiba_eval.probe import probe

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "attention.png"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo:random", help="name, folder or hub id of a pipeline of AudioLDM2's class"
    )
    parser.add_argument("--word", default="bass", help="an instrument of the piece")
    parser.add_argument("--timestep", type=int, default=800, help="noise level, as a timestep of the model's training")
    parser.add_argument("--draws", type=int, default=4, help="draws of noise to average")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    options = parser.parse_args(arguments)

    piece = slakh.pieces(freedoom_root(), split="test")[0]
    grid = MelGrid(128, 64, duration=piece.seconds)
    mix = piece.mix()
    stems = {name: grid.power(piece.stem(name), piece.sample_rate) for name in piece.instruments}
    model = load(options.model, device="cpu")
    prompt = " and ".join(piece.instruments)
    maps = probe(
        model.pipeline,
        mix,
        piece.sample_rate,
        prompt,
        words=piece.instruments,
        timesteps=[options.timestep],
        draws=options.draws,
    )
    heats = project(maps, grid)[0]
    weights = "" if model.trained else " (random weights: its map means nothing)"
    figure = figures.overlay_figure(
        grid.spectrogram(mix, piece.sample_rate),
        heats.sel(word=options.word).values,
        grid=grid,
        word=options.word,
        mask=templates.dominance_mask(stems, options.word),
        mask_label=f"cells where the {options.word} stem has more than half of the power",
        title=f"{piece.name} of Freedoom, prompt {prompt!r}, {model.name}{weights}",
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return figures.save(figure, options.out, dpi=90)


if __name__ == "__main__":
    print(main())
