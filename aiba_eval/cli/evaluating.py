"""`aiba evaluate` and `aiba reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aiba_eval.cli.options import Device, Dtype, DtypeOption, Json, Model, Overwrite, Seed
from aiba_eval.cli.show import Report, expected_errors

Dask = Annotated[
    str | None,
    typer.Option(
        help="Spread items over dask workers: local:N processes, or a scheduler's address such as tcp://host:8786."
    ),
]
Root = Annotated[
    Path | None, typer.Option(help="Your copy of the dataset. Default: the set that ships with the package.")
]
Pieces = Annotated[int | None, typer.Option(min=1, help="So many pieces at most of each split.")]


def evaluate(
    model: Model,
    protocol: Annotated[
        str, typer.Option(help="probe: the dataset's own mixes, noised; generate: one prompt per instrument class.")
    ] = "probe",
    dataset: Annotated[str, typer.Option(help="A dataset's name; `aiba plugins` lists them.")] = "slakh",
    root: Root = None,
    split: Annotated[str, typer.Option(help="Whose pieces are evaluated: held out from training.")] = "test",
    training: Annotated[str, typer.Option(help="Split of class priors and profiles, if the set has it.")] = "train",
    validation: Annotated[
        str, typer.Option(help="Split that layer weights are fitted on, if the set has it.")
    ] = "validation",
    pieces: Pieces = None,
    word: Annotated[
        list[str] | None, typer.Option(help="An instrument that prompts may name; repeat for more. Default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a window or of generated audio.")] = 8.0,
    timestep: Annotated[
        list[int] | None,
        typer.Option(help="probe: a noise level, as a timestep of training; repeat. Default: 300, 800."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="probe: draws of noise for each level.")] = 4,
    windows: Annotated[int, typer.Option(min=1, help="probe: windows of each piece.")] = 1,
    seed: Seed = 0,
    sample: Annotated[
        int, typer.Option(min=1, help="generate: samples of every class, with the seeds SEED, SEED + 1, …")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, help="generate: denoiser steps.")] = 50,
    guidance: Annotated[float, typer.Option(min=0.0, help="generate: guidance scale.")] = 2.5,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Add the grid of ablations: one change to the default each.")
    ] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="A further variant, such as 'late: steps=late,spatial=max'; repeat for more."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric; repeat for more. Default: all.")] = None,
    reinitialisations: Annotated[
        int, typer.Option(min=0, help="Control: models with fresh weights; 20 or more to conclude.")
    ] = 0,
    prompt_swap: Annotated[bool, typer.Option("--prompt-swap", help="Control: another piece's prompt.")] = False,
    absent: Annotated[
        bool, typer.Option("--absent", help="Control: instruments that the piece does not have.")
    ] = False,
    neutral: Annotated[bool, typer.Option("--neutral", help="Control: edits that change no instrument.")] = False,
    noise_seeds: Annotated[int, typer.Option(min=0, help="Control: further seeds of the noise.")] = 0,
    maps: Annotated[bool, typer.Option(help="Keep every site's maps, which the report's sliders need.")] = True,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch, in every process; the last bits of results depend on it.")
    ] = 1,
    dask: Dask = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped one goes on there.")] = Path(
        "aiba-evaluation"
    ),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Score a model's attention on many pieces, beside every reference and control; goes on where it was stopped."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.evaluation import ABLATIONS, Configuration, Variant, evaluate_on
        from aiba_eval.metrics import METRICS

        variants = {"default": Variant(), **(dict(ABLATIONS) if ablate else {})}
        for text in variant or ():
            name, _, what = text.rpartition(":")
            variants[name.strip() or what.strip()] = Variant.parse(what)
        configuration = Configuration(
            protocol=protocol,  # type: ignore[arg-type]  # checked there
            words=tuple(word) if word else None,
            seed=seed,
            seconds=seconds,
            timesteps=tuple(timestep or (300, 800)),
            draws=draws,
            windows=windows,
            seeds=tuple(range(seed, seed + sample)),
            steps=steps,
            guidance=guidance,
            variants=variants,
            metrics=tuple(metric) if metric else METRICS,
            reinitialisations=reinitialisations,
            prompt_swap=prompt_swap,
            absent=absent,
            neutral=neutral,
            noise_seeds=noise_seeds,
            keep_maps=maps,
            threads=threads,
        )
        with report.progress() as progress:
            run = evaluate_on(
                model,
                configuration,
                dataset=dataset,
                root=root,
                split=split,
                training=training,
                validation=validation,
                max_pieces=pieces,
                dask=dask,
                out=out,
                overwrite=overwrite,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        report.evaluations({"": run})


def reproduce(
    name: Annotated[str, typer.Argument(help="A published protocol: aiba-2025.")],
    model: Annotated[str | None, typer.Option(help="Another model than the published one.")] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Whose pieces are probed.")] = "test",
    pieces: Pieces = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Another length than the published one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Another number of steps than the published one.")] = None,
    dask: Dask = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; stopped ones go on there.")] = Path(
        "aiba-reproduction"
    ),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Run a published protocol in one command."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.evaluation.reproduce import reproduce as run_protocol

        changes: dict[str, Any] = {"seconds": seconds, "steps": steps}
        with report.progress() as progress:
            runs = run_protocol(
                name,
                model=model,
                root=root,
                split=split,
                max_pieces=pieces,
                changes={key: value for key, value in changes.items() if value is not None},
                dask=dask,
                out=out,
                overwrite=overwrite,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        report.evaluations(runs)
