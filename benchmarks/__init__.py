"""Benchmarks and the paper's experiments; a package, or an installed one of this name would come before the folder."""
