"""Statistics and plots of the codebook."""
