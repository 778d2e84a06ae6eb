"""Settings of property tests: the same examples in every run of ``make test``, others and more in ``make fuzz``.

The two profiles are registered in ``conftest.py``. ``@given`` alone draws 100 examples in ``make test``.
"""

from hypothesis import settings

DEFAULT_EXAMPLES = 100
FUZZ_TIMES = 20
"""``make fuzz`` tries this many times the examples of ``make test``."""


def examples(n: int) -> settings:
    """Return settings with ``n`` examples in ``make test`` and ``FUZZ_TIMES * n`` in ``make fuzz``."""
    return settings(max_examples=n * settings.default.max_examples // DEFAULT_EXAMPLES)
