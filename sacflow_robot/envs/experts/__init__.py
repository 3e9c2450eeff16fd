"""Scripted experts: a demonstrator's style, motion primitives, one script per task."""
