"""Several machines: what clients use is counted on a server, Redis or Valkey, as well as in the table of each machine.

Before a request, one script asks whether there is room, and counts the request. After it, another one counts its
tokens. Each is one round trip, and runs as one step. Both take the time from the server's clock. Tokens are counted in
the same windows as in `windows`.

The active requests and reserved tokens of a machine are a lease: the numbers in its table, which are right even if a
worker dies. Each worker of the machine renews the lease once a second. If a machine dies, its lease ends after three
seconds.

If the server does not answer a command in time, that command has failed. After three failures in a row, the server is
not asked for a second. Tokens that are used in the meantime are counted when it answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from secrets import token_hex
from time import perf_counter
from typing import Any, Final, NamedTuple, TypeVar

from .windows import Use

# Seconds for a command. In a data centre, a round trip takes less than one millisecond.
_DEADLINE: Final = 0.05
# Seconds after which a command ends that nobody waits for any more.
_FORGOTTEN: Final = 1.0
_FAILURES: Final = 3
_LEFT_ALONE: Final = 1.0
_RENEWED_EVERY: Final = 1.0

# The arguments of both scripts begin with: the machine, how many of its requests are active, its reserved tokens.
# A lease is worth three renewals.
_BEGIN: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local active, reserved = tonumber(ARGV[2]), tonumber(ARGV[3])
local function lease()
  if active > 0 or reserved > 0 then
    redis.call('HSET', KEYS[1], ARGV[1], active .. ' ' .. reserved .. ' ' .. string.format('%.3f', now + 3))
    redis.call('EXPIRE', KEYS[1], 60)
  else
    redis.call('HDEL', KEYS[1], ARGV[1])
  end
end
local function add(key, seconds, amount)
  key = key .. ':' .. seconds .. ':' .. math.floor(now / seconds)
  redis.call('INCRBY', key, amount)
  redis.call('EXPIRE', key, 2 * seconds + 1)
end
"""
# Then: the limits of active requests, of requests and their seconds, of tokens and their seconds; -1 if there is none.
_ADMIT: Final = (
    _BEGIN
    + """
local function used(key, seconds)
  local number = math.floor(now / seconds)
  key = key .. ':' .. seconds .. ':'
  local present = tonumber(redis.call('GET', key .. number) or 0)
  local last = tonumber(redis.call('GET', key .. (number - 1)) or 0)
  local elapsed = now - number * seconds
  return present, last, elapsed, present + math.floor(last * (1 - elapsed / seconds) + 0.5)
end
local others, othersReserved = 0, 0
local leases = redis.call('HGETALL', KEYS[1])
for i = 1, #leases, 2 do
  local a, r, ends = string.match(leases[i + 1], '(%d+) (%d+) ([%d.]+)')
  if tonumber(ends) < now then
    redis.call('HDEL', KEYS[1], leases[i])
  elseif leases[i] ~= ARGV[1] then
    others = others + a
    othersReserved = othersReserved + r
  end
end
local mostActive, mostRequests, seconds = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local mostTokens, tokenSeconds = tonumber(ARGV[7]), tonumber(ARGV[8])
local found = {'', 0, 0, '0', 0, 0, '0'}
if mostActive >= 0 and others + active > mostActive then
  found[1] = 'active_requests'
end
local total
if mostRequests >= 0 then
  local present, last, elapsed
  present, last, elapsed, total = used(KEYS[2], seconds)
  found[2], found[3], found[4] = present, last, tostring(elapsed)
  if found[1] == '' and total + 1 > mostRequests then found[1] = 'requests' end
end
if mostTokens >= 0 then
  local present, last, elapsed
  present, last, elapsed, total = used(KEYS[3], tokenSeconds)
  found[5], found[6], found[7] = present + othersReserved + reserved, last, tostring(elapsed)
  if found[1] == '' and ARGV[9] ~= '0' and total + othersReserved + reserved > mostTokens then found[1] = 'tokens' end
end
if found[1] == '' then
  if mostRequests >= 0 then add(KEYS[2], seconds, 1) end
  lease()
end
return found
"""
)
# Then: the tokens that were used, the seconds of their window, and the name of this charge. A charge whose answer was
# lost is sent again, and counts once.
_SETTLE: Final = (
    _BEGIN
    + """
if tonumber(ARGV[4]) > 0 and redis.call('SET', KEYS[3] .. ':' .. ARGV[6], 1, 'NX', 'EX', 3600) then
  add(KEYS[3], tonumber(ARGV[5]), ARGV[4])
end
lease()
return 1
"""
)


