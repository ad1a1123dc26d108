"""Sweeps: which runs are wanted, which are done, and what runs where."""
