"""Arrays of numbers in files, and as data to train on."""
