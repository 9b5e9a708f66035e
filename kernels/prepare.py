"""Numbers of the next call to device memory, where the launches of a captured CUDA graph look for them."""

import triton
import triton.language as tl

from .tables import ALPHA, BETA, COIN_THRESHOLD, SEED, STEP, WRITE


@triton.jit
def _bits(number):
    return tl.full([], number, tl.float32).to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit(do_not_specialize=["seed", "step", "coin_threshold", "alpha", "beta", "write"])
def _prepare_kernel(call_ptr, seed: tl.uint64, step: tl.int64, coin_threshold, alpha, beta, write):
    """Store the numbers of a call. They come as arguments, so nothing on the host must outlive the launch.

    Grid: ``(1,)``. Stores 48 bytes. No hazard: one program, and the launches that read come later on the same stream.
    """
    tl.store(call_ptr + SEED, seed.to(tl.int64))
    tl.store(call_ptr + STEP, step)
    tl.store(call_ptr + COIN_THRESHOLD, coin_threshold)
    tl.store(call_ptr + ALPHA, _bits(alpha))
    tl.store(call_ptr + BETA, _bits(beta))
    tl.store(call_ptr + WRITE, write)
