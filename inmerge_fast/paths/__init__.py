"""How a merge runs: on the CPU, in eager PyTorch, in Triton."""