# What is raised, in the library or here, for an answer that is not from these scripts: `ledger.url` leads to a proxy,
# or to another kind of server.
_UNREADABLE: Final = (ValueError, TypeError, AttributeError, LookupError)

T = TypeVar("T")

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The server has not answered in time, or not as expected, or is not asked at the moment."""


class Machine(NamedTuple):
    """What a client has on this machine now."""

    active: int
    reserved: int


class Limits(NamedTuple):
    """The limits of a client. None if one is off; a rate is a number within so many seconds."""

    active: int | None
    requests: tuple[int, int] | None
    tokens: tuple[int, int] | None


class Verdict(NamedTuple):
    """Whether there is room: `limit` is the name of the limit that is reached, or empty. What was used of each rate."""

    limit: str
    requests: Use | None
    tokens: Use | None


class Charge(NamedTuple):
    """Tokens that were used. The name is unique."""

    tokens: int
    name: str


_NO_CHARGE: Final = Charge(0, "")


class Remote:
    """The server at `url`, as one worker of `machine` asks it. `failed` is called when a command fails.

    `refuses`: while the server does not answer, requests are refused.
    """

    def __init__(self, url: str, machine: str, failed: Callable[[], None], *, refuses: bool) -> None:
        self.refuses = refuses
        # Imported here, because most installations are without it.
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # A connection that was idle while the server was started again fails at once, so there is a second attempt.
        self._redis = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 1),
            protocol=2,
            # For commands that nobody waits for any more.
            socket_timeout=_FORGOTTEN,
            socket_connect_timeout=_FORGOTTEN,
        )
        self._admit = self._redis.register_script(_ADMIT)
        self._settle = self._redis.register_script(_SETTLE)
        self._machine = machine
        self._failed = failed
        self._failures = 0
        self._left_alone_until = 0.0
        # Whether the log says that it does not answer.
        self._away = False
        # Tokens that were used and have not been sent, and for each client the charge that was perhaps not counted.
        self._owed: Counter[str] = Counter()
        self._doubtful: dict[str, Charge] = {}
        # The clients of which there is something to tell, and those of which a task is telling it.
        self._untold: set[str] = set()
        self._telling: set[str] = set()
        self._names = (f"{token_hex(8)}:{number}" for number in count())
        # For each client, the seconds of its window, and what it has on this machine.
        self._known: dict[str, tuple[int, Callable[[], Machine]]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self._renewing: asyncio.TimerHandle | None = None

    async def _ask(self, command: Callable[[], Awaitable[Any]], read: Callable[[Any], T]) -> T:
        """The answer to `command`, as `read` reads it. Raises `Unavailable`."""
        if perf_counter() < self._left_alone_until:
            raise Unavailable
        asking = asyncio.ensure_future(command())
        try:
            # This does not rely on cancellation: redis-py may swallow one, and go on waiting.
            await asyncio.wait((asking,), timeout=_DEADLINE)
            if not asking.done():
                raise TimeoutError
            answer = read(asking.result())
        except Exception as error:
            # The library raises more than its own errors: on uvloop a RuntimeError, if the connection has just ended.
            self._failures += 1
            if self._failures >= _FAILURES:
                self._failures, self._left_alone_until = 0, perf_counter() + _LEFT_ALONE
                self._is_away(error)
            self._failed()
            raise Unavailable from error
        finally:
            if not asking.done():
                self._give_up(asking)
        self._failures = 0
        if self._away:
            self._away = False
            log.info("the server of ledger.url answers again")
        return answer

    def _give_up(self, asking: asyncio.Future[Any]) -> None:
        """Lets `asking` end by itself. Nobody waits for its answer."""

        def ended(_: object) -> None:
            self._tasks.discard(asking)
            if not asking.cancelled():
                asking.exception()

        self._tasks.add(asking)
        asking.add_done_callback(ended)
        asking.cancel()

    def _is_away(self, error: Exception) -> None:
        if self._away:
            return
        self._away = True
        why = "its answers cannot be read" if isinstance(error, _UNREADABLE) else str(error) or "no answer within 50 ms"
        instead = "clients with limits get 503" if self.refuses else "each machine applies the limits separately"
        log.warning("the server of ledger.url cannot be used: %s; meanwhile, %s", why, instead)

    def _keys(self, client: str) -> list[str]:
        # What is in braces decides on which node of a cluster a key is: all of a client are on the same one.
        return [f"sseproxy:{{{client}}}:{what}" for what in ("leases", "requests", "tokens")]

    async def admit(self, client: str, limits: Limits, tokens: int, machine: Callable[[], Machine]) -> Verdict:
        """Asks whether there is room for a request that has reserved `tokens`, and counts it.

        `machine` returns what the client has on this machine, with this request. Raises `Unavailable`.
        """
        requests, rate = limits.requests or (-1, 1), limits.tokens or (-1, 1)
        self._known[client] = rate[1], machine
        self._renew()
        has = machine()
        most = -1 if limits.active is None else limits.active
        arguments: list[str | int] = [self._machine, *has, most, *requests, *rate, tokens]

        def read(found: list[Any]) -> Verdict:
            asked = Use.of(int(found[1]), int(found[2]), float(found[3]), requests[1]) if limits.requests else None
            used = Use.of(int(found[4]), int(found[5]), float(found[6]), rate[1]) if limits.tokens else None
            return Verdict(found[0].decode(), asked, used)

        return await self._ask(lambda: self._admit(keys=self._keys(client), args=arguments), read)

    def settle(self, client: str, tokens: int) -> None:
        """Counts `tokens` as used, and what the client has on this machine, when this turn of the loop has ended."""
        self._owed[client] += tokens
        self._untold.add(client)
        if client not in self._telling:
            self._telling.add(client)
            task = asyncio.get_running_loop().create_task(self._tell(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell(self, client: str) -> None:
        """Tells what there is of `client`, and what is added meanwhile. So there is one charge that may be doubtful."""
        try:
            while client in self._untold and perf_counter() >= self._left_alone_until:
                self._untold.discard(client)
                if client not in self._doubtful and (owed := self._owed.pop(client, 0)):
                    self._doubtful[client] = Charge(owed, next(self._names))
                # Without a charge, the lease is renewed.
                await self._charge(client, self._doubtful.get(client, _NO_CHARGE))
                self._doubtful.pop(client, None)
                if self._owed[client]:
                    self._untold.add(client)
        except Unavailable:
            pass
        finally:
            self._telling.discard(client)

    async def _charge(self, client: str, charge: Charge) -> None:
        seconds, machine = self._known[client]
        arguments: list[str | int] = [self._machine, *machine(), charge.tokens, seconds, charge.name]
        await self._ask(lambda: self._settle(keys=self._keys(client), args=arguments), int)

    def _renew(self) -> None:
        if self._renewing is None:
            self._renewing = asyncio.get_running_loop().call_later(_RENEWED_EVERY, self._renew_now)

    def _renew_now(self) -> None:
        self._renewing = None
        for client, (_, machine) in self._known.items():
            if any(machine()) or self._owed[client] or client in self._doubtful:
                self.settle(client, 0)
                self._renew()

    async def close(self) -> None:
        """Waits until what was used is counted, as long as a command may take."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * _DEADLINE)
        await self._redis.aclose()
