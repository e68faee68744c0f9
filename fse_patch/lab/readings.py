"""What a decode step of live arms takes, the prompts left out: readings of the arms in turn."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from .arm_process import Progress
from .live_arms import ARMS, Answer, ArmError, LiveArms

# None always follows the same one.
ORDERS = tuple(permutations(ARMS))
TRIES = 3  # answers to one question, until one tells when its steps began
Reading = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a short and of a long answer; many streams, above ``few``, take a shorter long one.

    Their difference is the number of steps that are timed. A reading is the median of ``repeats`` answers for
    up to ``short_steps`` streams, whose steps are so short that it counts when the host does something else
    for a while; of one for more.
    """

    short: int = 33
    long: int = 289
    long_many: int = 161
    few: int = 16
    repeats: int = 3
    short_steps: int = 4

    def long_for(self, streams: int) -> int:
        """Return the length of the long answer of so many streams."""
        return self.long if streams <= self.few else self.long_many

    def repeats_for(self, streams: int) -> int:
        """Return how many answers of each length are in a reading of so many streams."""
        return self.repeats if streams <= self.short_steps else 1


def warm_up(arms: LiveArms, lengths: Lengths, streams: Sequence[int], progress: Progress) -> frozenset[int]:
    """Decode every number of streams in each arm, all arms at a time.

    Returns:
        The numbers of streams for which every arm tells when the last steps of its long answer began. One
        method is for all arms: what an answer takes besides its steps would count for some of them otherwise.
    """
    timed = set()
    for number in streams:
        progress(f"warming up: {number} streams")
        told = arms.ask_all(_question(lengths, number, lengths.long_for(number)))
        if all(answer["tail"] is not None for answer in told.values()):
            timed.add(number)
        else:
            arms.ask_all(_question(lengths, number, lengths.short))
    return frozenset(timed)


def take_round(
    arms: LiveArms, lengths: Lengths, streams: Sequence[int], timed: Collection[int], number: int
) -> list[Reading]:
    """Take a reading of each arm for each number of streams, one arm at a time.

    A reading has round, streams, arm, long and short (seconds of each answer), tail and held_up (of each long
    one: its last steps, and by how much single ones were held up), ms (a step) and different_tokens. Of
    ``timed`` streams it has no short answers; of others it has no tail.
    """
    return [
        {"round": number, "streams": n, "arm": name, **take_reading(arms, lengths, n, n in timed, name)}
        for n in streams
        for name in ORDERS[number % len(ORDERS)]
    ]


def take_reading(arms: LiveArms, lengths: Lengths, streams: int, timed: bool, name: str) -> Reading:
    """Measure what one arm takes for a step of so many streams.

    Args:
        timed: take the last steps of long answers; otherwise the slope between short and long ones, whose
            prompts take what they take twice.

    Raises:
        ArmError: it does not tell when those steps began, though it did before.
    """
    steps = lengths.long_for(streams) - lengths.short

    def answers(tokens: int) -> list[Answer]:
        asked = _question(lengths, streams, tokens)
        return [_answer(arms, name, asked, timed) for _ in range(lengths.repeats_for(streams))]

    answered = answers(lengths.long_for(streams))
    long = [answer["seconds"] for answer in answered]
    tail = [answer["tail"] for answer in answered] if timed else []
    short = [] if timed else [answer["seconds"] for answer in answers(lengths.short)]
    taken = statistics.median(tail) if timed else statistics.median(long) - statistics.median(short)
    return {
        "short": short,
        "long": long,
        "tail": tail,
        "held_up": [answer["held_up"] for answer in answered],
        "ms": taken / steps * 1e3,
        "different_tokens": min(answer["different_tokens"] for answer in answered),
    }


def _question(lengths: Lengths, streams: int, tokens: int) -> dict[str, Any]:
    steps = lengths.long_for(streams) - lengths.short
    return {"do": "decode", "streams": streams, "tokens": tokens, "tail": steps}


def _answer(arms: LiveArms, name: str, question: dict[str, Any], timed: bool) -> Answer:
    for _ in range(TRIES):
        answer = arms.ask(name, question)
        if not timed or answer["tail"] is not None:
            return answer
    raise ArmError(f"{name} arm: does not tell any more when the last {question['tail']} steps began", "")
