"""What long work calls as it goes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # items done, items in all, and the one that is worked on now
StepProgress = Callable[[int, int], None]  # the same where the caller knows what is worked on
StageProgress = Callable[[str, int, int], None]  # the stage that is under way, its items done and its items in all
