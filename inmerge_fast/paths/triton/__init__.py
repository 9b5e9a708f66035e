"""The path of the Triton kernels: tables, buffers, launches."""
