"""Preference examples as token ids: templates, length limits and the cache of tokens."""
