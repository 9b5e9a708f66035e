"""Merging as a part of a training run."""

from .inmerge import InMerge

__all__ = ["InMerge"]
