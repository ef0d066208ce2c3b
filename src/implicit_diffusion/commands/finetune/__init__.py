"""`implicit-diffusion finetune`."""
