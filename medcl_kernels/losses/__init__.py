"""Losses: bookkeeping of O(N) around the pair operations of `medcl_kernels.ops`, one file each."""
