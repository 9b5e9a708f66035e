"""Stand-ins for CUDA on a machine without a GPU, under Triton's own launcher and PyTorch's own streams.

A driver that does nothing, and a runtime in host memory for CUDA builds of PyTorch. Both are built with gcc.
"""

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


def compiler() -> str | None:
    """What builds the stand-ins; None if it is missing."""
    return shutil.which("gcc")


def runtime_headers() -> Path | None:
    """Where a CUDA 13 build of PyTorch keeps the headers of its runtime; None for other builds."""
    folder = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"
    return folder if torch.version.cuda and (folder / "driver_types.h").exists() else None


def environment_over_stub(folder: Path, *, runtime: bool = False) -> dict[str, str]:
    """Build the driver in a folder; returns this process's environment with it in the place of the real one.

    With ``runtime``, that of PyTorch's CUDA build as well (:func:`runtime_headers` must have found its headers).
    """
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(HERE / "stub_cuda.c")]
    if runtime:
        (folder / "crt").mkdir()
        (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
        command += [f"-I{folder}", f"-I{runtime_headers()}", str(HERE / "stub_cudart.c")]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        **({"LD_PRELOAD": str(library)} if runtime else {}),
    }


def run(script: str, *arguments: str, env: dict[str, str]):
    """What a script of this folder prints, as JSON."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=env | {"PYTHONPATH": str(HERE.parent)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
