"""Which filters of which layers are merged: candidates, their layout in memory, and whether they are still there."""
