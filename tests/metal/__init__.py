"""The Metal kernels without a Mac: a harness that runs them as C++, and tests that use it."""
