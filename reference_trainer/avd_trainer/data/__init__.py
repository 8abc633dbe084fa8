"""Clips for training: generated ones, the user's own, and how they become latents."""
