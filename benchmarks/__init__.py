"""The project and TRL side by side: speed, memory and agreement. See README.md beside this file."""

import lpc_lightning as lpc_lightning  # before torch: it sets how long OpenMP's threads spin, for TRL's side too
