"""What to change for each finding, by program. Data, and no logic but the look-up.

The lines were checked with the programs of `tests/test_doctor_fronts.py`, or are from the documentation of the service.
Those of nginx can be pasted into its configuration: everything except directives is a comment, on a line that fits a
terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from .verdict import Kind

NGINX, INGRESS, HAPROXY, ENVOY, TRAEFIK, CADDY, APACHE = (
    *("nginx", "ingress-nginx", "HAProxy", "Envoy", "Traefik", "Caddy", "Apache"),
)
CLOUDFLARE, ALB, API_GATEWAY, FRONT_DOOR = "Cloudflare", "ALB", "API Gateway", "Azure Front Door"
EXPRESS, NEXT, FASTAPI, SSEPROXY = "Express", "Next.js", "FastAPI", "sseproxy"

PROGRAMS: Final = (
    *(NGINX, INGRESS, HAPROXY, ENVOY, TRAEFIK, CADDY, APACHE),
    *(CLOUDFLARE, ALB, API_GATEWAY, FRONT_DOOR, EXPRESS, NEXT, FASTAPI, SSEPROXY),
)
# Programs that call themselves by the name of another one.
_ALSO: Final = {NGINX: (INGRESS,)}

REMEDIES: Final[dict[Kind, dict[str, str]]] = {
    "buffered": {
        NGINX: "proxy_buffering off; proxy_http_version 1.1; gzip off;\n# or the origin sends X-Accel-Buffering: no",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-buffering: "off"',
        HAPROXY: "option http-no-delay; no compression of text/event-stream; no option http-buffer-request",
        ENVOY: "no buffer filter and no Lua or Wasm filter that reads the body; no compressor for text/event-stream",
        TRAEFIK: "no middleware buffering; compress: excludedContentTypes: [text/event-stream]; flushInterval: -1ms",
        CADDY: "no response_buffers in reverse_proxy; flush_interval is not needed for text/event-stream; encode "
        "without text/event-stream",
        APACHE: "ProxyPass … flushpackets=on; SetEnv no-gzip 1 for this path; no mod_deflate, mod_security body access",
        CLOUDFLARE: "no Response Buffering (Enterprise), no Rocket Loader or rewriting Worker; the origin sends "
        "Content-Type: text/event-stream and Cache-Control: no-transform",
        ALB: "ALB does not buffer HTTP targets; a Lambda target does: use a function URL with RESPONSE_STREAM",
        API_GATEWAY: "REST APIs: response transfer mode STREAM; HTTP APIs always buffer: bypass them",
        FRONT_DOOR: "no caching and no compression on the route; Standard and Premium, not classic",
        EXPRESS: "res.flush() after each write, or compression({filter}) without text/event-stream",
        NEXT: "compress: false in next.config.js, or Content-Encoding: none; return a Response with a ReadableStream",
        FASTAPI: "StreamingResponse with an async generator; no GZipMiddleware and no BaseHTTPMiddleware around it",
    },
    "limit": {
        NGINX: "send_timeout 1h; proxy_read_timeout 1h;\n# nginx has no limit for the whole answer: look at other hops",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-read-timeout: "3600"',
        HAPROXY: "timeout server 1h; timeout tunnel is for WebSockets only",
        ENVOY: "route: timeout: 0s  (the default is 15 s); max_stream_duration: 0s",
        TRAEFIK: "respondingTimeouts.writeTimeout: 0s",
        CADDY: "servers { timeouts { write 0 } }; no stream_timeout",
        APACHE: "ProxyTimeout 3600; RequestReadTimeout does not matter here",
        CLOUDFLARE: "Workers: stream the body, and do not wait for it",
        ALB: "ALB has no such limit; look at the targets",
        API_GATEWAY: "a streamed answer may take 15 minutes; else the limit is 29 s: go around it",
        FRONT_DOOR: "origin response timeout: up to 240 s",
        EXPRESS: "server.timeout = 0; server.requestTimeout = 0",
        NEXT: "export const maxDuration = 300  (the platform's limit)",
        FASTAPI: "gunicorn --timeout 0, or worker class uvicorn",
    },
    "silence": {
        NGINX: "proxy_read_timeout 1h;\n# the default is 60 s",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-read-timeout: "3600"',
        HAPROXY: "timeout server 1h; timeout client 1h",
        ENVOY: "stream_idle_timeout: 3600s; route: idle_timeout",
        TRAEFIK: "serversTransport.forwardingTimeouts.responseHeaderTimeout: 0s, readIdleTimeout",
        CADDY: "transport http { response_header_timeout 0; read_timeout 0 }",
        APACHE: "ProxyTimeout 3600; Timeout 3600",
        CLOUDFLARE: "100 s, which only Enterprise can change: send heartbeats (sseproxy: heartbeat: 15s)",
        ALB: "idle_timeout.timeout_seconds = 4000  (the default is 60 s)",
        API_GATEWAY: "5 minutes idle for regional, 30 s for edge-optimised: send heartbeats",
        FRONT_DOOR: "origin response timeout up to 240 s, and heartbeats",
        EXPRESS: "server.timeout = 0; write a comment every 15 s",
        NEXT: "write a comment every 15 s",
        FASTAPI: "sse-starlette: EventSourceResponse(ping=15)",
        SSEPROXY: "timeouts: {head, first_token, idle} of the route",
    },
    "truncation": {
        NGINX: "proxy_http_version 1.1;\n# an answer of HTTP/1.0 has no recognisable end",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-http-version: "1.1"',
        HAPROXY: "no http 1.0 at the server; look for a filter that ends answers",
        ENVOY: "explicit_http_config: {http_protocol_options: {}} without accept_http_10",
        TRAEFIK: "no middleware that collects answers (buffering, a plugin)",
        CADDY: "no middleware that collects answers",
        APACHE: "no SetEnv force-proxy-request-1.0, proxy-nokeepalive",
        CLOUDFLARE: "a Worker has to pass response.body on, and not read it",
        ALB: "targets have to answer with HTTP/1.1 and chunks",
        API_GATEWAY: "response transfer mode STREAM",
        FRONT_DOOR: "origins have to answer with HTTP/1.1 and chunks",
        EXPRESS: "on an error of the source: res.destroy(), and not res.end()",
        NEXT: "controller.error(e), and not controller.close(), when the source fails",
        FASTAPI: "let the exception out of the generator; do not return",
    },
    "leaving": {
        NGINX: "proxy_ignore_client_abort off; proxy_buffering off;\n# off is the default of the first only",
        INGRESS: 'no configuration-snippet with proxy_ignore_client_abort; proxy-buffering: "off"',
        HAPROXY: "option abortonclose",
        ENVOY: "Envoy notices at once; a filter that buffers does not",
        TRAEFIK: "Traefik notices at once; the middleware retry or buffering does not",
        CADDY: "no flush_interval -1: with it, Caddy 2.8 continues requests whose client has left",
        APACHE: "httpd notices only when it writes: send heartbeats, or use another proxy",
        CLOUDFLARE: "in a Worker: request.signal, with the flag enable_request_signal",
        ALB: "ALB notices at once; look at the targets",
        API_GATEWAY: "it does not tell: limit the length of answers",
        FRONT_DOOR: "it may keep the connection to the origin: limit the length of answers",
        EXPRESS: "res.on('close', () => upstream.abort())",
        NEXT: "pass request.signal to fetch; cancel() of the ReadableStream",
        FASTAPI: "await request.is_disconnected(), or let the generator be cancelled; close the upstream's response",
    },
    "compressed": {
        NGINX: "gzip off;\n# or gzip_types without text/event-stream",
        INGRESS: 'ConfigMap: use-gzip: "false", or gzip-types without text/event-stream',
        HAPROXY: "compression type without text/event-stream",
        ENVOY: "compressor: content_type without text/event-stream",
        TRAEFIK: "compress: excludedContentTypes: [text/event-stream]",
        CADDY: "encode { match { not header Content-Type text/event-stream* } }",
        APACHE: "SetEnv no-gzip 1 for this path, or AddOutputFilterByType without text/event-stream",
        CLOUDFLARE: "a compression rule that turns it off, or Cache-Control: no-transform",
        ALB: "ALB does not compress; look at the targets",
        API_GATEWAY: "no minimumCompressionSize",
        FRONT_DOOR: "no compression on the route",
        EXPRESS: "compression({filter: (req, res) => !/event-stream/.test(res.getHeader('Content-Type'))})",
        NEXT: "compress: false in next.config.js",
        FASTAPI: "no GZipMiddleware",
    },
    "head": {
        NGINX: "proxy_buffering off;",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-buffering: "off"',
        HAPROXY: "option http-no-delay",
        ENVOY: "no filter that waits for the body",
        TRAEFIK: "flushInterval: -1ms; no middleware compress or buffering",
        CADDY: "no encode and no response_buffers for this path",
        APACHE: "flushpackets=on; httpd sends the head with the first bytes: send a comment first",
        CLOUDFLARE: "the origin sends a comment first",
        ALB: "the target sends a comment first",
        API_GATEWAY: "response transfer mode STREAM",
        FRONT_DOOR: "the origin sends a comment first",
        EXPRESS: "res.flushHeaders()",
        NEXT: "enqueue a comment at once",
        FASTAPI: "yield a comment first; no BaseHTTPMiddleware",
    },
    "refused": {
        NGINX: "client_max_body_size 0; proxy_request_buffering off;\n# by default 1 MiB, and collected in a file",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-body-size: "0"',
        HAPROXY: "no http-request deny by req.body_size",
        ENVOY: "no buffer filter, or a larger max_request_bytes",
        TRAEFIK: "middleware buffering: no maxRequestBodyBytes",
        CADDY: "request_body { max_size 100MB }",
        APACHE: "LimitRequestBody 0",
        CLOUDFLARE: "100 MB below Business: upload around it",
        ALB: "1 MB for Lambda targets, none for others",
        API_GATEWAY: "10 MB, which cannot be changed: upload to S3, and pass on a URL",
        FRONT_DOOR: "a WAF policy limits bodies to 128 KB by default",
        EXPRESS: "express.json({limit: '50mb'}), or pipe the request on unparsed",
        NEXT: "bodySizeLimit; Vercel allows 4.5 MB",
        FASTAPI: "no middleware that limits bodies",
        SSEPROXY: "limits: {request_body: off}",
    },
    "collected": {
        NGINX: "proxy_request_buffering off; proxy_http_version 1.1;",
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-request-buffering: "off"',
        HAPROXY: "no option http-buffer-request",
        ENVOY: "no buffer filter",
        TRAEFIK: "no middleware buffering",
        CADDY: "no request_buffers in reverse_proxy",
        APACHE: "SetEnv proxy-sendchunked 1; no mod_security body access",
        CLOUDFLARE: "cannot be changed; Enterprise can turn off Request Buffering",
        ALB: "ALB streams to HTTP targets; Lambda targets get the whole",
        API_GATEWAY: "cannot be changed",
        FRONT_DOOR: "a WAF reads bodies before it forwards them",
        EXPRESS: "pipe the request on instead of parsing it",
        NEXT: "duplex: 'half' with request.body",
        FASTAPI: "request.stream() instead of request.body()",
        SSEPROXY: "no model in match and in metrics.models, and no usage.request: then a body is forwarded as it comes",
    },
    "http10": {
        NGINX: 'proxy_http_version 1.1; proxy_set_header Connection "";\n# needed before 1.29.7',
        INGRESS: 'nginx.ingress.kubernetes.io/proxy-http-version: "1.1"',
        APACHE: "no SetEnv force-proxy-request-1.0",
    },
}
REMEDIES["content-length"] = REMEDIES["buffered"]
_ANY: Final[dict[Kind, str]] = {
    "endless": "Look for two hops that speak HTTP/1.0 with each other, and let them speak HTTP/1.1.",
    "hanging": "The hop does not see that its connection has ended. Look for a timeout that ends the answer instead.",
    "garbled": "No proxy may do this. Look for a plugin, a filter or a gateway that reads and writes events.",
    "content-type": "The stream must stay text/event-stream: clients that obey the standard do not read anything else.",
    "caching": "Forward Cache-Control as the origin sends it, and let no cache in front keep these paths.",
    "rewritten": "Gateways that translate between APIs do this. Without one, look for a filter that changes bodies.",
    "keep-alive": "Each request then costs another connection. Allow HTTP keep-alive on both sides.",
    "continue": "curl then waits for a second before it sends a large body.",
}


def remedies(kind: Kind, claims: list[str]) -> list[tuple[str, str]]:
    """What to change: program and line. If the hop says what it is (`claims`), only for that program."""
    known = REMEDIES.get(kind)
    if known is None:
        return [("", _ANY[kind])] if kind in _ANY else []
    named = [name for claim in claims for name in (claim, *_ALSO.get(claim, ()))]
    found = [(name, known[name]) for name in named if name in known]
    return found or list(known.items())


def changes(kinds: Iterable[Kind], claims: list[str]) -> list[list[tuple[str, str]]]:
    """The `remedies` for each finding of one hop. What an earlier finding has already is not repeated.

    nginx refuses a directive that is there twice.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    for kind in kinds:
        rows = []
        for program, change in remedies(kind, claims):
            parts = re.findall(r"[^;\s][^;]*;", change.partition("#")[0]) if program == NGINX else [change]
            new = [part for part in parts if (program, part) not in seen]
            seen.update((program, part) for part in parts)
            rows.append((program, change if new == parts else " ".join(new) or "as above"))
        found.append(rows)
    return found
