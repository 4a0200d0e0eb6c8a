"""Trained runs on damaged test data: figures over seeds, reliability, tables beside the published ones."""
