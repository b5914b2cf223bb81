"""Where a reply comes from: one small interface, and the two things behind it.

    responder(settings).stream(turns)     the reply in pieces, for the turns so far, oldest first; the last is the user's

`OpenAIResponder` asks any OpenAI-compatible server. Without one, `OfflineResponder` answers in the manner of Weizenbaum's ELIZA: it turns a
remark round, asks back, and comes back to what was said before. Whatever comes out can be stored: `_storable` sees to it for both.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import structlog

from worker.errors import ConfigurationError, ReplyFailed
from worker.settings import Settings
from worker.text import insertable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the conversation, as far as a reply needs it."""

    role: Literal["user", "assistant"]
    content: str


class Responder(Protocol):
    """Whatever writes replies."""

    def stream(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        """The reply in pieces; together they are text that can be stored. Raises `ReplyFailed`, also half-way."""
        ...

    async def close(self) -> None:
        """Lets go of its connections."""
        ...


def responder(settings: Settings) -> Responder:
    """The one that the settings ask for; raises `ConfigurationError` if it cannot be had."""
    if settings.llm_model is None:
        if settings.llm_api_key is not None:
            raise ConfigurationError("LLM_API_KEY needs LLM_MODEL: the name of the model that is to reply")
        return OfflineResponder(chars_max=settings.message_chars_max)
    return OpenAIResponder(settings)


async def _storable(pieces: AsyncGenerator[str, None], chars_max: int) -> AsyncGenerator[str, None]:
    """The pieces without what Postgres would not take, not longer than a message may be, and not only white space."""
    room, half, blank = chars_max, "", True
    async with aclosing(pieces):
        async for piece in pieces:
            text = half + piece
            half = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""  # its other half comes with the next piece
            text = insertable(text[:-1] if half else text)
            if fits := text[:room]:
                blank = blank and fits.isspace()
                yield fits
            if len(text) > room:
                raise ReplyFailed(f"The reply was cut at {chars_max} characters.")
            room -= len(text)
    if blank:
        raise ReplyFailed()


_BROKE_OFF = "The model broke off. What it had said is kept; send another message to go on."
_CUT = {
    "": _BROKE_OFF,
    "length": "The model reached its own limit. What it had said is kept; send another message to go on.",
    "content_filter": "The model's filter cut the reply. What it had said is kept.",
}
"""How a reply can end that is not whole."""


# --- a model --------------------------------------------------------------------------------------------------------------------


class OpenAIResponder:
    """Replies from a server that speaks OpenAI's chat completions. Neither its key nor what was said ever reaches a log or a client."""

    def __init__(self, settings: Settings, transport: Any = None) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigurationError(
                "LLM_MODEL is set, but the openai client is not installed; install it with: pip install '.[llm]'"
            ) from None
        if settings.llm_base_url is None and settings.llm_api_key is None:
            raise ConfigurationError("LLM_MODEL needs LLM_BASE_URL (any OpenAI-compatible server) or LLM_API_KEY (OpenAI's own)")
        self._failures: tuple[type[Exception], ...] = (openai.OpenAIError, TimeoutError, ValueError)
        self._model = settings.llm_model or ""
        self._seconds = settings.llm_timeout_seconds
        self._chars_max = settings.message_chars_max
        self._client = openai.AsyncOpenAI(
            base_url=settings.llm_base_url,
            api_key=settings.llm_api_key.get_secret_value() if settings.llm_api_key else "none",
            max_retries=1,
            timeout=settings.llm_timeout_seconds,
            # A redirect would carry what people wrote to wherever the answer says.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, transport=transport),
        )

    def stream(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        """See `Responder.stream`; the whole reply takes at most `LLM_TIMEOUT_SECONDS`."""
        return _storable(self._pieces(turns), self._chars_max)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _pieces(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        until, ended, begun = time.monotonic() + self._seconds, "", False
        messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns]
        answer = None
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._client.chat.completions.create(model=self._model, messages=messages, stream=True)
            chunks = aiter(answer)
            while True:
                async with asyncio.timeout(until - time.monotonic()):  # not around the whole: the reader's time is its own
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                ended = _ended(chunk) or ended
                if text := _text(chunk):
                    begun = True
                    yield text
        except self._failures as exc:
            log.warning("reply failed", error=type(exc).__name__, status=getattr(exc, "status_code", None))
            raise ReplyFailed(_BROKE_OFF if begun else None) from exc
        finally:
            if answer is not None:
                await answer.close()
        if ended in _CUT:  # without any reason, the connection ended before the reply did, and nothing else would tell
            log.warning("reply failed", reason=ended or "no end")
            raise ReplyFailed(_CUT[ended] if begun else None)


def _ended(chunk: Any) -> str:
    """Why the reply ends here, if it does."""
    reason = chunk.choices[0].finish_reason if chunk.choices else None
    return reason if isinstance(reason, str) else ""


def _text(chunk: Any) -> str:
    """What a chunk adds; servers differ in what they leave out."""
    delta = chunk.choices[0].delta if chunk.choices else None
    content = delta.content if delta else None
    return content if isinstance(content, str) else ""


# --- no model -------------------------------------------------------------------------------------------------------------------


class OfflineResponder:
    """Replies by rules. The same turns and the same seed give the same reply, in every process."""

    def __init__(self, seed: int = 0, chars_max: int = 100_000) -> None:
        self._seed = seed
        self._chars_max = chars_max

    def stream(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        """See `Responder.stream`."""
        return _storable(_words(self.reply(turns)), self._chars_max)

    async def close(self) -> None:
        """There is nothing to let go of."""

    def reply(self, turns: Sequence[Turn]) -> str:
        """The whole reply; at most some 300 characters."""
        said = [turn.content for turn in turns if turn.role == "user"]
        last = _plain(said[-1]) if said else ""
        chance = random.Random(f"{self._seed}|{len(turns)}|{last}")  # noqa: S311 - variety, not secrecy
        candidates = _candidates(last, [_plain(text) for text in said[:-1]], chance)
        before = next((turn.content for turn in reversed(turns) if turn.role == "assistant"), "")
        fresh = [candidate for candidate in candidates if candidate != before]
        return chance.choice(fresh or candidates)


async def _words(text: str) -> AsyncGenerator[str, None]:
    for word in re.findall(r"\S+\s*", text):
        yield word


def _candidates(text: str, earlier: Sequence[str], chance: random.Random) -> list[str]:
    """Everything that could be said to this."""
    if other := _other_language(text):
        return other
    topics = _topics(earlier)
    if re.search(r"\b(do you|can you|you) remember\b|\bwhat did i (say|tell)\b", text):
        return [f"You spoke of your {topic}. What about it?" for topic in topics[-2:]] or [
            "So far you have told me little. Where shall we begin?"
        ]
    for pattern, replies in _RULES:
        if found := re.search(pattern, text):
            part = _turned(found.group(1)) if found.groups() else ""
            if part or not found.groups():
                return [reply.format(part) for reply in replies]
    if topics and chance.random() < 0.5:
        return [reply.format(chance.choice(topics)) for reply in _COME_BACK]
    return list(_GO_ON)


def _plain(text: str) -> str:
    """The beginning, in lower case, on one line and with straight apostrophes: what the rules are written for."""
    return " ".join(text[:1000].replace("’", "'").lower().split())


def _turned(part: str) -> str:
    """A piece of a remark as one says it back: "i lost my keys" becomes "you lost your keys"."""
    clause = re.split(r"[.!?;:,…\"()]", part, maxsplit=1)[0].strip()
    words = re.sub(r"\byou are\b|\byou're\b", "i_am", clause).split()[:16]
    turned = [_TURNED.get(word, word) for word in words]
    if turned and turned[-1] == "I":
        turned[-1] = "me"
    return " ".join(turned)[:120]


def _topics(earlier: Sequence[str]) -> list[str]:
    """What the user called "my …" before, the latest last."""
    found = [
        match
        for text in earlier
        for match in re.findall(r"\bmy ((?:(?!(?:is|was|are|and|but|has|will|to|in|on|at)\b)[a-z'-]+ ?){1,3})", text)
    ]
    return [topic.strip() for topic in found if topic.strip() not in ("god", "name", "self")][-5:]


def _other_language(text: str) -> list[str]:
    """For what the rules cannot read: no words at all, another script, or a greeting in a language that they do not know."""
    letters = [character for character in text if character.isalpha()]
    first = re.split(r"[\s,.!?¡¿、。！？]+", text.lstrip("¡¿ "), maxsplit=1)[0]
    if first in _GREETINGS:
        return [f"{first.capitalize()}! I only know English, I'm afraid, but whatever you write is kept exactly as it is."]
    if not letters:
        return ["I can see that, but I am better with words. What is behind it?", "Tell me in words, if you like."]
    if sum(character.isascii() for character in letters) * 2 < len(letters):
        return ["I only know English, I'm afraid, but whatever you write is kept exactly as it is."]
    return []


_TURNED = {
    **{"i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself", "am": "are", "was": "were"},
    **{"i'm": "you are", "i've": "you have", "i'll": "you will", "i'd": "you would"},
    **{"you": "I", "your": "my", "yours": "mine", "yourself": "myself", "i_am": "I am", "you've": "I have", "you'll": "I will"},
}
_GREETINGS = frozenset({
    *("hola", "bonjour", "salut", "hallo", "servus", "ciao", "buongiorno", "olá", "oi", "hej", "ahoj", "cześć", "merhaba", "selam", "szia"),
    *("привет", "здравствуйте", "привіт", "γεια", "שלום", "مرحبا", "سلام", "नमस्ते", "你好", "您好", "こんにちは", "안녕", "안녕하세요"),
})  # fmt: skip
_COME_BACK = (
    "Earlier you spoke of your {0}. Has this anything to do with it?",
    "Let us go back to your {0} for a moment. How does that stand now?",
    "I keep thinking of what you said about your {0}. Tell me more of that.",
)
_GO_ON = (
    "Please go on.",
    "Tell me more about that.",
    "What does that suggest to you?",
    "I see. And how do you feel about it?",
    "Can you give me an example?",
)
_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"\b(?:who|what) are you\b|\bare you (?:a |an )?(?:bot|robot|machine|computer|human|real|ai|person|program)|^help\b",
        (
            "I am Chatkeep's built-in responder: a few rules that turn your words round. With LLM_MODEL set, a model answers in my place.",
            "Only a handful of rules, in the manner of ELIZA. What I am good at is keeping what you write. What is on your mind?",
        ),
    ),
    (r"\b(?:thanks|thank you|cheers)\b", ("You are welcome. What else is there?", "Gladly. Is there anything you would add?")),
    (r"^(?:bye|goodbye|good night|see you|farewell)\b", ("Goodbye. All of this will be here when you come back.", "Until next time.")),
    (
        r"^(?:hello|hi|hey|good (?:morning|afternoon|evening)|greetings)\b(?! \w+ \w+ \w+)",
        ("Hello. What is on your mind?", "Good to see you. What would you like to talk about?"),
    ),
    (r"\bmy name is ([a-z'-]+)", ("Good to meet you. What brings you here?", "I shall remember that. What would you like to talk about?")),
    (r"\b(?:i'm|i am)? ?sorry\b", ("There is nothing to be sorry for.", "No need. What makes you apologise?")),
    (
        r"\bi(?: am|'m)? feel(?:ing)? (.+)",
        ("Do you often feel {0}?", "When did you begin to feel {0}?", "What would change if you did not feel {0}?"),
    ),
    (
        r"\bi (?:need|want|wish for|would like) (.+)",
        ("What would it mean to you to have {0}?", "Why {0}, of all things?", "And if you never got {0}?"),
    ),
    (r"\bi (?:can't|cannot|can not|could not|couldn't) (.+)", ("What keeps you from it?", "How do you know that you cannot {0}?")),
    (r"\bi (?:don't|do not) (.+)", ("Why do you not {0}?", "Would you like to {0}?", "What would it take for you to {0}?")),
    (r"\bi (?:think|believe|guess|suppose) (?:that )?(.+)", ("What makes you think {0}?", "And if it were not so?", "How sure are you?")),
    (r"\bi (?:love|like|enjoy|adore) (.+)", ("What is it about {0} that you like?", "When did you first find out about {0}?")),
    (r"\bi (?:hate|dislike|fear|am afraid of) (.+)", ("What is it about {0}?", "Was there a time when {0} did not trouble you?")),
    (
        r"\bi(?: am|'m) (.+)",
        ("How long have you been {0}?", "How does it feel to be {0}?", "Is it because you are {0} that you came here?"),
    ),
    (r"\bi(?: have|'ve) (.+)", ("How did it come that you have {0}?", "What does it change that you have {0}?")),
    (
        r"\bmy (?:mother|mum|mom|father|dad|parents|sister|brother|wife|husband|partner|son|daughter|child|children|family)\b",
        ("Tell me more about your family.", "Who else in your family is there?", "What comes to mind when you think of them?"),
    ),
    (r"\bmy (.+)", ("Your {0}? Tell me more.", "What else comes to mind when you think of your {0}?", "Why do you say that of your {0}?")),
    (r"\bbecause (.+)", ("Is that the real reason?", "What other reasons might there be?", "Does that explain anything else?")),
    (r"\b(?:dream|dreamt|dreamed|nightmare)", ("What does that dream suggest to you?", "Who else was in it?", "Do you dream often?")),
    (r"\b(?:always|never|everybody|everyone|nobody)\b", ("Really every time?", "Can you think of an exception?", "When, for instance?")),
    (r"\byou(?: are|'re) (.+)", ("What makes you think that I am {0}?", "Does it please you to think that I am {0}?", "Perhaps. And you?")),
    (r"^why\b", ("What would you say yourself?", "Why do you ask?", "Suppose there were an answer: what would you do with it?")),
    (r"^(?:can|could|would|will) you\b", ("I can only listen and ask back. What would it do for you?", "What if I could not?")),
    (
        r"^(?:what|how|when|where|who|which|is|are|do|does|did)\b.*\?",
        ("What do you think?", "Why does that interest you?", "What answer would you like best?"),
    ),
    (r"^(?:yes|yeah|yep|sure|of course|ok|okay)\b", ("You seem quite sure.", "I see. Can you say a little more?", "Good. And then?")),
    (r"^(?:no|nope|nah|not really)\b", ("Why not?", "Are you saying no just to be brief?", "What would it take for a yes?")),
    (r"\?$", ("What do you think?", "Why do you ask?", "What made you wonder?")),
)
