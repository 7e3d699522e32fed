"""Diffusion mathematics without networks: schedules, flow matching, solvers."""
