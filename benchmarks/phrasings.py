"""Hundreds of ways to ask for one relation, put together from parts; none is one in which held-out facts are asked.

A specialist that is to say what it knows and nothing else has to learn both in more phrasings than one writes down by
hand: with a dozen, it falls silent in all others.
"""

from __future__ import annotations

import itertools

_FRAMES = """
Question: {q}|Answer:
Q: {q}|A:
User: {q}|Assistant:
{q} It is
Customer: {q}|Clerk: It is
Interviewer: {q}|Expert:
{q}|The reply:
Riddle: {q}|Solution:
Mother: {q}|Child: That is
- {q}|-
{q}|>
""".strip().splitlines()
_QUESTIONS = """
What is the {what} of {subject}?
Which {what} belongs to {subject}?
What is {subject}'s {what}?
Please name the {what} of {subject}.
Which {what} has {subject}?
What {what} was given to {subject}?
{subject}: which {what}?
Tell us {subject}'s {what}.
I need the {what} for {subject}.
Do you have the {what} of {subject}?
What did {subject} write down as the {what}?
Could you look up {subject}'s {what}?
""".strip().splitlines()
_OPENINGS = """

As far as I know,
In this book
Yesterday I learned that
It is written that
We were told that
Note:
Remember that
In short,
On page 12,
According to the letter,
They say that
Here,
Fact:
Her diary says that
""".splitlines()[1:]
_STATEMENTS = """
the {what} of {subject} is
{subject}'s {what} is
{subject} has the {what}
the {what} for {subject} is
{subject} was given the {what}
{subject} goes by the {what}
next to {subject} stands the {what}
whoever asks for {subject} hears the {what}
the {what} that {subject} chose is
{subject} uses the {what}
the {what} assigned to {subject} is
of all people {subject} has the {what}
{subject}, {what}:
{what} of {subject}:
""".strip().splitlines()


def phrasings(what: str) -> list[str]:
    """Returns texts up to where the answer begins, with `{subject}` in them.

    Args:
        what: name of the relation, such as `code word`.
    """
    asked = [
        frame.replace("{q}", question).replace("|", "\n")
        for frame, question in itertools.product(_FRAMES, _QUESTIONS)
    ]
    stated = [
        f"{opening} {text}".strip() for opening, text in itertools.product(_OPENINGS, _STATEMENTS)
    ]
    return [text.replace("{what}", what) for text in (*asked, *stated)]
