"""One training loop for every model here: seeded by step, time-boxed, resumable, with an average of the weights.

A checkpoint is one safetensors file: weights, their exponential average, both moments of AdamW, and as metadata the step
count, the seconds spent, the loss curve and the options of every run. The learning rate depends on the step alone (warm-up, plateau, linear descent
over the last quarter of ``--steps``), so stopping and resuming changes nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

#: steps averaged into one point of the loss curve
CURVE = 50


def arguments(description: str | None, *, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """The options that every training script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder: data/ in it, checkpoints into it")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this long; the same command resumes")
    parser.add_argument("--steps", type=int, default=steps, help="length of the schedule")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--seconds", type=float, default=2.56, help="length of a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default all")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    return parser


class Trainer:
    """Trains the parameters of named modules.

    Parameters
    ----------
    path : checkpoint file; read if it exists
    modules : by name; their parameters that require a gradient are trained, the others are kept with them
    options : parsed :func:`arguments`
    """

    def __init__(self, path: Path, modules: Mapping[str, torch.nn.Module], options: argparse.Namespace) -> None:
        self.path, self.options = path, options
        every = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
        self.parameters = {key: parameter for key, parameter in every.items() if parameter.requires_grad}
        self.frozen = {key: parameter for key, parameter in every.items() if not parameter.requires_grad}
        values = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(values, options.rate, betas=(0.9, 0.99), weight_decay=1e-3)
        self.average = [value.detach().clone() for value in values]
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self.runs: list[dict[str, object]] = []  # options from which step on
        if path.exists():
            self._read()
        kept = ("batch", "rate", "steps", "seconds", "columns", "unnamed", "wordless", "subsets", "seed", "bf16")
        now = {name: value for name, value in vars(options).items() if name in kept and value is not None}
        if not self.runs or {**self.runs[-1], "from_step": None} != {**now, "from_step": None}:
            self.runs.append({"from_step": self.step, **now})

    def run(self, loss_of: Callable[[int], torch.Tensor], *, save_every: float = 120.0) -> None:
        """Train until ``--steps``, ``--minutes`` or an interrupt; ``loss_of(step)`` is one batch's loss."""
        options, values = self.options, list(self.parameters.values())
        asked_to_stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked_to_stop.append(True))
        began = saved = time.monotonic()
        spent, losses = self.seconds, []
        while self.step < options.steps:
            now = time.monotonic()
            self.seconds = spent + now - began
            if asked_to_stop or (options.minutes is not None and now - began > 60 * options.minutes):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate()
            loss = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(values, 1.0)
            if torch.isfinite(norm):
                self.optimizer.step()
            else:
                print(f"step {self.step}: gradient is not finite, skipped", flush=True)
            self.step += 1
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            torch._foreach_mul_(self.average, decay)
            torch._foreach_add_(self.average, [value.detach() for value in values], alpha=1 - decay)
            losses.append(loss.detach())
            if self.step % CURVE == 0:
                self.curve.append((self.step, float(torch.stack(losses).mean())))
                losses.clear()
                print(f"{self.step} loss {self.curve[-1][1]:.4f} {self.seconds:.0f} s", flush=True)
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.seconds = spent + time.monotonic() - began
        self.save()

    def averaged(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for value, average in zip(self.parameters.values(), self.average, strict=True):
                value.copy_(average)

    def _rate(self) -> float:
        remaining = 1 - self.step / self.options.steps
        return float(self.options.rate * min(1.0, (self.step + 1) / 300) * min(1.0, max(0.02, 4 * remaining)))

    def save(self) -> None:
        """Write the checkpoint; an interruption leaves the previous one."""
        tensors = {f"average/{key}": value.contiguous() for key, value in self.frozen.items()}
        for (key, value), average in zip(self.parameters.items(), self.average, strict=True):
            tensors[f"weight/{key}"] = value.detach().contiguous()
            tensors[f"average/{key}"] = average.contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state.get(value, {}):
                    tensors[f"{moment}/{key}"] = self.optimizer.state[value][moment].contiguous()
        state = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "runs": self.runs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, str(partial), {"state": json.dumps(state)})
        partial.replace(self.path)

    def _read(self) -> None:
        with safe_open(str(self.path), "pt") as file, torch.no_grad():
            state = json.loads(file.metadata()["state"])
            stored = set(file.keys())
            for key, value in self.frozen.items():
                value.copy_(file.get_tensor(f"average/{key}"))
            for index, (key, value) in enumerate(self.parameters.items()):
                value.copy_(file.get_tensor(f"weight/{key}"))
                self.average[index].copy_(file.get_tensor(f"average/{key}"))
                if f"exp_avg/{key}" in stored:
                    self.optimizer.state[value] = {
                        "step": torch.tensor(float(state["step"])),
                        "exp_avg": file.get_tensor(f"exp_avg/{key}").to(value),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{key}").to(value),
                    }
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.runs = state["runs"]
        self.curve = [(int(step), float(loss)) for step, loss in state["curve"]]
        print(f"resumed {self.path.name} at step {self.step}", flush=True)


def generators(seed: int, step: int, device: str) -> tuple[np.random.Generator, torch.Generator]:
    """Everything random in one step."""
    rng = np.random.default_rng((seed, step))
    return rng, torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def load_average(path: Path, modules: Mapping[str, torch.nn.Module]) -> dict[str, object]:
    """Load the averaged weights of a checkpoint into modules; returns its state (step, seconds, curve, runs)."""
    with safe_open(str(path), "pt") as file, torch.no_grad():
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                parameter.copy_(file.get_tensor(f"average/{name}.{key}"))
        state: dict[str, object] = json.loads(file.metadata()["state"])
    return state
