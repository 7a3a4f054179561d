"""sseproxy: a reverse proxy for OpenAI-compatible APIs that makes streaming visible and lossless.

The promise
-----------
1. Every byte of a response body reaches the client as soon as it was read from the upstream, unchanged.
2. When either side goes away, the other side is let go at once, in every phase of an exchange.
3. When a stream ends, for whatever reason, it is known why: one outcome, one record, never a truncated answer that
   looks complete.
4. Time to first token, the gaps between tokens, and the token usage of every stream are on `/metrics`, exact by a
   written definition.

Processes
---------
    sseproxy serve -- supervisor: owns the listening sockets, the metrics registry and the admin listener (/metrics,
                   |              /livez, /readyz, /-/reload); never touches client traffic
                   +- generation: the workers of one configuration, started, replaced and retired together
                      +- worker 1: uvloop, aiohttp's server and connector, one immutable configuration
                      +- worker N

A worker is a fresh interpreter that inherits the listening sockets and one end of a socket pair. Down the pair comes
its configuration, up go its reports: what has changed since the last one, each second, and at once when `/metrics` is
asked for. The supervisor adds them up, so counters never fall when a worker ends, and a worker's gauges go with it.
What a worker uses of CPU, memory and descriptors the supervisor reads from the system, when `/metrics` is asked for.
The end of the pair is the end of the other side: a worker whose supervisor died drains and goes. A worker that does not
answer when it is asked is not ready, and in the end killed and replaced.

What either writes for people goes through a thread, and is dropped if nobody takes it: no reader holds up a loop.

A reload starts a new generation on the same sockets. When all of it accepts, the old one is told to finish what it
has, so that nothing is refused or cut, and no code in a worker ever changes a configuration. One that does not load, or
whose workers do not come up, changes nothing. Of those that still finish only so many may be left.

An upgrade is a reload with new code. The supervisor has the new code tried by a child. Then it executes the new code in
its own place, and leaves it the sockets and the old workers, which accept until the new ones do. No reload mixes two
versions: it is refused where the package on disk is not the code that runs.

The life of a request
---------------------
*A request comes on a connection of `relay.downstream`, and `relay.phases` tells its life in numbers. `relay.admission`
gives it its places, `relay.routes` a route, `wire.headers` takes its hop-by-hop fields off, and it leaves through an
attempt in `relay.attempt`. Each chunk that comes back is written downstream unchanged by `relay.pump`, and only then
shown to the inspector in `relay.inspect`, which reads it with `wire.sse` and `wire.dialects`. When the stream ends, for
whatever reason, the exchange has exactly one outcome, and it is reported once.*

    cli             serve, check-config, demo
    demo            a paced OpenAI-compatible backend
    demonstration   `sseproxy demo`: what is special about the proxy, shown in front of that backend
    config          a frozen, typed configuration, with file:line:col in every error
      addresses       where to listen
      files           how files are read, and certificates loaded
      plain           what a worker is handed: the options without the model
      values          durations, sizes, addresses, keys: how each is read, written, and its schema
      named           the options that name a file
      model           the options, and what has to fit together
      document        YAML to plain data that knows where each of its parts stands
      loading         files and flags, and what is wrong with them
    errors          every exception we raise; the one table from an error to status, body and outcome
    wire            what bytes mean. No I/O, no aiohttp, no asyncio
      headers         hop-by-hop, forwarding, credentials
      framing         where a body ends: chunked, by length, by close
      sse             bytes to events, incremental, bounded
      meaning         what an event can mean: content, usage, end, error; how counts are read
      dialects        each API in a file of its own: its paths, its events, its text
        dialect         what tells one API from another
        chat            chat completions, completions, and what looks like them
        responses       OpenAI's Responses
        messages        Anthropic's Messages
        gemini          Google's Gemini
        media           OpenAI's audio and images
        assistants      OpenAI's Assistants
      extract         what is wanted of a large JSON text, found as it comes, in bounded time and memory
      request         what a request asks for: its model, and where usage can be asked for
      alike           events that mean the same as the one before, recognised by their bytes
      usage           asking for usage that the client did not ask for, and keeping it from the client
    relay           the life of an exchange
      proxy           what a worker holds
      phases          the life of a request, in numbers
      admission       what connections and requests occupy, and the limits on it
      routes          which route, which path upstream
      server          the connections of all clients, from being accepted on
      downstream      a client's connection: its requests, one after the other, and noticing that it left
      heads           request and response heads, by aiohttp's parser
      body            the one owner of a request's body
      answers         what is answered here
      hangups         noticing a hang-up where nothing is read
      attempt         one try at an upstream: connection, request, response head
      upstream        the API's side: connections, and their errors
      pump            the hot path
      reads           what is read at once, and when: the one owner of a transport's reading
      exchange        the record of an exchange
      clock           its one timer
      inspect         reading along: what a body means to the record
    observe         what an operator sees
      metrics         every metric, and what a worker counts with
      registry        all workers' numbers, and their exposition
      telemetry       from what happens to numbers, and from worker to supervisor
      access          a line for each exchange
      logs            lines that nobody waits for
    process
      supervisor      sockets, registry, reloads, signals
      generation      starts and replaces the workers of one configuration
      upgrade         new code takes the place of this one
      start           what a worker begins with: its imports
      worker          one event loop, and how it ends
      listeners       listening sockets: TCP, Unix, passed by systemd
      admin           metrics, health, reload
      notify          what systemd is told

Imports go one way: wire <- relay <- process <- cli; `observe` reads `relay.exchange`; everything may use `config` and
`errors`. Within `config` it is files <- values <- named <- model <- loading. A worker imports neither the model nor a
YAML parser, because nearly all that it takes to start are imports. Each command of `cli` imports what it needs when it
runs, because a health check runs every few seconds. A test holds both.

One owner for each thing
------------------------
What a request occupies is a `Ticket`, given back first in the last phase. Its body is a `RequestBody`, from the first
byte that comes to the last that is sent, and read in one place only. Its deadlines are one `Clock`: those of connecting
and of the head fail the attempt, the others the exchange. Its upstream connection is the attempt's, until the pump has
it. Where several of these end, each does, whatever the others raise.

The hot path
------------
aiohttp parses heads; bodies are ours. `RelayProtocol` receives from the upstream's transport and hands a body's bytes
to the `Pump`, which writes them to the client's transport in the same call: no queue, no future, no task in between. A
read that is exactly one HTTP chunk is forwarded as it came. Backpressure is the transports' own: when the client's
write buffer is over its mark, reading from the upstream is paused. What the inspector does happens after the write; it
says whether it saw progress, and the pump moves the clock. Bytes that are slow to look at are handed over in smaller
pieces, and wait for another turn of the loop, so that no connection keeps the others waiting.

Words
-----
downstream / upstream   the client's side / the API's side
route                   a match rule, and what happens to requests that match it
upstream (noun)         a named API with a base URL
exchange                one request and its response
chunk                   bytes as read
event                   one server-sent event
delta                   generated content in an event
TTFT                    time to first token: request head received to the first event with a non-empty generated delta
                        written downstream
inter-token latency     the gap between consecutive events with a generated delta, at the time they were read
TPOT                    (last - first generated event) / (streamed tokens - 1), of completed streams
usage                   the upstream's own token counts, in one meaning for all APIs; the highest of each type in a
                        stream; never summed or estimated
outcome                 why an exchange ended: one of `errors.Outcome`
drain                   stop accepting, fail readiness, let streams finish until the deadline, then end them in-band
"""

__version__ = "0.1.0"
