"""Inference: both tasks in one continuous batch over fixed-size state slots, and the `OmniMamba` class on top of it."""
