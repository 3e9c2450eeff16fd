"""Algorithms: SAC Flow, its baselines, and what they share."""
