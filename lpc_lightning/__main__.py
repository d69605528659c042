"""`lpc-lightning`, also as `python -m lpc_lightning`."""

import gc
import sys

# What the imports make stays until the end. The garbage collector would search it several times, and once more at the
# end: a third of the time of a short command.
gc.disable()
try:
    from lpc_lightning.cli import main
except KeyboardInterrupt:  # the imports take seconds
    print("Stopped.", file=sys.stderr)
    sys.exit(130)
finally:
    gc.freeze()
    gc.enable()

if __name__ == "__main__":
    main()
