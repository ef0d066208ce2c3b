"""The commands: a folder each, over `shared`."""
