"""The agent: one session of a tunnel, and its links kept alive for ever.

For each link that the session is to have, its slot, one task sees to it that there is one: it dials, says hello, and
watches. A link that has been silent is *suspect*: another is dialled beside it at once and takes the new work, while
the old one lives on until it really fails, because its late answers still count. So it is with one whose server drains.
A link itself is kept by a ``Keeper``; how a server is found again is ``reach``'s.
"""

import asyncio
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from loguru import logger

from quictunnel import __version__
from quictunnel.client.fan_out import FanOut
from quictunnel.client.keeper import FAST_PING_EVERY, Keeper, Slot
from quictunnel.client.reach import LONGEST_RETRY, QUICK_FOR, Backoff, Place, Race
from quictunnel.log import escape
from quictunnel.quic.dial import DialError, Way, dial, resolve
from quictunnel.quic.engine import ClientTrust, Engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.sockets import settle
from quictunnel.quic.stream import StreamLeg
from quictunnel.trust.certificates import diagnose, pinned_authority
from quictunnel.trust.files import TrustError
from quictunnel.wire.control import (
    VERSION,
    Authority,
    ControlMessage,
    Drain,
    Drained,
    Grow,
    Health,
    Hello,
    Refuse,
    Unknown,
    Welcome,
)
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.frames import RequestHead
from quictunnel.wire.names import normalise_tunnel_name

__all__ = ["Agent", "AgentConfig", "FinalRefusal"]

DIAL_TIME: Final = 5.0
ANSWER_TIME: Final = 10.0
SILENT_TIME: Final = 2.0
"seconds: that an attempt lives, that an answer on a new link may take, and that a new link may be silent meanwhile"

_LOUD_FAILURES: Final = 4
"of an outage, before one in LONGEST_RETRY seconds has to do"

_SHOWN: Final = 300
"characters of what a server says that people are shown"


class FinalRefusal(Exception):
    """Trying again is pointless: ``code`` is a word for programs."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


class _TryLater(Exception):
    """The server refused for now."""

    def __init__(self, code: str, text: str, retry_after: float | None) -> None:
        self.code = code
        self.retry_after = retry_after
        super().__init__(text)


DEFAULT_BUDGET: Final = 32 * 1024 * 1024
"bytes that receive windows grow by together when nobody says how many"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Whom to dial and what to say there."""

    host: str
    port: int
    server_name: str
    token: str = field(repr=False)
    tunnel: str = ""
    "empty: the server gives a name"

    authority: bytes | None = None
    "the CA's certificate (PEM) that the server's must come from; None with no pin: the system's CAs"

    pin: bytes | None = None
    "SHA-256 of the CA certificate (DER) that the server will send; it is fetched once and then verified against"

    max_links: int = 64
    capabilities: tuple[str, ...] = ()
    "words of the protocol for what this client takes beyond plain requests"

    @property
    def places(self) -> list[Place]:
        """The servers, in the order in which they are dialled."""
        return [Place(self.host, self.port, self.server_name)]


