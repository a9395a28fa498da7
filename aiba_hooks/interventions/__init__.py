"""Edits of attention through the same interception as capture."""

from __future__ import annotations

from aiba_hooks.interventions.reweight import Intervention, intervene

__all__ = ["Intervention", "intervene"]
