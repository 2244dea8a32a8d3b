"""The Metal kernels without a Mac: a harness that runs them as C++, and what is checked in it."""
