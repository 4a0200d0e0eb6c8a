"""The operators in plain PyTorch: what runs on any device, and what the Triton kernels are compared with."""
