"""torchvision beside a PyTorch that its wheel was not built for: its compiled operators are declared, not there.

All of it that is written in Python runs then, and so does what needs it (timm, nnU-Net, torchxrayvision). What this
cannot show is what the operators do: nothing here calls them.
"""

import sys

import torch

_declared = []  # PyTorch forgets them with the object


def declare():
    """Before torchvision is used: declare what its own library would, unless that can be loaded."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # of the import that failed
