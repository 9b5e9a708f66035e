"""A CUDA driver that does nothing in place of the real one, under Triton's own launcher: host work without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

SOURCE = Path(__file__).parent / "stub_cuda.c"


class StubDriver(CudaDriver):
    """CudaDriver without the PyTorch build that it asks for devices and streams."""

    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device, self.set_current_device = lambda: 0, lambda device: None
        self.get_current_stream, self.get_device_capability = lambda device=0: 0, lambda device=0: (9, 0)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiler() -> str | None:
    """What builds the driver; None if it is missing."""
    return shutil.which("gcc")


def environment_over_stub(folder: Path) -> dict[str, str]:
    """Build the driver in a folder; returns this process's environment with it in the place of the real one."""
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(SOURCE)], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
