"""``InMerge`` in training frameworks: ``.lightning`` and ``.huggingface``, each imported only where it is used."""
