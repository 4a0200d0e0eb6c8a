"""Trainers, data sets and tables: the `qmf-fusion` command."""
