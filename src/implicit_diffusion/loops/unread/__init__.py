"""What a training will need of its devices, at least, before the weights of its model are read."""
