"""What nnU-Net finds in this folder by name; it would import a whole package that it is pointed to as loose files."""

from inmerge_fast.integrations.nnunet import nnUNetTrainerInMerge, nnUNetTrainerInMergeForwardOnly

__all__ = ["nnUNetTrainerInMerge", "nnUNetTrainerInMergeForwardOnly"]
