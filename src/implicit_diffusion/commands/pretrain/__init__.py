"""`implicit-diffusion pretrain`."""
