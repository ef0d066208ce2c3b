"""Models by name: checkpoints, and those that a function in a file of the user's makes."""
