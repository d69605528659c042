"""`python -m lpc_lightning`."""

from lpc_lightning.cli import main

if __name__ == "__main__":
    main()
