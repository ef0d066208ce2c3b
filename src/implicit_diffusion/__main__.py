"""`python -m implicit_diffusion` is `implicit-diffusion`."""

import sys


def main() -> int:
    """Run the command line; an interrupt is one line and status 130 while it is still being imported, too."""
    try:
        from implicit_diffusion.runs import clock

        clock.begin()
        from implicit_diffusion import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
