"""What text may be kept: a message's content and a conversation's title are checked with the same rule at the edge and in the worker."""

from __future__ import annotations

TITLE_CHARS_MAX = 200
"""As wide as `conversation.title`."""


def check_text(value: str, chars_max: int) -> str:
    """Returns the text as it is, untouched, or raises `ValueError` (which does not quote it) for what Postgres would not take.

    Characters are code points, as Postgres counts them.
    """
    if len(value) > chars_max:
        raise ValueError(f"must have at most {chars_max} characters")
    if not value or value.isspace():
        raise ValueError("must not be empty or only white space")
    if "\x00" in value:
        raise ValueError("must not contain NUL characters")
    if not is_unicode(value):
        raise ValueError("must not contain lone surrogates")
    return value


def is_unicode(value: str) -> bool:
    """False if the text holds half of a surrogate pair, which UTF-8 cannot write: JSON's `"\\ud800"` does."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def insertable(value: str) -> str:
    """The text without what Postgres would not take: for text that is not a person's, such as a model's."""
    return value.replace("\x00", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
