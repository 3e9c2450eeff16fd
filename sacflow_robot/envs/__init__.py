"""Simulated tasks, their scripted experts, and the processes that step them."""

from sacflow_robot.envs import gl as gl
