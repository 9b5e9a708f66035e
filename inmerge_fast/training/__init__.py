"""Merging as a part of a training run."""
