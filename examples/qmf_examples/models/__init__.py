"""Encoders, rival fusions, and the one registry of methods. Nothing here knows a data set."""
