"""Token ids as batches: order, packing and layout."""
