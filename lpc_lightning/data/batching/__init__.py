"""Batches of token ids: order, packing and layout."""
