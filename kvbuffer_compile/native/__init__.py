"""What is written in C++ for all kernels alike: one small library, built at its first use and kept with the kernels."""
