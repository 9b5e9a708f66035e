"""Reading the weights that people have, whatever file they lie in, without running anything that the file brings."""
