"""Files: their paths, their forms, and whether they are complete."""
