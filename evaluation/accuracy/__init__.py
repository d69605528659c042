"""Preference accuracy under several choices of z."""
