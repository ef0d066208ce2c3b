"""`implicit-diffusion ebm`."""