class Agent(LinkOwner):
    """One session of a tunnel."""

    def __init__(
        self,
        config: AgentConfig,
        engine: Engine,
        fan_out: FanOut,
        *,
        budget: WindowBudget | None = None,
        on_welcome: Callable[[Welcome], None] | None = None,
    ) -> None:
        """``budget`` is what receive windows grow out of.

        ``on_welcome`` is called each time the session comes to be served, with what the server said.
        """
        self._config = config
        self._engine = engine
        self._fan_out = fan_out
        self._on_welcome = on_welcome
        self._budget = budget or WindowBudget(DEFAULT_BUDGET)
        # Who knows this id is this session: it replaces its own ghost by it, so it is as good as a secret.
        self._session = secrets.token_urlsafe(24)
        self._authority = config.authority
        self._keepers: dict[Link, Keeper] = {}  # of every link that was welcomed and is not closed
        self._slots: dict[Slot, Keeper | None] = {}  # who has it now, or had it last
        self._watchers: dict[Slot, asyncio.Task[None]] = {}
        self._open_links: set[Link] = set()  # those whose sockets are open, a moment longer than the links
        self._answers: dict[Link, asyncio.Future[ControlMessage]] = {}
        self._wanted = 1
        self._alone = asyncio.Lock()
        self._failures = _Failures()
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self.tunnel = config.tunnel
        self.welcomed = asyncio.Event()  # there has been a welcome
        self.serving = False

    @property
    def links(self) -> list[Link]:
        """Every link that was welcomed and is not closed."""
        return list(self._keepers)

    # The agent's life

    async def run(self) -> None:
        """Serve until ``stop``. Raises FinalRefusal when the server will never have this client."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._fill_slots()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._group = None
            for link in list(self._open_links):
                link.close(ErrorCode.NO_ERROR, "the client stops")
                link.abandon(LinkClosed(0, ""))
            await settle()

    async def stop(self, grace: float) -> None:
        """Take nothing new, finish what is under way within ``grace`` seconds, and leave."""
        self._stopping = True
        for watcher in list(self._watchers.values()):
            watcher.cancel()
        links = self.links
        for link in links:
            link.send_control(Drain())
        deadline = asyncio.get_running_loop().time() + grace
        # The server's last streams may be on their way when it reads the drain: idle once is not yet done.
        idle = 0
        while idle < 3 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05 + max((link.round_trip or 0.0 for link in links), default=0.0))
            idle = 0 if any(link.exchanges for link in links) else idle + 1
        for link in links:
            link.close(ErrorCode.NO_ERROR, "the client stops")

    # One watcher for each slot

    def _fill_slots(self) -> None:
        for number in range(self._wanted):
            slot = Slot(0, number)
            if slot not in self._watchers and self._group is not None and not self._stopping:
                watcher = self._group.create_task(self._watch(slot), name=f"link {slot.worker}.{slot.number}")
                self._watchers[slot] = watcher
                watcher.add_done_callback(partial(self._watcher_done, slot))

    def _watcher_done(self, slot: Slot, watcher: asyncio.Task[None]) -> None:
        del self._watchers[slot]

    def _is_wanted(self, slot: Slot) -> bool:
        return slot.number < self._wanted and not self._stopping

    async def _watch(self, slot: Slot) -> None:
        """See to it that the slot has a link, for as long as it is wanted."""
        loop = asyncio.get_running_loop()
        refusals = Backoff()
        while self._is_wanted(slot):
            keeper = self._slots.get(slot)
            if keeper is not None and keeper.good:
                await keeper.changed()
                continue
            if keeper is not None and keeper.link.closed is not None:
                if loop.time() - keeper.since > LONGEST_RETRY:
                    refusals.reset()
                else:
                    # Whoever is thrown out soon after each welcome must not dial in a rush.
                    self._slots[slot] = None
                    await asyncio.sleep(refusals.delay())
                    continue
            try:
                await self._fill(slot, keeper)
            except DialError as error:
                await self._wait(refusals.delay(), error)
            except _TryLater as error:
                await self._wait(min(max(refusals.delay(), error.retry_after or 0.0), LONGEST_RETRY), error)
            except FinalRefusal:
                raise
            except Exception as error:
                # A fault of ours must not do what no network can: end the client.
                logger.opt(exception=error).error("link {}: {!r}", slot.number, error)
                await self._wait(refusals.delay(), error)

    async def _wait(self, delay: float, why: Exception) -> None:
        self._failures.tell(self._place(), why, delay)
        await asyncio.sleep(delay)

    async def _fill(self, slot: Slot, before: Keeper | None) -> None:
        """Have a new link in the slot, unless the one before is heard again. Raises what ``_open`` does."""
        if self._is_served():
            await self._open(slot, before)
            return
        # While there is none at all, one of them looks for the server, or a session of many links would come down on a
        # server that has just come back.
        async with self._alone:
            if not self._is_served():
                await self._open(slot, before)

    def _is_served(self) -> bool:
        return any(keeper is not None and keeper.good for keeper in self._slots.values())

    # A new link

    async def _open(self, slot: Slot, before: Keeper | None) -> None:
        """Fill the slot with a link that the server has welcomed. Raises DialError, _TryLater and FinalRefusal."""
        healed = before.healed if before is not None and before.suspect else None
        way, place = await self._reach(healed)
        if way is None:
            return
        try:
            welcome = await self._introduce(way.link, slot)
        except BaseException:
            if way.link.closed is None:
                way.link.close(ErrorCode.NO_ERROR, "")
            raise
        self._welcome(Keeper(way, place, slot), welcome)

    async def _reach(self, healed: "asyncio.Future[None] | None") -> tuple[Way | None, Place]:
        """A way to a server, verified; none if ``healed`` was done before. Raises FinalRefusal."""
        loop = asyncio.get_running_loop()
        reached = self._place()

        async def attempt(place: Place, number: int, on_way: Callable[[Way], None]) -> Way:
            nonlocal reached
            try:
                way = await self._dial(place, number, on_way)
            except DialError as error:
                if error.untrusted:
                    raise DialError(await self._why_untrusted(place, error), untrusted=True) from None
                raise
            reached = place
            return way

        race = Race(Backoff(loop.time, quick_for=QUICK_FOR), self._attempt_failed)
        way = await race.run(lambda: self._config.places, attempt, healed or loop.create_future())
        self._failures.forget()
        return way, reached

    def _attempt_failed(self, error: DialError, pause: float | None) -> None:
        if error.untrusted and not self.welcomed.is_set():
            raise FinalRefusal("untrusted", str(error))
        self._failures.tell(self._place(), error, pause)

    def _place(self) -> Place:
        return self._config.places[0]

    async def _dial(self, place: Place, number: int, on_way: Callable[[Way], None]) -> Way:
        """One attempt, at another of the place's addresses in each round."""
        config = self._config
        if self._authority is None and config.pin is not None:
            self._authority = await self._fetch_authority(place, config.pin)
        return await self._dial_place(
            place, ClientTrust(place.server_name, self._authority), number=number, on_way=on_way
        )

    async def _dial_place(
        self, place: Place, trust: ClientTrust, *, number: int = 0, on_way: Callable[[Way], None] = lambda way: None
    ) -> Way:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DIAL_TIME
        endpoints = await resolve(place.host, place.port, DIAL_TIME)
        failure = DialError("")
        for turn in range(len(endpoints)):
            endpoint = endpoints[(number + turn) % len(endpoints)]
            left = deadline - loop.time()
            if left <= 0:
                break
            try:
                way = await dial(self._engine, endpoint, trust, self, self._budget, timeout=left, on_way=on_way)
            except DialError as error:
                failure = error
                if error.untrusted:
                    break
                continue
            if way.link.closed is not None:
                raise DialError(str(way.link.closed))
            self._open_links.add(way.link)
            return way
        raise failure

    async def _introduce(self, link: Link, slot: Slot) -> Welcome:
        """Say hello on a new link. Raises DialError, _TryLater and FinalRefusal."""
        config = self._config
        hello = Hello(
            version=VERSION,
            tunnel=self.tunnel,
            session=self._session,
            token=config.token,
            link=slot.number,
            agent=f"quictunnel/{__version__}",
            capabilities=list(config.capabilities),
        )
        answer = await self._ask(link, hello)
        if link.closed is not None:
            # Its end came with the answer, and was told when nobody watched yet.
            raise DialError(f"the server closed the link: {link.closed}")
        match answer:
            case Welcome():
                try:
                    return _presentable(answer)
                except ValueError as error:
                    link.close(ErrorCode.FRAME_ERROR, "a welcome to nothing")
                    raise DialError(f"the server's welcome: {error}") from None
            case Refuse(final=True):
                raise _final(answer)
            case Refuse():
                raise _TryLater(answer.code, f"refused: {_line(answer.text)}", answer.retry_after)
            case _:
                link.close(ErrorCode.FRAME_ERROR, "no answer to hello")
                raise DialError(f"the server answered hello with {answer.type}")

    async def _ask(self, link: Link, message: ControlMessage) -> ControlMessage:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[ControlMessage] = loop.create_future()
        self._answers[link] = answer
        link.send_control(message)
        deadline = loop.time() + ANSWER_TIME
        try:
            while link.silent_for() <= SILENT_TIME and loop.time() <= deadline:
                await asyncio.wait((answer,), timeout=FAST_PING_EVERY)
                if answer.done():
                    return answer.result()
                link.ping()
            link.close(ErrorCode.REQUEST_TIMEOUT, "no answer on the control stream")
            raise DialError(f"the server did not answer within {ANSWER_TIME + loop.time() - deadline:.0f} s")
        except LinkClosed as why:
            raise DialError(f"the server closed the link: {why}") from None
        finally:
            self._answers.pop(link, None)
            answer.cancel()

    # Whom to trust

    async def _ask_for_certificates(self, place: Place) -> Authority:
        """What the server says of its certificates.

        This link is not verified, and nothing but the question goes over it: a pin proves the answer or nothing is
        believed of it.
        """
        way = await self._dial_place(place, ClientTrust(place.server_name, None, verify=False))
        try:
            answer = await self._ask(way.link, Authority())
        finally:
            way.link.close()
        if not isinstance(answer, Authority):
            raise DialError(f"the server answered the question for its CA with {answer.type}")
        return answer

    async def _fetch_authority(self, place: Place, pin: bytes) -> bytes:
        """The CA's certificate that the pin stands for; the next link is verified against it like any other."""
        answer = await self._ask_for_certificates(place)
        try:
            return pinned_authority(answer.certificate.encode(), pin, datetime.now(UTC))
        except TrustError as error:
            raise DialError(str(error), untrusted=True) from None

    async def _why_untrusted(self, place: Place, error: DialError) -> str:
        """What is wrong with the server's certificate: the QUIC libraries have one word for all that may be."""
        if self._authority is None and self._config.pin is not None:
            return str(error)  # the pin has said it
        try:
            shown = (await self._ask_for_certificates(place)).server
            der = ssl.PEM_cert_to_DER_cert(shown[: shown.index("-----END CERTIFICATE-----") + 26])
        except (DialError, ValueError):
            return str(error)
        return diagnose(der, place.server_name, self._authority, datetime.now(UTC))

    # What links tell

    def link_control(self, link: Link, message: ControlMessage) -> None:
        match message:
            case Welcome() | Refuse() | Authority():
                answer = self._answers.get(link)
                if answer is not None and not answer.done():
                    answer.set_result(message)
                elif isinstance(message, Refuse):
                    self._refused(link, message)
            case Grow():
                self._grow(message.links)
            case Drain():
                self._server_drains(link)
            case Hello() | Drained() | Health() | Unknown():
                logger.debug("< {!r}: unexpected {}", link, message.type)

    def link_request(self, link: Link, leg: StreamLeg, head: RequestHead) -> RequestHead:
        return self._fan_out.open_exchange(head, leg)

    def link_refused(self, link: Link) -> None:
        keeper = self._keepers.get(link)
        if keeper is not None:
            keeper.wake()

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        answer = self._answers.get(link)
        if answer is not None and not answer.done():
            answer.set_exception(why)
        keeper = self._keepers.pop(link, None)
        if keeper is not None:
            keeper.wake()
        if self.serving and not self._keepers:
            self.serving = False
            if not self._stopping:
                logger.warning("= the connection to the server was lost: {}", why)

    def link_terminated(self, link: Link) -> None:
        self._open_links.discard(link)

    def _welcome(self, keeper: Keeper, welcome: Welcome) -> None:
        self._slots[keeper.slot] = keeper
        self._keepers[keeper.link] = keeper
        if self._group is not None:
            self._group.create_task(keeper.tend(), name=f"keeper {keeper.slot.worker}.{keeper.slot.number}")
        # The name stays ours from now on, also if the server chose it.
        self.tunnel = welcome.tunnel
        first = not self.serving
        self.serving = True
        self.welcomed.set()
        if first:
            logger.info(
                "serving tunnel {} at {} from {}", welcome.tunnel, ", ".join(welcome.urls), self._fan_out.backend.name
            )
            if self._on_welcome is not None:
                self._on_welcome(welcome)

    def _server_drains(self, link: Link) -> None:
        logger.info("= the server is draining")
        link.draining = True
        keeper = self._keepers.get(link)
        if keeper is not None:
            keeper.leaving = True
            keeper.look()

    def _refused(self, link: Link, refuse: Refuse) -> None:
        logger.error("= the server ended the session: {}", _line(refuse.text))
        # Its last word, whatever it adds: a server may say it as often as it likes.
        link.close()
        if refuse.final and self._group is not None and not self._stopping:
            self._stopping = True
            self._group.create_task(self._give_up(_final(refuse)))

    async def _give_up(self, refusal: FinalRefusal) -> None:
        raise refusal

    def _grow(self, links: int) -> None:
        self._wanted = max(1, min(links, self._config.max_links))
        self._fill_slots()
        for slot, keeper in self._slots.items():
            if keeper is not None and not self._is_wanted(slot):
                keeper.look()


