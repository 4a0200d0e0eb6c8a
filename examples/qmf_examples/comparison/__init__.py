"""Methods compared on small heads over feature views: the digits job, the robustness bench, Theorem 2 on a run."""
