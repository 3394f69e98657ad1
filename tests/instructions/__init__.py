"""One tiny kernel per instruction form, because a kernel is only as trustworthy as each instruction
under it.

Every form has random inputs, a reference written in NumPy from the PTX tables (independent of the
emulator) and a stated tolerance, zero wherever the arithmetic is exact. The same kernels run in the
emulator and, with `--gpu`, on hardware, whose outputs can be kept as golden files for machines
without a GPU.
"""
