"""Benchmarks of the operators, each a module that prints a table: ``python -m qmf_kernels.benchmarks.<name>``."""
