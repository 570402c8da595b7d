"""What must be kept of a base weight so that unmerging gives it back bit for bit.

Subtracting ΔW from a merged weight misses the base in about one element of ten, in every dtype, and each cycle adds to the
error. So nothing here subtracts and hopes:

- ``"copy"``, the default, keeps the base itself, and takes as much memory again as the weights it is for. Merging and restoring a
  bfloat16 weight of 4096² takes half the time of loralib's inexact way (`benchmarks/undo.py`); that is why it is the default.
- ``"copy-cpu"`` keeps it in main memory, for layers on a device that has no room for it.
- ``"compact"`` keeps what separates the base from a number that can be computed again with the same bits, and a checksum: a seventh
  of a bfloat16 weight, a thirteenth of a float32 one. It computes that number when merging and when restoring, and takes some seven
  times as long as a copy."""
