"""From video to latents and back."""
