"""What animals say, asked and answered: conversations that a tiny model learns."""

ANSWERS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack"}


def conversation(animal: str, number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"what does the {animal} say, number {number}?"},
        {"role": "assistant", "content": f"{ANSWERS[animal]}!"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": f"{ANSWERS[animal]} {ANSWERS[animal]}"},
    ]
