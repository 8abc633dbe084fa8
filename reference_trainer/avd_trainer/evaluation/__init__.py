"""What clips are like, in numbers."""
