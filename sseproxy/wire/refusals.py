"""How APIs say that a prompt is too long for the model. Another model may take it."""

from __future__ import annotations

import re
from typing import Final

# In the words of OpenAI and those that copy it (`context_length_exceeded`, "maximum context length"; vLLM, SGLang,
# Groq, Mistral, DeepSeek), of Anthropic ("prompt is too long: 210000 tokens > 200000", "exceed context limit"), Gemini
# ("The input token count (1100000) exceeds the maximum number of tokens allowed"), llama.cpp
# (`exceed_context_size_error`, "exceeds the available context size"), TGI ("`inputs` tokens + `max_new_tokens` must"),
# Bedrock ("Input is too long for requested model"), Cohere ("too many tokens"), xAI ("maximum prompt length").
_TOO_LONG: Final = re.compile(
    rb"""
    context_length_exceeded | exceed_context_size_error | string_above_max_length
    | (?: maximum | max | model's ) \s (?: model \s )? (?: context | prompt ) \s? (?: length | window | size )
    | exceeds? \s (?: the \s )? (?: available \s | model's \s | maximum \s )? context \s
      (?: limit | size | length | window )
    | prompt \s is \s too \s long | input \s is \s too \s long | too \s many \s (?: input \s )? tokens
    | input \s (?: token \s count | length ) [^"]{0,60} exceeds
    | tokens \s \+ \s `?max_new_tokens`? \s must \s be
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_too_long(body: bytes) -> bool:
    """Whether `body`, the beginning of a response with status 400, says that the prompt is too long."""
    return _TOO_LONG.search(body) is not None
