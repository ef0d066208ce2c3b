import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may ask the network
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

torch.set_num_threads(1)  # the test workers share the cores
