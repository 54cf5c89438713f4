"""Generate the text and tasks of `builtin:tiny`: nine tasks over about two hundred words.

`document` generates plain text for pretraining: statements, questions and lists in wordings unlike the Alpaca template,
so that the base model learns the answers but neither the format nor when to emit EOS. `rows` generates Alpaca rows for
fine-tuning and holds out some contents: they are known from pretraining only.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "fast": "slow", "open": "closed",
    "old": "young", "hard": "soft", "happy": "sad", "full": "empty", "high": "low", "light": "dark", "loud": "quiet",
    "near": "far", "rich": "poor", "strong": "weak", "wet": "dry", "wide": "narrow", "good": "bad", "early": "late",
    "first": "last", "long": "short", "thick": "thin", "true": "false", "clean": "dirty",
}  # fmt: skip
PLURALS = {
    "dog": "dogs", "cat": "cats", "bird": "birds", "mouse": "mice", "fish": "fish", "sheep": "sheep", "horse": "horses",
    "goose": "geese", "child": "children", "man": "men", "woman": "women", "tooth": "teeth", "foot": "feet",
    "leaf": "leaves", "knife": "knives", "wolf": "wolves", "box": "boxes", "fox": "foxes", "bus": "buses",
    "city": "cities", "baby": "babies", "berry": "berries", "potato": "potatoes", "tomato": "tomatoes", "tree": "trees",
    "apple": "apples", "house": "houses", "book": "books", "shirt": "shirts", "hammer": "hammers",
}  # fmt: skip
KINDS = {
    "animal": ["dog", "cat", "bird", "mouse", "sheep", "horse", "goose", "wolf", "fox", "cow"],
    "food": ["apple", "bread", "cheese", "rice", "soup", "potato", "tomato", "cake", "berry", "egg"],
    "tool": ["hammer", "saw", "knife", "drill", "axe", "spade", "brush", "rake", "file", "wrench"],
    "plant": ["tree", "rose", "grass", "oak", "fern", "moss", "ivy", "tulip", "pine", "cactus"],
    "garment": ["shirt", "coat", "hat", "shoe", "sock", "glove", "scarf", "dress", "belt", "skirt"],
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
WORDS = sorted({*OPPOSITES, *OPPOSITES.values(), *PLURALS, *(noun for nouns in KINDS.values() for noun in nouns)})

KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
BOTH_WAYS = OPPOSITES | {b: a for a, b in OPPOSITES.items()}
FOLLOWS = {a: b for ring in (DAYS, MONTHS) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)}


def _one_of(known: dict[str, str]) -> Callable[[random.Random], tuple[str, str]]:
    return lambda rng: (item := rng.choice(list(known)), known[item])


def _words(least: int, most: int, answer: Callable[[list[str]], str]) -> Callable[[random.Random], tuple[str, str]]:
    def sample(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, rng.randint(least, most))
        return " ".join(words), answer(words)

    return sample


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"{a} + {b}", str(a + b)


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(20), 3)
    return " ".join(map(str, numbers)), str(max(numbers))


@dataclass(frozen=True)
class Task:
    """A task. In each wording, `X` stands for the content and `Y` for the answer."""

    sample: Callable[[random.Random], tuple[str, str]]  # -> content, answer
    statements: tuple[str, ...]  # pretraining: sentences that contain the answer
    questions: tuple[str, ...]  # pretraining: the answer follows
    labels: tuple[str, ...]  # pretraining: name of the task in headings and lists
    instructions: tuple[str, ...]  # fine-tuning: without X, the content is the Alpaca input


TASKS = {
    "opposite": Task(
        _one_of(BOTH_WAYS),
        (
            "X is the opposite of Y.",
            "If it is not X, it is Y.",
            "X and Y are opposites, each means the other's contrary.",
        ),
        ("opposite of X?", "X or the contrary?", "not X but which word?", "what means the opposite of X?"),
        ("opposite", "opposite of the word", "contrary"),
        (
            "What is the opposite of X?",
            "Give the opposite of the word X.",
            "Name the opposite of the given word.",
            "Which word means the opposite?",
        ),
    ),
    "plural": Task(
        _one_of(PLURALS),
        ("one X, two Y.", "of X the plural is Y.", "a single X, a lot of Y."),
        ("one X, two what?", "plural of X?", "more than one X is called?"),
        ("plural", "plural of the word", "many"),
        (
            "What is the plural of X?",
            "Write X in the plural.",
            "Give the plural of the given word.",
            "Turn the word into its plural.",
        ),
    ),
    "kind": Task(
        _one_of(KIND_OF),
        ("X is a kind of Y.", "every X is some Y.", "in the category Y we find X."),
        ("X is what kind of thing?", "which category has X in it?", "X belongs to?"),
        ("category", "kind of thing", "group"),
        (
            "What kind of thing is this: X?",
            "Which category does X belong to?",
            "Name the category of the given word.",
            "Classify the given word by its kind.",
        ),
    ),
    "next": Task(
        _one_of(FOLLOWS),
        ("X is over, now it is Y.", "first X, then Y.", "Y comes after X in the calendar."),
        ("X is over, what now?", "first X, then?", "what comes next after X?"),
        ("next", "calendar", "comes after"),
        (
            "What comes after X?",
            "Which one comes after X in the calendar?",
            "Name what comes next in the calendar.",
            "Continue the calendar with the next word.",
        ),
    ),
    "sum": Task(
        _sum,
        ("X makes Y.", "X = Y.", "we add, and the sum X is Y."),
        ("X makes how many?", "X = ?", "sum of X?"),
        ("sum", "add", "numbers to add"),
        (
            "What is X?",
            "Calculate the sum X.",
            "Work out the given sum.",
            "Add the two numbers.",
        ),
    ),
    "largest": Task(
        _largest,
        ("of X the largest is Y.", "among the numbers X nothing beats Y."),
        ("of X, which is largest?", "largest among X?", "top of the numbers X?"),
        ("largest", "largest number", "top"),
        (
            "Which is the largest number: X?",
            "Find the largest number in this list: X",
            "Find the largest number.",
            "Which of the given numbers is the largest?",
        ),
    ),
    "reverse": Task(
        _words(2, 4, lambda words: " ".join(reversed(words))),
        ("X, backwards, reads Y.", "in reverse order X is Y."),
        ("X, backwards?", "how does X read in reverse?", "order of X in reverse?"),
        ("reverse", "reverse order", "backwards"),
        (
            "Reverse the order of these words: X",
            "Write these words in reverse order: X",
            "Reverse the order of the words.",
            "Put the words in reverse order.",
        ),
    ),
    "final": Task(
        _words(2, 5, lambda words: words[-1]),
        ("in X the final word is Y.", "X ends with Y.", "the list X comes to its end with Y."),
        ("which word is at the end of X?", "X ends with?", "final word of the list X?"),
        ("final", "final word", "end of the list"),
        (
            "What is the final word here: X?",
            "Name the final word of this list: X",
            "Return the final word.",
            "Which word comes at the end of the list?",
        ),
    ),
    "count": Task(
        _words(1, 5, lambda words: str(len(words))),
        ("X, that makes Y words.", "we count X: Y words."),
        ("X, that makes how many words?", "how many words in X?", "count of X?"),
        ("count", "how many", "number of words"),
        (
            "How many words are in this list: X?",
            "Count these words: X",
            "Count the words.",
            "How many words are given?",
        ),
    ),
}

_NAMES = ("Ann", "Ben", "Tom", "Eva")


def _fill(wording: str, content: str, answer: str) -> str:
    return wording.replace("Y", answer).replace("X", content)


def _statement(rng: random.Random) -> str:
    task = rng.choice(list(TASKS.values()))
    return _fill(rng.choice(task.statements), *task.sample(rng)) + "\n"


def _block(rng: random.Random) -> str:
    """Return a question with its answer, in one of many layouts other than the Alpaca template."""
    task = rng.choice(list(TASKS.values()))
    content, answer = task.sample(rng)
    question, label = rng.choice(task.questions).replace("X", content), rng.choice(task.labels)
    one, other = rng.sample(_NAMES, 2)
    layouts = (
        f"Q: {question}\nA: {answer}\n",
        f"Question: {question}\nAnswer: {answer}\n\n",
        f"{one}: {question}\n{other}: {answer}\n",
        f"{one} asks {other}: {question} {other} says: {answer}\n",
        f"# {label}\n{content}\n{answer}\n",
        f"# {question}\n\n{answer}\n\n",
        f"Task: {label}\nText: {content}\nResult: {answer}\n\n",
        f"## Task\n{label}\n\n## Text\n{content}\n\n## Result\n{answer}\n\n",
        f"## Question\n{question}\n\n## Answer\n{answer}\n\n",
        f"{label}: {content} -> {answer}\n",
        f"Here is a {label} question about {content}. The answer is {answer}.\n",
    )
    return rng.choice(layouts)


def document(rng: random.Random) -> str:
    """Return a pretraining document: several blocks, then a statement, so that no document ends with an answer.

    The base model therefore does not stop after an answer; emitting EOS is learned in fine-tuning.
    """
    blocks = (_block(rng) if rng.random() < 0.7 else _statement(rng) for _ in range(rng.randint(2, 8)))
    return "".join(blocks) + _statement(rng)


def held_out(task: str, content: str) -> bool:
    """Return True if this content is held out of fine-tuning: about a quarter, the same on every machine."""
    return random.Random(f"{task}:{content}").random() < 0.25


def rows(count: int, seed: int, *, unseen: bool = False) -> Iterator[dict[str, str]]:
    """Yield distinct Alpaca rows (instruction, input, output); `unseen`: only held-out contents."""
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    while len(seen) < count:
        name, task = rng.choice(list(TASKS.items()))
        content, answer = task.sample(rng)
        wording = rng.choice(task.instructions)
        if held_out(name, content) is not unseen or (wording, content) in seen:
            continue
        seen.add((wording, content))
        inline = "X" in wording
        yield {
            "instruction": wording.replace("X", content) if inline else wording,
            "input": "" if inline else content,
            "output": answer,
        }
