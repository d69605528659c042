"""One cell: its folder, its fit, its process, and where it runs."""
