"""Doors for other projects' clients, on the policy that the native server serves."""
