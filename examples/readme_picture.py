"""The picture in README.md: one real mix, where its instruments are, and what two models attend to and do for each word.

    python examples/readme_picture.py [--models demo:unet demo:dit] [--piece 0] [--out docs/images/models.png]

The mix is a test piece of the stem set that ships with the package, which neither model was trained on. It is noised to a known
level; each model is asked once per draw of noise, under capture, and with and without each word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aiba_eval import MelGrid, figures
from aiba_eval.clip_maps import clip_maps
from aiba_eval.clips import make_clips
from aiba_eval.datasets import freedoom_root, slakh
from aiba_eval.loading import load

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "models.png"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo:unet", "demo:dit"], help="names, folders or hub ids")
    parser.add_argument("--piece", type=int, default=0, help="which test piece")
    parser.add_argument("--seconds", type=float, default=2.56, help="length of the clip")
    parser.add_argument("--seed", type=int, default=0, help="of the clip's place and of the noise")
    parser.add_argument("--timestep", type=int, default=800, help="noise level, as a timestep of the models' training")
    parser.add_argument("--draws", type=int, default=4, help="draws of noise to average")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    options = parser.parse_args(arguments)

    piece = slakh.pieces(freedoom_root(), split="test")[options.piece]
    grid = MelGrid(128, 64, duration=options.seconds)
    (clip,), _ = make_clips([piece], piece.instruments, grid, seconds=options.seconds, seed=options.seed)
    columns = {}
    for name in options.models:
        found = clip_maps(
            name,
            load(name, device="cpu").pipeline,
            clip,
            grid,
            timesteps=[options.timestep],
            draws=options.draws,
            seed=options.seed,
        )
        columns[f"{name} attention"] = dict(zip(clip.words, found.attention[0], strict=True))
        if found.effect is not None:
            columns[f"{name} effect"] = dict(zip(clip.words, found.effect[0], strict=True))
    figure = figures.side_by_side_figure(
        grid.spectrogram(clip.mix, clip.sample_rate),
        clip.targets["dominance"],
        columns,
        grid=grid,
        title=f"{piece.name} of Freedoom at {clip.start:.1f} s, prompt {clip.prompt!r}, t = {options.timestep}",
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return figures.save(figure, options.out, dpi=90)


if __name__ == "__main__":
    print(main())
