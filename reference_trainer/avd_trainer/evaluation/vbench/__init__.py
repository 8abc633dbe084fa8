"""Judged by VBench and VBench-2.0: their prompts and names, videos for them, and their results."""
