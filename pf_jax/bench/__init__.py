"""Benchmarks: what the parts of a rollout cost, as fractions of what this machine can do.

config     which suites there are, and how long to measure.
timing     calls in turn, medians with intervals.
counts     operations and bytes, by formula and from the traced program.
ceilings   a large copy and a large product, measured in the same run.
subject    the model that is measured.
case       one piece of work, done by us and by peers.
kernels    suites attention, context, conv3d, vae.
tune       times the tiles of our own kernels and keeps the fastest.
block      suite block: one layer, denoise, finish, whole.
long       suite rollout: early and late blocks of long videos, in turn.
torch_peer the same work in PyTorch, where it is installed.
report     the record as JSON and as a table.
run        all of it.

Every suite is a function from a `Bench` to `Case`s; inputs are random normal numbers, never zeros.
"""
