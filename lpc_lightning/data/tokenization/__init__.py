"""Tokenization of preference examples: templates, length limits and the token cache."""
