"""Adapters that attach ``avd_core`` to other people's trainers."""
