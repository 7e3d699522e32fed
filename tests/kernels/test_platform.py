import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pf_jax.kernels.conv3d import conv3d
from pf_jax.kernels.platform import target_platform

CARD = AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=AbstractDevice(
    device_kind='some card', num_cores=1, platform='cuda'))


def test_the_machine_that_traces_unless_another_is_meant():
  assert target_platform() == jax.default_backend()
  with use_abstract_mesh(CARD):
    assert target_platform() == 'cuda'
    assert jax.eval_shape(lambda: jnp.zeros(len(target_platform()))).shape == (4,)


def test_convolutions_follow_it():
  x, kernel, bias = jnp.ones((1, 4, 6, 6, 2)), jnp.ones((3, 3, 3, 2, 5)), jnp.ones(5)

  def convolved_axes():
    jaxpr = jax.make_jaxpr(lambda x: conv3d(x, kernel, bias))(x)
    [conv] = [e for e in jaxpr.eqns if e.primitive.name == 'conv_general_dilated']
    return len(conv.params['window_strides'])

  assert convolved_axes() == 2
  with use_abstract_mesh(CARD):
    assert convolved_axes() == 3
