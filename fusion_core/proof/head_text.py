"""A short text of several kinds, by whose tokens a quantised head is measured."""

from __future__ import annotations

TEXT = """\
The ferry leaves the harbour at seven in the morning, and again at four in the afternoon. In winter, when
the wind comes from the north, the second crossing is often cancelled; then people wait in the small cafe
beside the pier, drink tea, and look at the grey water. Nobody is in a hurry. On the island there are two
farms, a school with eleven children, and a lighthouse that has had no keeper since 1987.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("mean() of no values")
    return sum(values) / len(values)

{"name": "crossing", "times": ["07:00", "16:00"], "days": {"from": 1, "to": 5}, "price": 12.50}

Der Zug nach Hamburg faehrt heute von Gleis sieben. Le train pour Lyon part a dix heures et quart.
El barco vuelve por la tarde, cuando el viento lo permite.
船は朝七時に港を出ます。 Паром отходит в семь утра.

1. Read the question. 2. Write down what is known: x + 3 = 10, so x = 7. 3. Check: 7 + 3 = 10.
The answer is 7.
"""
