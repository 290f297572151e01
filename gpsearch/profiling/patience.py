"""Waiting for strangers' code, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what ``ask`` returns, or raise what it raises.

    It is asked in a thread of its own, which is left behind if it hangs: nothing can end it, and
    it does not keep the process alive.

    Raises:
        TimeoutError: It takes longer than ``seconds``.
    """
    answers: list[T] = []
    raised: list[BaseException] = []

    def answer() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # SystemExit would end the thread without a word
            raised.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]