class _Failures:
    """Why the server cannot be reached, said often at first and then now and then."""

    def __init__(self) -> None:
        self._told = 0
        self._told_at = 0.0

    def forget(self) -> None:
        """The server was reached."""
        self._told = 0

    def tell(self, place: Place, why: Exception, pause: float | None) -> None:
        now = asyncio.get_running_loop().time()
        loud = self._told < _LOUD_FAILURES or now - self._told_at >= LONGEST_RETRY
        if loud:
            self._told += 1
            self._told_at = now
        following = "another try is under way" if pause is None else f"next try in {pause:.1f} s"
        logger.log("WARNING" if loud else "DEBUG", "cannot reach the server at {}: {}; {}", place, why, following)


# What a server says goes to terminals and to scripts that read them.


def _presentable(welcome: Welcome) -> Welcome:
    """The welcome with a name that is one, and of its URLs those that are a word. Raises ValueError."""
    words = [url for url in welcome.urls if url.isascii() and url.isprintable() and " " not in url]
    return replace(
        welcome, tunnel=normalise_tunnel_name(welcome.tunnel), urls=[url for url in words[:8] if len(url) <= _SHOWN]
    )


def _line(text: str) -> str:
    return escape(text[:_SHOWN])


def _final(refuse: Refuse) -> FinalRefusal:
    return FinalRefusal(_line(refuse.code), _line(refuse.text))
