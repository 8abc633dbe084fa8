"""What every room stands on: errors in words, progress, ranks, keyed draws, stop signals, files."""
