"""Looking at filters: their similarity, pictures of them, and what a run has merged."""

from .similarity import most_alike

__all__ = ["most_alike"]
