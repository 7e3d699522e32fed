"""pf_jax: minutes-long video with a bounded cache (PackForcing) on Wan-style models, in JAX.

    import pf_jax
    video = pf_jax.load().sample('a white seven drifts right on a teal background', seconds=120)
    video.write('seven.mp4')

Importing the package costs nothing: JAX is imported by what needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from pf_jax.pipeline import load

__version__ = '0.1.0'
__all__ = ['__version__', 'load']


def __getattr__(name: str) -> Any:
  if name == 'load':
    from pf_jax.pipeline import load
    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has {__all__}.')
