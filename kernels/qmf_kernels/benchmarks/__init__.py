"""Benchmarks of the operators."""
