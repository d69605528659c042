"""Several models evaluated side by side."""
