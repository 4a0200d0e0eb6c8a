"""Fused Triton kernels behind the operators. Imported at the first launch, so that Triton may be absent."""
