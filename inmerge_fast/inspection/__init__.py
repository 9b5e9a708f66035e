"""Looking at filters: their similarity, pictures of them, and what a run has merged."""
