"""A reference trainer for Adaptive Video Distillation; its command is ``avd``."""
