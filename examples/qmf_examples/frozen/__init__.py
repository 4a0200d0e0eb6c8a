"""Encoders that are not trained: what they see of a data set, computed once and kept in files."""
