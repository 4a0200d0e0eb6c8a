"""The `qmf-fusion` command: data sets, trainers, comparisons and tables, in a room for each.

Imports run one way, each room using those before it, and ``errors``, ``files`` and ``processes`` alone stand below all:
data, corruption, prepare, models, training, frozen, evaluation, comparison, benchmarks, commands; ``cli`` is on top.
"""
