"""R̂, a network fitted to the rewards of earlier trajectories."""
