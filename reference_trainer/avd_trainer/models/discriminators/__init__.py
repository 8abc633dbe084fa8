"""Heads that tell real videos from generated ones by what a transformer's blocks see in them."""
