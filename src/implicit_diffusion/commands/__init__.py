"""The commands: one folder each over `shared`, and the registry that the command line and `resume` read."""
