"""Numerics of few bits, on torch alone: grids, codes packed without waste, rounding that knows the inputs."""
