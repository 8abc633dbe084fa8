"""One file per stage; a new one is found by itself."""
