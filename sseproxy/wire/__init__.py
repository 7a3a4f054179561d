"""What the bytes mean: HTTP headers and chunked framing, server-sent events, the dialects of LLM APIs.

Nothing here does I/O or knows of aiohttp or asyncio. Each parser is incremental and bounded, and any split of the
same bytes gives the same result.
"""
