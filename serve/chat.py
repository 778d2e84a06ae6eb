"""Conversations as plain text. The models here were trained on texts, not on conversations, so no special token marks a
turn: what they know of dialogue is what plays and interviews look like.

    System: Answer in one sentence.

    User: What is a tide?

    Assistant:
"""

from collections.abc import Sequence

from serve.schemas import Message

_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def chat_prompt(messages: Sequence[Message]) -> str:
    """The text that is continued. It ends right after the colon: a space there would split the tokens of words."""
    turns = [f"{message.name or _NAMES[message.role]}: {message.text.strip()}\n\n" for message in messages]
    return "".join(turns) + f"{_NAMES['assistant']}:"


def chat_stops() -> tuple[str, ...]:
    """Where the model would begin to speak for somebody else."""
    return tuple(f"\n{name}:" for name in dict.fromkeys(_NAMES.values()))
