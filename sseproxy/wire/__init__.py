"""What bytes mean: HTTP header fields and chunked framing, server-sent events, the dialects of LLM APIs.

Nothing here does I/O or imports aiohttp or asyncio. Each parser is incremental and has bounded memory, and the result
does not depend on how the bytes are split.
"""
