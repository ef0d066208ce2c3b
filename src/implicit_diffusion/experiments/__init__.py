"""Experiments: one file each, with a frozen `Config` whose defaults are the published setting, and a `run`."""
