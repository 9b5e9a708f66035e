"""In-model merging (InMerge) of convolution filters as a fast in-place PyTorch operation.

``merge_`` does one merging step, ``merged`` one that lasts for a forward and backward pass only, ``InMerge`` those of a
whole training run. ``MergePlan`` shows which layers they work on, ``MergeStats`` what a call did and ``similarity`` how
alike the filters are; ``draw`` and the ``reference_`` functions define the decisions and the arithmetic. See
docs/training.md for where to call them.
"""

from .draw import draw
from .forward_only import merged
from .inspection.merge_plot import plot_merges
from .inspection.similarity import Similarity, similarity
from .layer_similarity import LayerSimilarity
from .merge import merge_
from .merge_plan import MergePlan
from .reference import ReferenceResult, reference_forward_only, reference_merge, reference_partners
from .stats import CollapseWarning, LayerStats, MergeStats, NoEffectWarning
from .thresholds import NoiseThreshold, QuantileThreshold, RankBudget
from .training.guard import CollapseGuard
from .training.inmerge import InMerge
from .training.monitor import DictLogger, TensorBoardLogger
from .training.schedules import cosine, linear

__all__ = [
    "CollapseGuard",
    "CollapseWarning",
    "DictLogger",
    "InMerge",
    "LayerSimilarity",
    "LayerStats",
    "MergePlan",
    "MergeStats",
    "NoEffectWarning",
    "NoiseThreshold",
    "QuantileThreshold",
    "RankBudget",
    "ReferenceResult",
    "Similarity",
    "TensorBoardLogger",
    "cosine",
    "draw",
    "linear",
    "merge_",
    "merged",
    "plot_merges",
    "reference_forward_only",
    "reference_merge",
    "reference_partners",
    "similarity",
]

__version__ = "0.2.0"
