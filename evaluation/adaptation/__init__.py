"""Infer the codes of an annotator from a few labels, and measure the accuracy on the annotator's other pairs."""
