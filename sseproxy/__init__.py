"""sseproxy: a reverse proxy for OpenAI-compatible APIs. It forwards streams immediately, unchanged, and measures them.

The promise
-----------
1. Every byte of a response body is sent to the client, unchanged, as soon as it has been read from the upstream. A
   route may ask for two exceptions: `retry.until` holds bytes back, and `usage.request` removes an event.
2. When one side closes its connection, sseproxy closes the connection to the other side immediately. This holds at
   every point of a request's life.
3. The reason why a stream ended is always known. Each exchange has one outcome and one record, and a truncated answer
   never looks complete.
4. `/metrics` has the time to first token, the gaps between tokens and the token usage of every stream. The definitions
   are below, under *Words*.

Processes
---------
    sseproxy serve -- supervisor: owns the listening sockets, the metrics registry and the admin listener (/metrics,
                   |              /livez, /readyz, /live, /-/reload); never handles client traffic
                   +- fork server: has imported what a worker needs; each worker is forked from it
                   +- generation: the workers of one configuration; they start together and stop together
                      +- worker 1: uvloop, aiohttp's server and connector, one immutable configuration
                      +- worker N

A worker is a process of its own. It has the listening sockets and one end of a socket pair, the channel.
Through the channel it receives its configuration, and sends reports. A report has the changes since the previous
report. A worker reports once a second, and whenever `/metrics` is requested. The supervisor adds the reports up, so a
counter never falls when a worker ends, while the gauges of that worker disappear. It reads from the system what CPU,
memory and descriptors each worker uses, when `/metrics` is requested. The end of the channel shows that a process has
ended: a worker whose supervisor has died drains and exits. A worker that does not answer a request for a report is
first treated as not ready. If it still does not answer, or has closed its end and goes on, it is killed and replaced.

While a page of `/live` is open, the supervisor asks the workers four times a second, through the same channel, which
requests they have under way. It asks once for all pages. When no page is open, nothing is read, and nothing is kept.

All workers count in one table in shared memory, the ledger. Each worker writes its own row and reads all rows. So a
limit is the limit of all workers together, including those that are still finishing after a reload. Connections are
shared evenly: a worker that has more than the least busy one stops listening for a moment, and the others accept.
Workers also write what they see of each endpoint of an upstream. The supervisor reads it, and writes in a row of its
own which endpoints are used, and the addresses of names.

With the option `probe`, each worker also has a probe, which `sseproxy doctor` asks: a server on a loopback port, and a
route that leads to it. The probes of all workers count in the ledger, too.

Access log and log lines are written by a thread. If nobody reads them, they are dropped, so a slow reader of the log
never blocks an event loop.

A reload starts a new generation on the same sockets. When all its workers accept connections, the old generation stops
accepting, and finishes its exchanges. So no connection is refused, no stream is cut, and no code in a worker has to
change a configuration while it runs. If the configuration is invalid, or its workers do not start, everything stays as
it was. The number of old generations that are still finishing is limited.

Workers are forked from the fork server, a process that has imported what a worker needs. The supervisor forks it when
it starts, before there are threads, an event loop or a configuration. So a worker starts within milliseconds, and
workers share the memory of their code. Reloads, and workers that replace dead ones, use the code that the supervisor
has loaded, even if another version has been installed meanwhile.

An upgrade is a reload with new code. The supervisor first starts a child process that tries the new code. Then it
replaces itself with the new code (execve), and passes on the sockets and the old workers. The old workers accept until
all new workers do. If some are missing after half a minute, they stop as soon as one new worker accepts.

The life of a request
---------------------
*A request arrives on a connection of `relay.downstream`. `relay.phases` then goes through its life in numbered phases.
`relay.admission` checks the limits, `relay.routes` finds the route, `wire.headers` removes the hop-by-hop fields, and
an attempt of `relay.attempt` sends the request to the upstream. `relay.pump` writes each chunk of the response to the
client, unchanged. Only then does it pass the chunk to the inspector in `relay.inspect`, which uses `wire.sse` and
`wire.dialects` to find out what it means. When the stream ends, for whatever reason, the exchange has exactly one
outcome and is reported once.*

    cli             the commands: serve, check-config, healthcheck, top, key, schema, demo, probe, doctor
    top             `sseproxy top`: the live view in a terminal
    demo            an OpenAI-compatible backend that sends tokens at a set rate
    demonstration   `sseproxy demo`: shows what the proxy does, in front of that backend
    doctor          finds the hop that harms streams
      command         `sseproxy doctor`: examines hop after hop, and reports
      report          the report: for a terminal, as a page of HTML, as JSON
      remedies        what to change for each finding, by program
      examine         which requests a hop gets; what is observed is returned as data
      client          one request over a socket, and when each byte of the answer came
      verdict         from observations to findings, and to one sentence. No I/O
      arrival         how events arrive: alone, or held by a buffer or a timer. No I/O
      observed        what was observed of a hop
      origin          the probe: a server whose streams the doctor knows in advance
      script          what a client asks of the probe, and the stream that it then sends. No I/O
    config          a frozen, typed configuration; errors name file, line and column
      addresses       listening addresses
      files           reading files, loading certificates
      options         options, and sections, which have options: how they are read, written, and described to editors
      values          durations, sizes, addresses, keys: how each is read and written, and its JSON schema
      named           the options that name a file
      model           all options, and the rules between them
      mistakes        text that is not YAML: where the mistake is, and what to do about it
      document        parses YAML, and keeps the position of each part
      loading         builds a configuration from a file and from flags, and collects all errors
    errors          every exception that sseproxy raises; the only table of status, message and outcome
    signals         the signals that a supervisor handles: only its main thread gets them
    ledger          counts that all workers share
      table           a row for each worker, a column for each name, and a sketch for client addresses
      endpoints       how each endpoint of an upstream stands, and the addresses of a name
      remote          counts what several machines use, on a Redis or Valkey server
      windows         what was used within the last minute, hour or day
    wire            what bytes mean. No I/O, no aiohttp, no asyncio
      credentials     the keys of clients: where they are, and how they are removed
      target          the target of a request: its path and its query
      headers         hop-by-hop fields, forwarding fields, credentials
      framing         where a body ends: chunked, by length, by close
      sse             an incremental parser of server-sent events, with bounded memory
      meaning         what an event can mean: content, usage, end, error; how counts are read
      dialects        each API in a file of its own: its paths, its events, its text
        dialect         how one API differs from another
        style           the style of errors and heartbeats that the clients of an API understand
        chat            chat completions, completions, and APIs with the same format
        responses       OpenAI's Responses
        messages        Anthropic's Messages
        gemini          Google's Gemini
        media           OpenAI's audio and images
        assistants      OpenAI's Assistants
      extract         finds a few fields in a large JSON text as it arrives, in bounded time and memory
      form            finds the model in a form (multipart/form-data) as it arrives
      coding          decompresses request bodies in steps
      request         what a request asks for: its model, and where usage can be requested
      demand          how many tokens a request may need
      deltas          recognises, by its bytes, an event that differs from an earlier one only in its generated text
      usage           requests usage that the client did not request, and removes it from the response
      refusals        how APIs say that a prompt is too long for the model
    relay           the life of an exchange
      proxy           all parts of the relay in one worker
      phases          the life of a request, in numbered phases
      admission       limits on connections and requests
      clients         finds out who calls, what the client may use, and how much it uses
      globs           whether some globs match everything that another glob matches
      routes          finds the route of a request, and its path at the upstream; finds routes that are never used
      server          all client connections, from accept on
      downstream      one client connection: its requests, one after the other, and whether the client has left
      heads           parses request and response heads with aiohttp's parser
      body            the one owner of a request's body
      answers         responses that sseproxy itself sends
      hangups         notices a hang-up on a connection that is not being read
      attempt         one attempt at an endpoint: connection, request, response head
      idle            the connections to an endpoint that wait for another request
      upstream        an endpoint of an upstream: connections, and their errors
      pool            which endpoint of an upstream is asked
      affinity        which requests belong together, and go to the same endpoint
      retry           whether a request is sent again, and where to
      models          the models of all endpoints of a route, as one list
      asking          asks endpoints until one has an answer
      hold            holds back the beginning of an answer until it is clear that it is usable
      pump            the hot path
      reads           how much is read from a transport at once, and when; the one owner of a transport's reading
      exchange        the record of an exchange
      clock           the one timer of an exchange
      inspect         follows a body as it passes, and records what it means
    observe         what an operator sees
      metrics         every metric, and the recorder that a worker counts with
      registry        adds up the numbers of all workers, and writes the exposition format
      telemetry       counts events of exchanges, and sends reports from a worker to the supervisor
      access          the access log: one line for each exchange
      live            the live view: rows of exchanges, and what has changed since the last reading
      logs            log lines that are written without blocking
    process
      supervisor      sockets, registry, reloads, signals
      configured      the numbers that a configuration determines: limits, and counters that start at 0
      generation      starts and replaces the workers of one configuration
      upgrade         replaces the running code with new code
      forkserver      the fork server: the process from which workers are forked
      start           imports what a worker needs, and starts the fork server
      worker          one event loop, and how it ends
      accepting       connections, evenly shared with the other workers
      listeners       listening sockets: TCP, Unix, passed by systemd
      admin           the admin listener: what it serves, and to whom
      live            serves the live view: its event stream, and cancelling
      login           the token of the admin listener, and the session of a browser
      pages           the pages of the admin listener, each a file of its own
      health          follows the endpoints of a fleet: tells workers which ones to use, and checks them
      ejection        the rules by which an endpoint is used or not. No I/O
      discovery       looks up the addresses of a name
      notify          notifications to systemd

Imports go one way: wire <- relay <- process <- cli. `ledger` imports nothing else, and `observe` imports
`relay.exchange`. `doctor` imports `wire` and `ledger`; `cli` imports it, and `process.worker` imports `doctor.origin`
for the probe. Every module may import `config` and `errors`. Within `config` the order is files <- values <- named <-
model <- loading. Code that workers need is imported before the fork server is forked. Code that only a supervisor needs
is imported after that, such as a YAML parser. A health check runs every few seconds, so each command of `cli` imports
what it needs only when it runs. `tests/test_imports.py` checks all this.

One owner for each thing
------------------------
A `Ticket` holds what a request occupies, and a `Visit` what a client has reserved for it. The last phase always
releases both. A `RequestBody` owns the request's body from the first byte received to the last byte sent; no other
code reads the body. A `Clock` owns all deadlines. Those for the connection and the response head fail the attempt.
So do those for the first token and for idle time, while an answer is held back. All others end the exchange. The
upstream connection belongs to the attempt, until the pump takes it over. When several of these are closed together,
each is closed even if closing another one raises.

The hot path
------------
aiohttp parses heads; sseproxy handles bodies itself. `RelayProtocol` receives data from the upstream's transport and
passes the bytes of a body to the `Pump`. The pump writes them to the client's transport in the same call: there is no
queue, no future and no task in between. A read that is exactly one HTTP chunk is forwarded as it is. For backpressure,
the transports' own mechanism is used: when the client's write buffer is above its high-water mark, reading from the
upstream is paused. The inspector runs after the write. It says whether the bytes were progress, and if so the pump
resets the idle timeout. Data that takes long to inspect is processed in smaller pieces, over several turns of the event
loop, so no connection makes the others wait.

Words
-----
downstream / upstream   the client's side / the API's side
client                  in the configuration: a user with keys. Elsewhere: the other end of a downstream connection
route                   a match rule, and what happens to requests that match it
upstream (noun)         a named API with one base URL or several
endpoint                one address that serves an upstream
attempt                 one try of an exchange at one endpoint
exchange                one request and its response
chunk                   bytes as they were read from a connection; "HTTP chunk" where chunked framing is meant
event                   one server-sent event
delta                   generated content in an event
TTFT                    time to first token: from the request head received, to the first event with a non-empty
                        generated delta written downstream
inter-token latency     the gap between consecutive events with a generated delta, at the time they were read
TPOT                    (last - first generated event) / (streamed tokens - 1), of completed streams
usage                   the upstream's own token counts, in one meaning for all APIs; the highest of each type in a
                        stream; never summed or estimated
outcome                 why an exchange ended: one of `errors.Outcome`
drain                   stop accepting, fail readiness, and let streams finish; at the deadline, end the rest with an
                        error event
"""

__version__ = "0.1.0"
