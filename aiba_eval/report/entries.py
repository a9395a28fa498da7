"""What a run found, looked up by what it is: means beside their references, what was left out, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from aiba_eval.outputs import jsonable
from aiba_eval.report.table import number

if TYPE_CHECKING:
    import pandas
    import xarray

    from aiba_eval.evaluation import Item, Run
    from aiba_eval.report.counting import Counts

#: metrics as tables head them
METRICS: Mapping[str, str] = {
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "iou": "IoU",
    "iou_area": "IoU area",
    "average_precision": "AP",
    "profile_pearson": "Profile r",
    "profile_spearman": "Profile ρ",
    "temporal_pearson": "Time r",
    "temporal_spearman": "Time ρ",
    "pointing_game": "Pointing",
    "mass_accuracy": "Mass",
    "rank_accuracy": "Rank",
    "share_spearman": "Share ρ",
}
#: those that reach from −1 to 1; the others lie between 0 and 1
SIGNED = frozenset(name for name in METRICS if name.endswith(("_pearson", "_spearman")))
REFERENCES: Mapping[str, str] = {
    "chance": "chance",
    "mix_energy": "mix energy",
    "class_prior": "class prior",
    "prior_times_mix": "prior × mix",
    "oracle_projection": "oracle projection",
    "other_word": "other word",
    "other_piece": "other piece",
    "time_shift": "time shift",
}
#: what stands beside every figure of a table
BESIDE = ("chance", "mix_energy", "class_prior", "prior_times_mix", "oracle_projection")
TARGETS: Mapping[str, str] = {
    "dominance": "cells that the instrument's stem dominates",
    "band:paper": "the paper's knowledge bands",
    "band:measured": "measured knowledge bands",
    "profile": "the class's data-driven profile",
    "energy": "cells where the instrument sounds",
    "share": "the instrument's share of the power",
}
DEFAULT, ALL = "default", "all"
#: items whose arrays are held in memory
HELD = 8


class Key(NamedTuple):
    """What a figure is of."""

    variant: str
    level: int
    target: str
    word: str
    metric: str


@dataclass(frozen=True)
class Entry:
    """A mean over ``n`` pieces with its interval, and the means of its references over the same pieces."""

    n: int
    value: float
    low: float
    high: float
    references: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Entries:
    """A run's figures.

    Attributes
    ----------
    run : the run
    missing : part → why it is not there
    """

    run: Run
    missing: dict[str, str] = field(default_factory=dict)
    _held: dict[str, xarray.Dataset] = field(default_factory=dict, repr=False)

    @cached_property
    def items(self) -> list[Item]:
        """Finished items."""
        return list(self.run.items)

    @cached_property
    def training(self) -> list[Item]:
        """Windows that class priors were made of, if the run kept any."""
        return list(self.run.items_of("training")) if hasattr(self.run, "items_of") else []

    def arrays(self, item: Item) -> xarray.Dataset:
        """An item's arrays, of which the last few that were asked for are held: a run can be larger than memory."""
        if item.id not in self._held:
            if len(self._held) >= HELD:
                del self._held[next(iter(self._held))]
            self._held[item.id] = item.fields.load()
        return self._held[item.id]

    @cached_property
    def counts(self) -> Counts:
        """Cells of thresholded maps and masks, see :func:`aiba_eval.report.counting.count`."""
        from aiba_eval.report.counting import count

        return count(self)

    @cached_property
    def scores(self) -> pandas.DataFrame | None:
        """Scores of the run's own items, or None as long as there are none."""
        found = self._try("scores", self.run.scores)
        if found is None or "condition" not in found:
            return found
        return found[found["condition"] == "own"]

    @cached_property
    def means(self) -> dict[Key, Entry]:
        """Every mean of the summary."""
        found: dict[Key, Entry] = {}
        for row in self._try("summary", self.run.summary) or []:
            key = Key(str(row["variant"]), int(row["level"]), str(row["target"]), str(row["word"]), str(row["metric"]))
            beside = dict(found[key].references) if key in found else {}
            if row.get("reference"):
                beside[str(row["reference"])] = number(row.get("reference_value"))
            value, low, high = (number(row.get(name)) for name in ("value", "low", "high"))
            found[key] = Entry(int(row["n"]), value, low, high, beside, str(row.get("note") or ""))
        return found

    @cached_property
    def contrasts(self) -> list[dict[str, Any]]:
        """Contrasts, or none as long as there are none."""
        return list(self._try("contrasts", self.run.contrasts) or [])

    @cached_property
    def controls(self) -> list[dict[str, Any]]:
        """Controls that were measured."""
        return list(self._try("controls", self.run.controls) or [])

    def _try(self, part: str, read: Any) -> Any:
        from aiba_eval.evaluation import NotARun

        try:
            return read()
        except NotARun as error:  # it has not come so far
            self.missing[part] = str(error)
            return None

    # ---- what there is

    @cached_property
    def variants(self) -> list[str]:
        """Names of the variants, the primary one first."""
        named = [str(name) for name in self.run.configuration.get("variants") or ()]
        return named or self._axis("variant") or [DEFAULT]

    @cached_property
    def levels(self) -> list[int]:
        """Noise levels of ``probe``; 0 of ``generate``."""
        return [int(level) for level in self._axis("level")]

    @cached_property
    def targets(self) -> list[str]:
        """What maps were scored against, the primary one first."""
        known = self._axis("target")
        return [name for name in TARGETS if name in known] + [name for name in known if name not in TARGETS]

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics in the order of tables."""
        known = {key.metric for key in self.means}
        if not known and self.scores is not None:
            known = {str(name) for name in self.scores["metric"].unique()}
        return [name for name in METRICS if name in known]

    def _axis(self, name: str) -> list[Any]:
        if self.means:
            return list(dict.fromkeys(getattr(key, name) for key in self.means))
        if self.scores is not None and len(self.scores):
            return list(dict.fromkeys(self.scores[name].tolist()))
        found: dict[Any, None] = {}
        for item in self.items:
            arrays = item.fields
            if name in arrays.coords:
                found |= dict.fromkeys(arrays[name].values.tolist())
        return list(found)

    @property
    def primary(self) -> str | None:
        """The first target, or None where nothing was scored."""
        return self.targets[0] if self.targets else None

    def words(self, target: str, level: int, variant: str = DEFAULT) -> list[str]:
        """Classes with a mean, those of most pieces first."""
        counts: dict[str, int] = {}
        for key, entry in self.means.items():
            if (key.variant, key.level, key.target) == (variant, level, target) and key.word != ALL:
                counts[key.word] = max(counts.get(key.word, 0), entry.n)
        return sorted(counts, key=lambda word: (-counts[word], word))

    def at(self, level: int) -> str:
        """A level in words: ``t = 300``, or ``whole generation``."""
        return "whole generation" if self.generates else f"t = {level}"

    @property
    def generates(self) -> bool:
        """Whether the audio was generated."""
        return str(self.run.configuration.get("protocol")) == "generate"

    # ---- the record

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, pipeline, weights, whether it was trained."""
        found = self._recorded("model")
        if not isinstance(found, Mapping):
            return {"name": str(found or "a model")}
        return {**found, **({"trained": self.run.record["trained"]} if "trained" in self.run.record else {})}

    @property
    def versions(self) -> Mapping[str, str]:
        """Package → its version."""
        return _texts(self._recorded("versions"))

    def _recorded(self, name: str) -> Any:
        return self.run.record.get(name, self.run.configuration.get(name))

    @property
    def failed(self) -> Mapping[str, str]:
        """Task → why it failed."""
        return _texts(self.run.record.get("failed"))

    @property
    def skipped(self) -> Mapping[str, str]:
        """Piece → why there was nothing to score."""
        return _texts(self.run.record.get("skipped"))

    @cached_property
    def excluded(self) -> list[tuple[str, str, int]]:
        """(target and word, reason, how often) of what could not be scored."""
        counted: Counter[tuple[str, str]] = Counter()
        for one in self.run.record.get("excluded") or ():
            counted[f"{one['target']}, {one['word']}", str(one["reason"])] += int(one["items"])
        if self.scores is not None and len(self.scores):
            own = self.scores[self.scores["variant"] == self.variants[0]]
            for row in own[own["reason"].fillna("") != ""].itertuples():
                counted[f"{row.target}, {METRICS.get(str(row.metric), row.metric)}", str(row.reason)] += 1
        return [(what, reason, count) for (what, reason), count in sorted(counted.items())]


def _texts(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(key): str(jsonable(reason)) for key, reason in value.items()}
    return {str(each): "" for each in value or ()}
