"""In-model merging (InMerge) of convolution filters as a fast in-place PyTorch operation.

``merge_`` does one merging step. ``MergePlan`` shows which layers it works on, ``MergeStats`` what a call did,
``draw`` and ``reference_merge`` define its decisions and its arithmetic. See the README for where to call it.
"""

from .draw import draw
from .merge import merge_
from .plan import MergePlan
from .reference import ReferenceResult, reference_merge
from .stats import LayerStats, MergeStats, NoEffectWarning

__all__ = [
    "LayerStats",
    "MergePlan",
    "MergeStats",
    "NoEffectWarning",
    "ReferenceResult",
    "draw",
    "merge_",
    "reference_merge",
]

__version__ = "0.1.0"
