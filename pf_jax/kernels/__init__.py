"""Hot operations, one folder each: `api` picks a backend, `reference` is plain XLA."""
