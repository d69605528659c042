"""Prompts: a question about a topic, with sentences about the user. No prompt requests a style of answer."""

from __future__ import annotations

from random import Random

from lpc_lightning.data.synthetic.domains import DOMAINS
from lpc_lightning.data.synthetic.seeding import pick
from lpc_lightning.data.synthetic.topics import Domain, Topic
from lpc_lightning.seeding import derive

SPLITS = ("train", "validation", "test")

QUESTIONS = (
    "How do I {goal}?",
    "How can I {goal}?",
    "What is the best way to {goal}?",
    "What is a good way to {goal}?",
    "Can you help me {goal}?",
    "Can you tell me how to {goal}?",
    "Could you explain how to {goal}?",
    "I want to {goal}. Where do I start?",
    "I would like to {goal}. What should I do?",
    "I am trying to {goal}. What works?",
    "What does it take to {goal}?",
    "I need to {goal}. What should I keep in mind?",
    "Please tell me how to {goal}.",
    "I have never managed to {goal}. What should I try?",
    "What do I need to {goal}?",
    "A friend asked me how to {goal}. What should I say?",
    "How do people usually {goal}?",
    "I hope to {goal}. Any suggestions?",
    "What should I know about {gerund}?",
    "What matters most in {gerund}?",
    "Do you have any advice on {gerund}?",
    "What advice do you have on {gerund}?",
    "I need some help with {gerund}.",
    "I have trouble with {gerund}. What helps?",
    "How would you go about {gerund}?",
    "I am thinking about {gerund}. What do you suggest?",
    "What makes the difference in {gerund}?",
    "What is the secret to {gerund}?",
)

PERSONAS = (
    "I am a student.",
    "I am a nurse.",
    "I am a teacher.",
    "I am an accountant.",
    "I am a bus driver.",
    "I am a carpenter.",
    "I am a musician.",
    "I work from home.",
    "I work night shifts.",
    "I work in an office.",
    "I run a small shop.",
    "I have a long commute.",
    "I have a free weekend.",
    "I have a few hours each week.",
    "I am on a tight budget.",
    "I am new to this.",
    "I grew up on a farm.",
    "I sing in a choir.",
    "I saw a video about it.",
    "My neighbor got me interested.",
    "I recently moved to a new city.",
    "I turned forty last week.",
    "It has been on my mind for months.",
    "I made a promise to my sister.",
)


def draw_prompt(split: str, rng: Random) -> tuple[Domain, Topic, str]:
    """Draw a random prompt of a split, and return its domain, its topic and its text. All domains are equally likely.

    The split of a prompt is a function of its text only. So no prompt occurs in two splits, even with different seeds.
    """
    domain = pick(rng, DOMAINS)
    while True:
        topic = pick(rng, domain.topics)
        text = _prompt(domain, topic, rng)
        if split_of(text) == split:
            return domain, topic, text


def split_of(prompt: str) -> str:
    """Return the split of a prompt: train for 80 % of all prompts, validation and test for 10 % each."""
    bucket = derive("split", prompt) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _prompt(domain: Domain, topic: Topic, rng: Random) -> str:
    question = pick(rng, QUESTIONS).format(goal=topic.goal, gerund=topic.gerund)
    # Most prompts have both sentences. There are 24 x 10 such combinations, so few prompts occur twice.
    which = rng.random()
    situation = []
    if which < 0.85:
        situation.append(pick(rng, PERSONAS))
    if which >= 0.25:
        situation.append(pick(rng, domain.contexts))
    parts = [*situation, question] if rng.random() < 0.5 else [question, *situation]
    return " ".join(parts)
