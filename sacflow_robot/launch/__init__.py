"""Bringing up the processes of a running cell, watching over them, and taking them down."""
