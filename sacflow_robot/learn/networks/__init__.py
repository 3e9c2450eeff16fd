"""Networks of a policy: velocities, critics, Gaussian and one-step policies."""
