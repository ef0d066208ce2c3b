"""Low-rank adapters as files: written for diffusers, peft, ComfyUI and kohya's tools, and read again."""
