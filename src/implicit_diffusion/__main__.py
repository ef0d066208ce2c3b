"""`python -m implicit_diffusion` is `implicit-diffusion`."""

import os
import sys

SPINS = "10000"  # of a thread of OpenMP that waits for the others, before it lets go of its core: some ten microseconds


def main() -> int:
    """Run the command line; returns the exit status.

    An interrupt while it is still being imported is one line and status 130, a missing `[cli]` one line and status 2.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both when torch is loaded
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        from implicit_diffusion.runs import clock

        clock.begin_command()
        from implicit_diffusion.errors import MissingExtraError
        from implicit_diffusion.extras import require

        try:
            require("tyro", "rich")
        except MissingExtraError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        from implicit_diffusion import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
