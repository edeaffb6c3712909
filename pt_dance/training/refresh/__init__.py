"""Negatives that are refreshed while training goes on: a second process mines, and every batch names its table."""
