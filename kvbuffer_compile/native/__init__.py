"""What is written in C++ for all kernels alike: one small library, built at its first use and kept with the kernels.

`library` builds and loads it. `dispatch_watch.cpp` tells of calls with marked tensors (guard/dispatch_watch.py),
`aliases.cpp` finds the ordinary tensors behind guarded ones (guard/aliases.py), and `direct` calls ops of generated
kernels without torch's dispatcher. Without a compiler the first is missed, which is said; the others only cost time.
"""
