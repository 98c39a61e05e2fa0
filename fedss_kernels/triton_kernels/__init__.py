"""The GPU kernels. Nothing else in the package imports triton."""
