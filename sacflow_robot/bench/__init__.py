"""Measurements behind ``sacflow-robot bench``; each may import several rooms, and none imports it."""
