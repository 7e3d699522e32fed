"""Sampling as a job: files that survive kills, measurements, resume, and decoding again."""
