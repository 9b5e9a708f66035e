"""In-model merging (InMerge) of convolution filters as a fast in-place PyTorch operation.

``merge_`` does one merging step. ``MergePlan`` shows which layers it works on, ``MergeStats`` what a call did and
``similarity`` how alike the filters are; ``draw``, ``reference_partners`` and ``reference_merge`` define its decisions
and its arithmetic. See the README for where to call it.
"""

from .draw import draw
from .merge import merge_
from .plan import MergePlan
from .reference import ReferenceResult, reference_merge, reference_partners
from .similarity import LayerSimilarity, Similarity, similarity
from .stats import LayerStats, MergeStats, NoEffectWarning

__all__ = [
    "LayerSimilarity",
    "LayerStats",
    "MergePlan",
    "MergeStats",
    "NoEffectWarning",
    "ReferenceResult",
    "Similarity",
    "draw",
    "merge_",
    "reference_merge",
    "reference_partners",
    "similarity",
]

__version__ = "0.1.0"
