"""Nothing that was planted as a secret is in anything that the processes wrote, whatever went wrong."""

from __future__ import annotations

from pathlib import Path

from .harness import STREAM_HEAD, Peer, ScriptedUpstream, chunk, delta
from .served import serve

SECRETS = [f"PLANTED-{name}" for name in ("KEY", "CLIENTKEY", "COOKIE", "QUERY", "PROMPT", "ANSWER", "HOST", "FIELD")]
REQUEST = (
    b"POST /v1/chat/completions?api-version=PLANTED-QUERY HTTP/1.1\r\nHost: PLANTED-HOST\r\n"
    b"Authorization: Bearer PLANTED-CLIENTKEY\r\nCookie: s=PLANTED-COOKIE\r\nX-Odd: PLANTED-FIELD\r\n"
    b"Content-Type: application/json\r\n%b\r\n"
)
BODY = b'{"model":"PLANTED-PROMPT","stream":true,"messages":[{"role":"user","content":"PLANTED-PROMPT"}]}'
WHOLE = REQUEST % (b"Content-Length: %d\r\n" % len(BODY)) + BODY


async def begun(client: Peer, upstream: ScriptedUpstream) -> Peer:
    client.send(WHOLE)
    api = await upstream.accept()
    assert "PLANTED-KEY" in (str((await api.message()).get("authorization")))
    return api


async def test_no_secret_in_what_is_written(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = tmp_path / "sseproxy.yaml"
    file.write_text(
        f'listen: 127.0.0.1:0\nadmin: {{listen: "127.0.0.1:0"}}\nworkers: 1\ndrain_timeout: 100ms\n'
        "metrics: {models: [gpt-*]}\nlimits: {request_head_time: 200ms}\n"
        f'upstreams: [{{name: up, url: "{upstream.url}/v1", api_key: PLANTED-KEY}}]\n'
        "routes:\n  - name: all\n    match: {path: /v1}\n    upstream: up\n    usage: {request: true}\n"
        "    timeouts: {head: 200ms, idle: 200ms, body: 200ms}\n"
    )
    answers = b""
    async with serve("-c", str(file)) as served:
        refused = [
            REQUEST % b"Transfer-Encoding: PLANTED-FIELD\r\n",
            REQUEST.replace(b"/v1/", b"/PLANTED-QUERY/") % b"Content-Length: 0\r\n",
            REQUEST.replace(b"HTTP/1.1", b"PLANTED-FIELD") % b"",
            REQUEST % b"Transfer-Encoding: chunked\r\n" + b"PLANTED-PROMPT\r\n",
            REQUEST % b"X-Large: " + b"PLANTED-FIELD" * 5_000 + b"\r\n\r\n",
            REQUEST[:-10],
            REQUEST % b"Content-Length: 999\r\n" + BODY,
            *(
                REQUEST.replace(b"/v1/", target + b"PLANTED-QUERY/") % b"Content-Length: 0\r\n"
                for target in (b"http://h:99999/?key=", b"http://[::/", b"http://h:", b"http:///", b"*")
            ),
            b"CONNECT PLANTED-HOST:1 HTTP/1.1\r\nHost: PLANTED-HOST\r\n\r\n",
        ]
        for request in refused:
            client = await served.connect()
            client.send(request)
            answers += (await client.message()).body

        client = await served.connect()
        api = await begun(client, upstream)
        answers += (await client.message()).body  # the time to a head is over
        await api.gone()
        for garbage in (b"PLANTED-ANSWER\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: PLANTED-ANSWER\x00\r\n\r\n"):
            client = await served.connect()
            api = await begun(client, upstream)
            api.send(garbage)
            answers += (await client.message()).body
        for ending in (Peer.close, Peer.reset):
            client = await served.connect()
            api = await begun(client, upstream)
            api.send(STREAM_HEAD, chunk(delta("PLANTED-ANSWER")), chunk(b"data: PLANTED-ANSWER no JSON\n\n"))
            await client.read_until(b"no JSON")
            ending(api)
            answers += (await client.rest())[0]
        client = await served.connect()
        api = await begun(client, upstream)
        client.reset()
        await api.gone()
        client = await served.connect()
        api = await begun(client, upstream)
        api.send(STREAM_HEAD, chunk(b"data: {}\n\n"))
        _, _, metrics = await served.get("/metrics")
        served.process.terminate()
        answers += (await client.rest())[0]
        await served.process.wait()
    written = "\n".join(served.lines) + served.stderr + served.logged.decode()
    assert served.logged.count(b'"outcome":') > len(refused)
    written = written.replace('"model":"PLANTED-PROMPT"', "")
    # What a client asked for, it is told again; nobody else is.
    written += metrics + answers.decode("latin-1").replace("POST /PLANTED-QUERY/", "")
    assert 'outcome="rejected"' in metrics
    assert "draining" in written
    assert "Traceback" not in written
    for secret in SECRETS:
        assert secret not in written, secret
