"""Stand-ins for CUDA on a machine without a GPU: built with gcc, under Triton's own launcher, and scripts over them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

HERE = Path(__file__).parent
HAS_GCC = sys.platform == "linux" and shutil.which("gcc") is not None
# What the headers of the runtime include of the compiler's, which PyTorch does not bring.
HOST_DEFINES = """\
#define __device_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
"""


class StubDriver(CudaDriver):
    """CudaDriver without the PyTorch build that it asks for devices and streams."""

    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device, self.set_current_device = lambda: 0, lambda device: None
        self.get_current_stream, self.get_device_capability = lambda device=0: 0, lambda device=0: (9, 0)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def runtime_headers():
    """Where a CUDA 13 build of PyTorch keeps the headers of its runtime; None for other builds."""
    folder = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"
    return folder if torch.version.cuda and (folder / "driver_types.h").exists() else None


def environment_over_stub(folder, *, runtime=False):
    """Environment of a process that runs compiled kernels over a driver that does nothing, built in ``folder``.

    With ``runtime``, PyTorch's own streams, events and graphs run as well (:func:`runtime_headers` must find some).
    """
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(HERE / "stub_cuda.c")]
    if runtime:
        (folder / "crt").mkdir()
        (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
        command += [f"-I{folder}", f"-I{runtime_headers()}", str(HERE / "stub_cudart.c")]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    ours = {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(HERE.parent),
    }
    if runtime:
        ours["LD_PRELOAD"] = str(library)
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ours


def run(script, *arguments, env):
    """What a script of this folder prints, as JSON."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
