"""FastGen: both terms as one of its callbacks, and its students sampled at half the frame rate.

FastGen's trainer hands a callback the batch, the generated sample and the losses just before ``backward()``::

    from avd_integrations.fastgen import avd_callback
    from fastgen.utils import LazyCall as L

    config.trainer.callbacks["avd"] = L(avd_callback)(regression={"weight": 2.0}, motion={"floor": 0.6})

FastGen is imported when one of this package's functions is called, not before.
"""

from avd_integrations.fastgen.callback import AVDHooks, avd_callback
from avd_integrations.fastgen.half_rate import half_rate
from avd_integrations.fastgen.host import PROVEN_ON
from avd_integrations.fastgen.terms import fastgen_terms, few_steps

__all__ = ["PROVEN_ON", "AVDHooks", "avd_callback", "fastgen_terms", "few_steps", "half_rate"]
