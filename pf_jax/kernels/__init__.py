"""Hot operations, one folder each: `api` picks a backend, `reference` is plain XLA.

`platform` says what is traced for, `tuning` which sizes of tiles were fastest there.
"""
