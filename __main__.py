"""`python -m edgepress`: the same command line as `edgepress`."""

from .driver.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
