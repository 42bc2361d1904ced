"""Parity: every equation of the reference against its torch counterpart, on the same inputs."""
