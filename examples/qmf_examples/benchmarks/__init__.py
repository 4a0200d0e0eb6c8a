"""Benchmarks, each a module that prints a table: ``python -m qmf_examples.benchmarks.<name>``."""
