"""Read runs from the folders that the commands write."""
