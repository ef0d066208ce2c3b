"""`python -m implicit_diffusion` is `implicit-diffusion`."""

import sys


def main() -> int:
    """Run the command line; returns the exit status.

    An interrupt while it is still being imported is one line and status 130, a missing `[cli]` one line and status 2.
    """
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
