"""Write the trained weights into the package: fp16 safetensors in diffusers' folder layout, digests, facts for the card.

python examples/training/export.py --work WORK                   # into aiba_plugins/demo/weights
python examples/training/export.py --work WORK --out FOLDER      # elsewhere
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from encode import channels, standardise
from loop import load_average
from safetensors import safe_open
from train_denoiser import trained_modules

from aiba_plugins.demo import parts, trained

#: a pipeline with everything it needs
LIMIT = 24_000_000
#: points of a loss curve that the card keeps
POINTS = 60


def build(work: Path, kind: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A pipeline with the averaged weights of the work folder's checkpoints, and how each was trained."""
    torch.manual_seed(0)  # what is not trained (CLAP) is drawn
    vae, vocoder = parts.vae(), parts.vocoder()
    states = {"vae": load_average(work / "vae.safetensors", {"vae": vae})}
    if (work / "vocoder.safetensors").exists():
        states["vocoder"] = load_average(work / "vocoder.safetensors", {"vocoder": vocoder})
    standardise(vae, *channels(work))
    vae.register_to_config(scaling_factor=1.0)
    pipe = (parts.audioldm2 if kind == "unet" else parts.mel_dit)(vae, vocoder)
    states[kind] = load_average(work / f"{kind}.safetensors", trained_modules(pipe, kind))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe, states


def facts(state: dict[str, Any], parameters: int) -> dict[str, Any]:
    """What the card says about one part."""
    curve = state["curve"]
    thinned = curve[:: max(1, len(curve) // POINTS)]
    return {
        "parameters": parameters,
        "steps": state["step"],
        "training_seconds": round(float(state["seconds"])),
        "runs": state["runs"],
        "loss_curve": [*thinned, curve[-1]] if curve and thinned[-1] != curve[-1] else thinned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=trained.WEIGHTS)
    options = parser.parse_args()
    with safe_open(str(options.work / "data" / "train.safetensors"), "pt") as file:
        data = json.loads(file.metadata()["about"])
    card: dict[str, Any] = {"data": {name: data[name] for name in ("pieces", "licences", "sources", "instruments")}}
    kinds = [kind for kind in ("unet", "dit") if (options.work / f"{kind}.safetensors").exists()]
    for kind in kinds:
        pipe, states = build(options.work, kind)
        for name, state in states.items():
            modules = trained_modules(pipe, kind).values() if name == kind else [getattr(pipe, name)]
            card[name] = facts(state, sum(p.numel() for module in modules for p in module.parameters()))
        trained.save(pipe, kind, options.out)
    digests = trained.record(options.out)
    (options.out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    for kind in kinds:
        size = sum(about["bytes"] for name, about in digests.items() if name.startswith(trained.needed(kind)))
        print(f"demo:{kind} {size / 1e6:.1f} MB")
        if size > LIMIT:
            raise SystemExit(f"demo:{kind} is larger than {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
