"""Scripted experts: habits, the motions of a hand, one script per task."""
