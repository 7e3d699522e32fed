"""Flow matching: x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0."""

from pf_jax.types import Array


def add_noise(x0: Array, noise: Array, sigma) -> Array:
  """x_t at level sigma, which broadcasts against x0."""
  return (1 - sigma) * x0 + sigma * noise


def flow_target(x0: Array, noise: Array) -> Array:
  """What the network should predict."""
  return noise - x0


def predict_x0(x_t: Array, flow: Array, sigma) -> Array:
  """The clean latents that a predicted flow implies."""
  return x_t - sigma * flow
