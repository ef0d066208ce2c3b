"""Callbacks of a run: they look at the loop between updates. The public ones are names of `runs`."""
