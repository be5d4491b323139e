"""Puts the clock of every Python process that finds this module wrong by FASTALEX_TEST_CLOCK seconds."""

import datetime
import os
import time

_OFF = float(os.environ["FASTALEX_TEST_CLOCK"])
_time, _datetime = time.time, datetime.datetime


class _Any(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _datetime)


class _Clock(_datetime, metaclass=_Any):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)

    @classmethod
    def today(cls):
        return cls.now()


_Clock.__name__ = _Clock.__qualname__ = "datetime"
_Clock.__module__ = "datetime"
time.time = lambda: _time() + _OFF
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = _Clock
