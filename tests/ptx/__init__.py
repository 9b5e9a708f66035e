"""Executes the PTX that Triton compiles for GPUs that are not there: warp by warp, under adversarial schedules.

| file | what |
| --- | --- |
| ``parse``, ``translate``, ``arithmetic`` | instructions; what others cannot observe becomes Python, over 32 lanes |
| ``steps``, ``access``, ``copies``, ``matrix`` | what others can observe, and branches |
| ``memory``, ``ordering``, ``pending`` | what an access touches, what a load returns, what is in flight |
| ``clocks`` | data races |
| ``machine``, ``program``, ``profile`` | warps and the scheduler; a kernel; counts |
| ``compiler``, ``launch``, ``project`` | the project's launches, compiled and run here |

What it does not know it refuses, when a kernel is loaded. What it does not model: other scopes than the GPU's, loads
that are performed late, proxies and their fences, ``tcgen05``, time, and what the assembler makes of PTX.
"""
