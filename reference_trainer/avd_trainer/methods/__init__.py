"""Training methods, one file each, which read like their papers' algorithm boxes."""
