"""`implicit-diffusion recovery`."""
