"""Nested optimization inside the Lightning Trainer you already have."""
