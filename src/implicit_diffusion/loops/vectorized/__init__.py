"""Several runs of one loop at once: seeds, in one vectorised run."""
