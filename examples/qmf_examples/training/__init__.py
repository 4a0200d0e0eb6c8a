"""Training runs with Lightning on the four data sets: settings, batches, networks, checkpoints."""
