"""The commands. Each prints a report on stdout, or with --json exactly one JSON document; progress is on stderr."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from aiba_eval.cli import evaluating
from aiba_eval.cli.bench import bench
from aiba_eval.cli.export import export
from aiba_eval.cli.options import Device, Dtype, DtypeOption, Heads, Json, Seed, Spatial, StepWeights
from aiba_eval.cli.report import report as make_report
from aiba_eval.cli.show import Report, expected_errors

app = typer.Typer(
    name="aiba",
    help="See, score and steer what text-to-audio diffusion models attend to.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
stems_app = typer.Typer(help="Multi-stem music to score against.", no_args_is_help=True)
app.add_typer(stems_app, name="stems")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("aiba"))
        raise typer.Exit


@app.callback()
def aiba(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """See, score and steer what text-to-audio diffusion models attend to."""


@app.command()
def plugins(json: Json = False) -> None:
    """List the plugins, what each offers, and those that failed to load."""
    from aiba_eval.cli.listing import list_plugins

    report = Report(json)
    with expected_errors(report):
        report.plugins(list_plugins())


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A registered model, a folder with a model_index.json, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to generate from.")],
    word: Annotated[
        list[str] | None,
        typer.Option(help="A word or phrase of the prompt to keep a map of; repeat for more. Default: every word."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser steps.")] = 50,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less is without.")] = 2.5,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of audio.")] = 8.0,
    layers: Annotated[
        list[str] | None, typer.Option(help="Capture sites whose name matches this pattern; repeat for more.")
    ] = None,
    heads: Annotated[Heads, typer.Option(help="Average the heads, or keep each in the maps.")] = Heads.mean,
    spatial: Annotated[Spatial, typer.Option(help="How layers and steps are aggregated.")] = Spatial.mean,
    step_weights: Annotated[
        StepWeights, typer.Option(help="Weigh steps equally, or late ones more (1/sigma).")
    ] = StepWeights.uniform,
    budget: Annotated[str, typer.Option(help="Largest size of the maps kept in memory, such as 500MB.")] = "2GiB",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("aiba-run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier run.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Generate audio under capture; write audio, maps, figures and scores."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.run import run as generate

        with report.progress() as progress:
            result = generate(
                model,
                prompt,
                words=word or None,
                negative=negative,
                seed=seed,
                steps=steps,
                guidance=guidance,
                duration=duration,
                layers=layers or "*",
                heads=heads.value,
                spatial=spatial.value,
                step_weights=step_weights.value,
                budget=budget,
                out=out,
                overwrite=overwrite,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        report.run(result)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="A registered model, a folder with a model_index.json, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to generate from.")],
    other: Annotated[
        str | None, typer.Option(help="Another prompt, generated with the same seed: do the maps depend on the prompt?")
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="A word or phrase of the prompt; repeat for more. Default: every word.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser steps.")] = 10,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less is without.")] = 2.5,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of audio.")] = 8.0,
    layers: Annotated[
        list[str] | None, typer.Option(help="Look at sites whose name matches this pattern; repeat for more.")
    ] = None,
    heads: Annotated[Heads, typer.Option(help="Average the heads, or look at each.")] = Heads.mean,
    budget: Annotated[str, typer.Option(help="Largest size of the maps kept in memory, such as 500MB.")] = "2GiB",
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Generate under capture and say what is the matter with the maps. Writes nothing."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.diagnostics import diagnose_model

        with report.progress() as progress:
            result = diagnose_model(
                model,
                prompt,
                other=other,
                words=word or None,
                negative=negative,
                seed=seed,
                steps=steps,
                guidance=guidance,
                duration=duration,
                layers=layers or "*",
                heads=heads.value,
                budget=budget,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        report.diagnosis(result)


@app.command()
def compare(
    model_a: Annotated[str, typer.Argument(help="A registered model, a folder with a model_index.json, or a hub id.")],
    model_b: Annotated[str, typer.Argument(help="Another, of the same sample rate.")],
    stems: Annotated[
        Path | None, typer.Option(help="Pieces in Slakh's layout. Default: the set that ships with the package.")
    ] = None,
    split: Annotated[str, typer.Option(help="Whose pieces are compared: held out from training.")] = "test",
    training: Annotated[str, typer.Option(help="Split of the class priors, if the set has it.")] = "train",
    pieces: Annotated[int | None, typer.Option(min=1, help="So many pieces at most.")] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="An instrument that prompts may name; repeat for more. Default: all.")
    ] = None,
    timestep: Annotated[
        list[int] | None, typer.Option(help="A noise level, as a timestep of training; repeat. Default: 300, 800.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise for each level.")] = 4,
    seed: Seed = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a clip.")] = 2.56,
    windows: Annotated[int, typer.Option(min=1, help="Clips of each piece.")] = 1,
    absent: Annotated[int, typer.Option(min=0, help="Absent instruments that are asked for, for each clip.")] = 3,
    layers: Annotated[
        list[str] | None, typer.Option(help="Attention sites whose name matches this pattern; repeat for more.")
    ] = None,
    effects: Annotated[
        bool, typer.Option(help="Compare effect maps too; attention alone takes a tenth of the time.")
    ] = True,
    reinitialisations: Annotated[
        int, typer.Option(min=0, help="Fresh initialisations of each model to compare with; 20 or more to conclude.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write; a stopped comparison goes on there.")] = Path(
        "aiba-compare"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in an earlier comparison's folder.")
    ] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Compare attention and effect maps of two models on real music whose stems are known."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.comparing import compare_on

        with report.progress() as progress:
            result = compare_on(
                model_a,
                model_b,
                stems=stems,
                split=split,
                training=training,
                max_pieces=pieces,
                words=word or None,
                timesteps=tuple(timestep or (300, 800)),
                draws=draws,
                seed=seed,
                seconds=seconds,
                windows=windows,
                absent=absent,
                layers=layers or "*",
                effects=effects,
                reinitialisations=reinitialisations,
                out=out,
                overwrite=overwrite,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        report.comparison(result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo's is replaced.")] = Path("aiba-demo"),
    model: Annotated[
        list[str] | None,
        typer.Option(help="As for `aiba run`; repeat for more. Default: the trained demo models, else demo:random."),
    ] = None,
    seed: Seed = 0,
    pieces: Annotated[int | None, typer.Option(min=1, help="Probe so many pieces at most.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Generate, then probe real music whose stems are known, and score against them. No download."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.demo import demo as demonstrate

        with report.progress() as progress:
            result = demonstrate(
                model, out=out, seed=seed, max_pieces=pieces, device=device, dtype=dtype.value, progress=progress
            )
        report.demo(result)


@stems_app.command("render")
def stems_render(
    out: Annotated[Path, typer.Argument(help="Folder of the set; made if it is not there.")],
    source: Annotated[
        list[str] | None, typer.Option(help="Where the MIDI comes from; repeat for more. Default: freedoom, freedm.")
    ] = None,
    engine: Annotated[str, typer.Option(help="fluidsynth or tinysoundfont.")] = "fluidsynth",
    soundfont: Annotated[Path | None, typer.Option(help="An .sf2 or .sf3 file; default a known one.")] = None,
    sample_rate: Annotated[int, typer.Option(help="16000 or 44100 hertz.")] = 44_100,
    max_seconds: Annotated[float | None, typer.Option(help="At most so much of each piece.")] = None,
    max_pieces: Annotated[int | None, typer.Option(min=1, help="Stop when the set has so many.")] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="An instrument that a piece must have, or guitar|piano; repeat for more.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Parts rendered at a time; default one per processor.")
    ] = None,
    json: Json = False,
) -> None:
    """Render a multi-stem set in Slakh's layout from freely licensed MIDI; goes on where it was stopped."""
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.stems import render

        with report.progress() as progress:
            summary = render(
                out,
                sources=tuple(source) if source else ("freedoom", "freedm"),
                engine=engine,
                soundfont=soundfont,
                sample_rate=sample_rate,
                max_seconds=max_seconds,
                max_pieces=max_pieces,
                require=tuple(require or ()),
                jobs=jobs,
                progress=lambda state: progress("rendering", state.done, state.total),
            )
        report.stems(summary)


app.command("bench")(bench)
app.command("evaluate")(evaluating.evaluate)
app.command("reproduce")(evaluating.reproduce)
app.command("export")(export)
app.command("report")(make_report)
