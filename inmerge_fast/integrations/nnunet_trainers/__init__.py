"""A folder for nnU-Net to search: see :mod:`inmerge_fast.integrations.nnunet`."""
