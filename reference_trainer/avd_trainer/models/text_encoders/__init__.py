"""From captions to what transformers read."""
