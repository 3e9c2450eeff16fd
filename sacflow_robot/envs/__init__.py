"""Simulated tasks, their scripted experts, and the processes that step them."""
