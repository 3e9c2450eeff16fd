"""Demonstration files of other projects, and how they become episodes."""
