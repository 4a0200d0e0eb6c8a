"""The data sets: what they are called, how their folders are read and checked, and what a folder holds."""
