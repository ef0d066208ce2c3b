"""The words of a command line: options, their help, mistakes in them, and arguments under the names of flags."""
