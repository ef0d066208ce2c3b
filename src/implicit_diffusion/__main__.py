"""`python -m implicit_diffusion` is `implicit-diffusion`."""

import sys

from implicit_diffusion.cli import main

sys.exit(main())
