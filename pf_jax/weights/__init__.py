"""Released checkpoints <-> our modules, and the weights that ship with the package."""
