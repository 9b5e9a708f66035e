"""What ``python -m inmerge_fast`` shows: small networks trained with and without merging."""
