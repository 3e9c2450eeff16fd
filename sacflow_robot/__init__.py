"""sacflow-robot: flow policies from demonstrations to a running robot arm and back."""

__version__ = "0.1.0"
