"""What every room uses: files and locks, processes, the console, the machine."""

import os

# Torch asks for huge pages where a tensor has 2 MiB or more. Its CPU allocator keeps nothing, so
# that every large result is of memory that the kernel has yet to map: in pages of 4 KiB a product
# of two activations took ten times as long as in huge ones on a virtual machine. Read by torch at
# its first large tensor; no effect where the kernel has no huge pages to give.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
