"""A language model behind an OpenAI-compatible endpoint, asked with the standard library only."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from thrifty.errors import KnobError, ToolError

RETRY = frozenset({408, 409, 429, 500, 502, 503, 504})
MOST_BYTES = 4 * 2**20  # of an answer
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
ADVICE = {
    400: "the endpoint does not accept the request; check the model's name and max_tokens",
    401: "the key was refused; set the environment variable {key} to a valid one",
    403: "the key may not use this model; check the account, or set {key}",
    404: "no such address or model; the base address usually ends in /v1, and the model must exist there",
    429: "too many requests or no quota; wait, or ask for fewer labels",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere; it is an error instead."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


@dataclass(frozen=True)
class ChatEndpoint:
    """`POST {url}/chat/completions`, one prompt at a time.

    url: such as https://host/v1 or http://localhost:8080/v1. The key is read from the environment variable
    `key_variable` when it is set; it is never stored, and never sent over plain http except to this machine. Failures
    that may pass (408, 409, 429, 5xx, a lost connection, a timeout) are tried `retries` more times, waiting as the
    server says or 1, 2, 4, ... seconds.

    Raises KnobError for a bad address and ToolError when there is no answer, saying what to do.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    retries: int = 3
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 200
    longest_wait_s: float = 60.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KnobError(f"url is '{self.url}'; it must be an http(s) address, such as http://localhost:8080/v1")
        if self._key and parts.scheme == "http" and parts.hostname not in LOCAL:
            raise KnobError(
                f"{self.key_variable} is set and {self.url} is plain http: the key would be readable; use https"
            )
        if self.timeout_s <= 0 or self.retries < 0 or self.max_tokens < 1:
            raise KnobError("timeout_s must be positive, retries 0 or more, max_tokens 1 or more")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the answers depend on; never the key."""
        return {
            "kind": "endpoint", "url": self.url, "model": self.model, "seed": self.seed, "temperature":
            self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """Return one answer to each prompt."""
        return [self._ask(prompt) for prompt in prompts]

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": self.temperature,
            "max_tokens": self.max_tokens, "seed": self.seed,
        }  # fmt: skip
        content = self._post(json.dumps(body).encode())
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as err:
            raise ToolError(
                f"{self.url} answered something else than a chat completion: {content[:200]!r}; check the address"
            ) from err
        if not isinstance(text, str):
            raise ToolError(f"{self.url}: model '{self.model}' gave no text; it may be no chat model")
        return text

    def _post(self, body: bytes) -> bytes:
        opener = urllib.request.build_opener(_NoRedirect)
        address = self.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        for turn in range(self.retries + 1):
            request = urllib.request.Request(address, body, headers, method="POST")
            try:
                with opener.open(request, timeout=self.timeout_s) as reply:
                    content: bytes = reply.read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    raise ToolError(f"{address} answers more than {MOST_BYTES} bytes; that is no chat completion")
                return content
            except urllib.error.HTTPError as err:
                detail = err.read(500).decode("utf-8", "replace")
                problem, wait = f"HTTP {err.code}: {self._advice(err.code)}; it said: {detail!r}", _wait(err, turn)
                again = err.code in RETRY
            except (OSError, http.client.HTTPException) as err:  # refused, lost, timed out, cut short
                reason = getattr(err, "reason", err)
                problem, wait = (
                    f"{reason}; is the server running, and timeout_s={self.timeout_s} long enough?",
                    2.0**turn,
                )
                again = True
            if not again or turn == self.retries:
                break
            self.sleep(min(wait, self.longest_wait_s))
        raise ToolError(f"{address} gave no answer after {turn + 1} attempt(s): {problem}")

    def _advice(self, code: int) -> str:
        if 300 <= code < 400:
            return "the endpoint has moved; give the new address (redirects are not followed, they would carry the key)"
        return ADVICE.get(code, "the server failed; try again later").format(key=self.key_variable)


def _wait(err: urllib.error.HTTPError, turn: int) -> float:
    given = err.headers.get("Retry-After", "") if err.headers else ""
    return float(given) if given.isdigit() else 2.0**turn
