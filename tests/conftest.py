"""Tests are the strictest place: 8 simulated devices, no silent rank promotion.

Most of the time of a small test is XLA's compilation, so most optimisations are off;
what is tested is mathematics and contracts, not speed.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
