"""What a run depends on: sections that methods and engine share, and how they are read."""
