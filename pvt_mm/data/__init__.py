"""Checks of data and configs before training, and data that is read as it is meant."""
