import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may ask the network
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["IMPLICIT_DIFFUSION_CACHE"] = "off"  # no test may live on what another run left behind

import torch

torch.set_num_threads(1)  # the test workers share the cores
