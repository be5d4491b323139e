"""Sets the clock of every Python process that finds this module FASTALEX_TEST_CLOCK seconds forward.

A machine's clock has no namespace of its own. What is not Python, such as the times of files, stays right.
"""

import datetime
import os
import time

_AHEAD = float(os.environ["FASTALEX_TEST_CLOCK"])
_time, _datetime = time.time, datetime.datetime


class _AlsoTheRealOne(type):
    def __instancecheck__(cls, value):
        return isinstance(value, _datetime)


class _Clock(_datetime, metaclass=_AlsoTheRealOne):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)

    @classmethod
    def today(cls):
        return cls.now()


# torchrun sends pickled times to the other machine, which finds their class by its name.
_Clock.__name__ = _Clock.__qualname__ = "datetime"
_Clock.__module__ = "datetime"
datetime.datetime = _Clock
time.time = lambda: _time() + _AHEAD
time.time_ns = lambda: int(time.time() * 1e9)
