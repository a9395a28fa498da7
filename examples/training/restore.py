"""Write checkpoints from the shipped weights, to go on training from them instead of from nothing.

    python examples/training/restore.py --work WORK
    python examples/training/encode.py --work WORK
    python examples/training/train_denoiser.py --work WORK --kind unet --steps 6000 --minutes 60

Weights and steps are as shipped (fp16); the optimiser's moments begin anew, so that the first steps are rougher. The shipped VAE
has the channels' means and deviations folded in already: `data/channels.json` says so, and what is exported keeps the same VAE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from train_denoiser import trained_modules

from aiba_plugins.demo import trained


def checkpoint(path: Path, modules: dict[str, torch.nn.Module], about: dict[str, object]) -> None:
    """One file as ``loop.Trainer`` reads it."""
    tensors = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            tensors[f"average/{name}.{key}"] = parameter.detach().float().contiguous()
            if parameter.requires_grad:
                tensors[f"weight/{name}.{key}"] = tensors[f"average/{name}.{key}"].clone()
    state = {
        "step": about["steps"],
        "seconds": about["training_seconds"],
        "curve": about["loss_curve"],
        "runs": about["runs"],
    }
    save_file(tensors, str(path), {"state": json.dumps(state)})
    print(path, "at step", about["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder; checkpoints in it are not overwritten")
    options = parser.parse_args()
    facts = json.loads((trained.WEIGHTS / "training.json").read_text(encoding="utf-8"))
    options.work.mkdir(parents=True, exist_ok=True)
    for kind in ("unet", "dit"):
        pipe = trained.load(kind)
        # the shared parts are in the U-Net's folder
        parts = {kind: trained_modules(pipe, kind)}
        if kind == "unet":
            parts |= {name: {name: getattr(pipe, name)} for name in ("vae", "vocoder")}
        for name, modules in parts.items():
            path = options.work / f"{name}.safetensors"
            if path.exists():
                raise SystemExit(f"{path} exists: remove it, or choose another work folder")
            checkpoint(path, modules, facts[name])
            if name == "vae":
                channels = pipe.vae.config.latent_channels
                known = options.work / "data" / "channels.json"
                known.parent.mkdir(exist_ok=True)
                moments = {"mean": [0.0] * channels, "std": [1.0] * channels}
                known.write_text(json.dumps({**moments, "vae_step": facts["vae"]["steps"]}))


if __name__ == "__main__":
    main()
