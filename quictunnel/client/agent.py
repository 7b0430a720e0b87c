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
from math import inf
from typing import Final, NamedTuple

from loguru import logger

from quictunnel import __version__
from quictunnel.client.fan_out import FanOut
from quictunnel.client.health import HealthCheck
from quictunnel.client.keeper import FAST_PING_EVERY, Keeper, Slot
from quictunnel.client.reach import LONGEST_RETRY, QUICK_FOR, QUICK_RETRY, Backoff, Place, Race
from quictunnel.log import escape
from quictunnel.quic.attention import Attention
from quictunnel.quic.dial import DialError, Way, dial, resolve
from quictunnel.quic.engine import ClientTrust, Engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.sockets import settle
from quictunnel.quic.stream import StreamLeg
from quictunnel.quic.tickets import Tickets
from quictunnel.trust.files import TrustError
from quictunnel.trust.pins import pinned_authority
from quictunnel.wire.control import (
    PROBE_CAPABILITY,
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
from quictunnel.wire.names import made_up_word, normalise_tunnel_name

__all__ = ["Agent", "AgentConfig", "FinalRefusal"]

DIAL_TIME: Final = 5.0
ANSWER_TIME: Final = 10.0
SILENT_TIME: Final = 2.0
"seconds: that an attempt lives, that an answer on a new link may take, and that a new link may be silent meanwhile"

WHOLE_TIME: Final = 2.0
"seconds that a server's other processes may take to welcome a session that one of them has welcomed"

EARLY_LIMIT: Final = 16
"messages that may come with a welcome"

WORKERS: Final = 256
"processes of one server, at most: their number is told by one byte"

TICKETS: Final = 512
"for each address of a server and each of its processes one"

STRAYS_PER_WORKER: Final = 4
"links that come to another process than the one that was meant, before the next one waits"

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
    "QUIC connections; a server of several processes has one to each in any case"

    capabilities: tuple[str, ...] = ()
    "words of the protocol for what this client takes beyond plain requests"

    others: tuple[Place, ...] = ()
    "servers that are dialled when the first one cannot be reached or drains, in this order"

    hosts: tuple[str, ...] = ()
    "custom hosts beside the name, in their one form"

    weight: int = 1
    sticky: str = ""

    @property
    def places(self) -> list[Place]:
        """The servers, in the order in which they are dialled."""
        return [Place(self.host, self.port, self.server_name), *self.others]


class _Before(NamedTuple):
    config: AgentConfig
    session: str
    authority: bytes | None
    at: int


class Agent(LinkOwner):
    """One session of a tunnel."""

    def __init__(
        self,
        config: AgentConfig,
        engine: Engine,
        fan_out: FanOut,
        *,
        budget: WindowBudget | None = None,
        health: HealthCheck | None = None,
        on_welcome: Callable[[Welcome], None] | None = None,
    ) -> None:
        """``budget`` is what receive windows grow out of; ``health`` is run as long as the agent is.

        ``on_welcome`` is called each time the session comes to be served, with what the server said.
        """
        self._config = config
        self._engine = engine
        self._fan_out = fan_out
        self._on_welcome = on_welcome
        self._health = health
        self._checking: asyncio.Task[None] | None = None
        self._unwell: Health | None = None  # what the servers were told of the backend, if it is not well
        self._budget = budget or WindowBudget(DEFAULT_BUDGET)
        # Who knows this id is this session: it replaces its own ghost by it, so it is as good as a secret.
        self._session = secrets.token_urlsafe(24)
        self._authority = config.authority
        self._before: _Before | None = None  # what to go back to until other options are welcomed
        self._keepers: dict[Link, Keeper] = {}  # of every link that was welcomed and is not closed
        self._slots: dict[Slot, Keeper] = {}  # who has it, good or not
        self._watchers: dict[Slot, asyncio.Task[None]] = {}
        self._open_links: set[Link] = set()  # those whose sockets are open, a moment longer than the links
        self._answers: dict[Link, asyncio.Future[ControlMessage]] = {}
        self._workers = 1  # processes of the server, as far as is known
        self._early: dict[Link, list[ControlMessage]] = {}  # said before the answer was looked at
        self._wanted: dict[int, int] = {}  # how many links each of them wants, if it has said
        self._tickets = Tickets(TICKETS)
        self._attention = Attention()
        self._at = 0  # which of the servers this session is with
        self._untrusted: set[Place] = set()
        self._alone = asyncio.Lock()
        self._failures = _Failures()
        self._welcome_by: float | None = None  # when a session without a link to each process is announced
        self._announcing: asyncio.TimerHandle | None = None
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self._alarmed_at = 0.0  # when an answer was missing on one of the links
        self.tunnel = config.tunnel
        self.welcomed = asyncio.Event()  # there has been a welcome
        self.serving = False

    @property
    def links(self) -> list[Link]:
        """Every link that was welcomed and is not closed."""
        return list(self._keepers)

    @property
    def authority(self) -> bytes | None:
        """The CA's certificate (PEM) that the server's came from; None: the system's CAs, or no link was made yet."""
        return self._authority

    @property
    def name_is_made_up(self) -> bool:
        """Whether the server has given a name that is this session's alone, and not one that its token stands for."""
        return made_up_word(self._session) in self.tunnel

    # The agent's life

    async def run(self) -> None:
        """Serve until ``stop``. Raises FinalRefusal when the server will never have this client."""
        self._attention.start()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._check_health(self._health)
                self._fill_slots()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._group = None
            self._attention.close()
            for link in list(self._open_links):
                link.close(ErrorCode.NO_ERROR, "the client stops")
                link.abandon(LinkClosed(0, ""))
            await settle()

    async def stop(self, grace: float) -> None:
        """Take nothing new, finish what is under way within ``grace`` seconds, and leave."""
        self._stopping = True
        for watcher in list(self._watchers.values()):
            watcher.cancel()
        self._check_health(None)
        deadline = asyncio.get_running_loop().time() + grace
        await asyncio.gather(*(keeper.part(deadline) for keeper in list(self._keepers.values())))

    def reconfigure(self, config: AgentConfig, health: HealthCheck | None) -> None:
        """Go on by another configuration, with nothing lost: a session of its own is begun, this one's links drain.

        If the server will never have it, the error is logged and all goes on as before.
        """
        if self._stopping:
            return
        if health is None:
            self._say_health(True, "")
        self._health = health
        self._check_health(health)
        if config == self._config:
            return
        if self._before is None and self.serving:
            self._before = _Before(self._config, self._session, self._authority, self._at)
        if (config.authority, config.pin) != (self._config.authority, self._config.pin):
            self._authority = config.authority
            self._tickets.clear()
        if config.places != self._config.places:
            self._at = 0
        self._config = config
        self._session = secrets.token_urlsafe(24)
        self._untrusted.clear()
        for keeper in self._keepers.values():
            keeper.leaving = keeper.outdated = True
            keeper.look()

    def _revert(self, refusal: FinalRefusal) -> bool:
        """Take back what the server refuses, if there is something to go back to."""
        before, self._before = self._before, None
        if before is None or not self._keepers:
            return False
        logger.error("= the server refuses the new options, the old ones stay: {}", refusal)
        self._config, self._session, self._authority, self._at = before
        self._tickets.clear()
        for keeper in self._keepers.values():
            keeper.leaving, keeper.outdated = keeper.link.draining, False
        return True

    # The backend's health

    def _check_health(self, health: HealthCheck | None) -> None:
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None
        if health is not None and self._group is not None:
            self._checking = self._group.create_task(health.run(self._say_health), name="health check")

    def _say_health(self, well: bool, why: str) -> None:
        message = Health(well, why[:_SHOWN])
        before, self._unwell = self._unwell, None if well else message
        if not well or before is not None:  # who has said nothing counts as well
            for link in self.links:
                link.send_control(message)

    # One watcher for each slot

    def _fill_slots(self) -> None:
        for worker in range(self._workers):
            for number in range(self._wanted.get(worker, 1)):
                slot = Slot(worker, number)
                if slot not in self._watchers and self._group is not None and not self._stopping:
                    watcher = self._group.create_task(self._watch(slot), name=f"link {worker}.{number}")
                    self._watchers[slot] = watcher
                    watcher.add_done_callback(partial(self._watcher_done, slot))

    def _watcher_done(self, slot: Slot, watcher: asyncio.Task[None]) -> None:
        del self._watchers[slot]

    def _is_wanted(self, slot: Slot) -> bool:
        return slot.worker < self._workers and slot.number < self._wanted.get(slot.worker, 1) and not self._stopping

    def _is_served(self) -> bool:
        return any(keeper.good and self._is_wanted(slot) for slot, keeper in self._slots.items())

    async def _watch(self, slot: Slot) -> None:
        """See to it that the slot has a link, for as long as it is wanted."""
        loop = asyncio.get_running_loop()
        refusals, drains = Backoff(), Backoff(loop.time, quick_for=QUICK_FOR)
        strays = drained = 0
        while self._is_wanted(slot):
            keeper = self._slots.get(slot)
            if keeper is not None and keeper.good:
                strays = drained = 0
                await keeper.changed()
                continue
            if keeper is not None and keeper.link.closed is not None:
                del self._slots[slot]
                if loop.time() - keeper.since > LONGEST_RETRY:
                    refusals.reset()
                    drains.reset()
                else:
                    # Whoever is thrown out soon after each welcome must not dial in a rush.
                    await asyncio.sleep(refusals.delay())
                continue
            try:
                opened = await self._fill(slot, keeper)
                if opened is not None and opened.slot != slot:
                    # Another process took it than the one that was meant. Where packets are not steered chance does it.
                    strays += 1
                    if strays > STRAYS_PER_WORKER * self._workers:
                        await asyncio.sleep(refusals.delay())
            except DialError as error:
                await self._wait(refusals.delay(), error)
            except _TryLater as error:
                if error.code != "draining":
                    await self._wait(min(max(refusals.delay(), error.retry_after or 0.0), LONGEST_RETRY), error)
                    continue
                drained += 1
                if drained % len(self._config.places) == 0:  # all of them, if there are several
                    await self._wait(max(drains.delay(), QUICK_RETRY / 2), error)
            except FinalRefusal as refusal:
                if not self._revert(refusal):
                    raise
            except Exception as error:
                # A fault of ours must not do what no network can: end the client.
                logger.opt(exception=error).error("link {}: {!r}", slot.number, error)
                await self._wait(refusals.delay(), error)

    async def _wait(self, delay: float, why: Exception) -> None:
        self._failures.tell(self._place(), why, delay)
        await asyncio.sleep(delay)

    async def _fill(self, slot: Slot, before: Keeper | None) -> Keeper | None:
        """Have a new link in the slot, unless the one before is heard again. Raises what ``_open`` does."""
        if not self._is_served():
            # While there is none at all, one of them looks for the server, or a session of many links would come down
            # on a server that has just come back.
            async with self._alone:
                if not self._is_served():
                    return await self._open(slot, before, alone=True)
            if not self._is_wanted(slot) or ((now := self._slots.get(slot)) is not None and now.good):
                return None
        return await self._open(slot, before)

    # A new link

    async def _open(self, slot: Slot, before: Keeper | None, *, alone: bool = False) -> Keeper | None:
        """A new link that the server has welcomed, in the slot that it is for. Raises DialError and refusals.

        None if none is needed any more, or if, with others beside this one, only one may look for the server.
        """
        healed = before.healed if before is not None and before.suspect else None
        way, place = await self._reach(slot, healed, alone)
        if way is None:
            return None
        session = self._session
        try:
            welcome = await self._introduce(way.link, slot)
        except BaseException as error:
            self._early.pop(way.link, None)
            if way.link.closed is None:
                way.link.close(ErrorCode.NO_ERROR, "")
            if isinstance(error, _TryLater) and error.code == "draining":
                self._go_on_from(place)
            raise
        keeper = Keeper(way, place, Slot(welcome.worker, slot.number))
        if session != self._session:
            keeper.leaving = keeper.outdated = True  # other options have come meanwhile
        else:
            self._before = None
        self._welcome(keeper, welcome)
        return keeper

    async def _reach(self, slot: Slot, healed: "asyncio.Future[None] | None", alone: bool) -> tuple[Way | None, Place]:
        """A way to a server, verified; none as for ``_open``. Raises FinalRefusal."""
        loop = asyncio.get_running_loop()
        reached: dict[Way, Place] = {}

        async def attempt(place: Place, number: int, on_way: Callable[[Way], None]) -> Way:
            try:
                way = await self._dial(place, slot, number, on_way)
            except DialError as error:
                if error.untrusted:
                    self._untrusted.add(place)
                    raise DialError(await self._why_untrusted(place, error), untrusted=True) from None
                raise DialError(f"{place}: {error}" if self._config.others else str(error)) from None
            reached[way] = place
            return way

        race = Race(Backoff(loop.time, quick_for=QUICK_FOR), self._attempt_failed)
        way = await race.run(lambda: self._places(slot, alone), attempt, healed or loop.create_future())
        self._failures.forget()
        if way is None:
            return None, self._place()
        place = reached[way]
        self._at = self._config.places.index(place)
        return way, place

    def _attempt_failed(self, error: DialError, pause: float | None) -> None:
        if error.untrusted and not self.welcomed.is_set() and self._untrusted >= set(self._config.places):
            raise FinalRefusal("untrusted", str(error))
        self._failures.tell(self._place(), error, pause)

    def _place(self) -> Place:
        """The server that this session is with."""
        return self._config.places[self._at]

    def _places(self, slot: Slot, alone: bool) -> list[Place]:
        """Where a new link may go: where the others are; without any to every server in turn, if ``alone``."""
        if not self._is_wanted(slot):
            return []
        places = self._config.places
        if self._is_served():
            return [places[self._at]]
        return places[self._at :] + places[: self._at] if alone else []

    def _go_on_from(self, place: Place) -> None:
        """That server drains: look at the next one first."""
        if place == self._place():
            self._at = (self._at + 1) % len(self._config.places)

    async def _dial(self, place: Place, slot: Slot, number: int, on_way: Callable[[Way], None]) -> Way:
        """One attempt, at another of the place's addresses in each round."""
        config = self._config
        if self._authority is None and config.pin is not None:
            self._authority = await self._fetch_authority(place, config.pin)
        trust = ClientTrust(place.server_name, self._authority)
        worker = (slot.worker, self._workers) if self._workers > 1 else None
        return await self._dial_place(place, trust, worker, number, on_way)

    async def _dial_place(
        self,
        place: Place,
        trust: ClientTrust,
        worker: tuple[int, int] | None = None,
        number: int = 0,
        on_way: Callable[[Way], None] = lambda way: None,
    ) -> Way:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DIAL_TIME
        endpoints = await resolve(place.host, place.port, DIAL_TIME)
        failure = DialError(f"no answer within {DIAL_TIME:g} s")
        for turn in range(len(endpoints)):
            endpoint = endpoints[(number + turn) % len(endpoints)]
            left = deadline - loop.time()
            if left <= 0:
                break
            try:
                way = await dial(
                    self._engine,
                    endpoint,
                    trust,
                    self,
                    self._budget,
                    timeout=left,
                    worker=worker,
                    tickets=self._tickets,
                    attention=self._attention,
                    on_way=on_way,
                )
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
            capabilities=[PROBE_CAPABILITY, *config.capabilities],
            hosts=list(config.hosts),
            weight=config.weight,
            sticky=config.sticky,
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
        self._early[link] = []
        link.send_control(message)
        began = loop.time()
        try:
            while link.silent_for() <= SILENT_TIME and loop.time() - began <= ANSWER_TIME:
                await asyncio.wait((answer,), timeout=FAST_PING_EVERY)
                if answer.done():
                    return answer.result()
                link.ping()
            link.close(ErrorCode.REQUEST_TIMEOUT, "no answer on the control stream")
            raise DialError(f"the server did not answer within {loop.time() - began:.0f} s")
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
            self._early.pop(way.link, None)
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
        # Loaded by who has to explain: what reads certificates is large.
        from quictunnel.trust.certificates import diagnose

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
            case Hello() | Health() | Unknown():
                logger.debug("< {!r}: unexpected {}", link, message.type)
            case _ if link in self._keepers:
                self._told(self._keepers[link], message)
            case _ if link in self._answers and len(self._early[link]) < EARLY_LIMIT:
                self._early[link].append(message)  # it came with the welcome, which is about to be looked at

    def _told(self, keeper: Keeper, message: ControlMessage) -> None:
        match message:
            case Grow():
                self._grow(keeper.slot.worker, message.links)
            case Drain():
                self._server_drains(keeper, message.again)
            case Drained():
                keeper.drained = message.streams

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
        if not self._keepers:
            if self._announcing is not None:
                self._announcing.cancel()
                self._announcing = self._welcome_by = None
            if self.serving:
                self.serving = False
                if not self._stopping:
                    logger.warning("= the connection to the server was lost: {}", why)

    def link_terminated(self, link: Link) -> None:
        self._open_links.discard(link)

    def _welcome(self, keeper: Keeper, welcome: Welcome) -> None:
        replaced = self._slots.get(keeper.slot)
        self._slots[keeper.slot] = keeper
        self._keepers[keeper.link] = keeper
        keeper.beside = lambda: len(self._keepers) // self._workers
        keeper.heard_beside = partial(self._heard_beside, keeper)
        keeper.on_missing = partial(self._missing, keeper)
        if self._group is not None:
            self._group.create_task(keeper.tend(), name=f"keeper {keeper.slot.worker}.{keeper.slot.number}")
        if replaced is not None:
            replaced.look()
        self.tunnel = welcome.tunnel  # it stays ours from now on, also if the server chose it
        if welcome.workers != self._workers:
            logger.debug("= the server has {} processes", welcome.workers)
            self._workers = welcome.workers
            self._fill_slots()
            self._look_at_unwanted()
        if self._unwell is not None:
            keeper.link.send_control(self._unwell)
        self._part_outdated()
        if not self.serving:
            self._announce_when_whole(welcome)
        for message in self._early.pop(keeper.link, ()):
            self._told(keeper, message)

    def _heard_beside(self, keeper: Keeper) -> float:
        """When another link to the same process was heard last."""
        return max(
            (
                each.link.heard_at
                for each in self._keepers.values()
                if each is not keeper and (each.place, each.slot.worker) == (keeper.place, keeper.slot.worker)
            ),
            default=0.0,
        )

    def _missing(self, keeper: Keeper) -> None:
        """An answer is missing on a link: if it is the server that is gone, it is so on the others."""
        now = asyncio.get_running_loop().time()
        if now - self._alarmed_at < FAST_PING_EVERY:
            return  # they have been told
        self._alarmed_at = now
        for each in self._keepers.values():
            if each is not keeper and (each.place, each.slot.worker) == (keeper.place, keeper.slot.worker):
                each.alarm()

    def _announce_when_whole(self, welcome: Welcome) -> None:
        """Say that the session is served: when each process of the server has a link, or soon in any case."""
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        missing = [worker for worker in range(self._workers) if Slot(worker, 0) not in self._slots]
        if not missing:
            self._announce(welcome)
            return
        loop = asyncio.get_running_loop()
        if self._welcome_by is None:
            self._welcome_by = loop.time() + WHOLE_TIME
        self._announcing = loop.call_at(self._welcome_by, self._announce, welcome)

    def _announce(self, welcome: Welcome) -> None:
        self._announcing = self._welcome_by = None
        self.serving = True
        self.welcomed.set()
        logger.info(
            "serving tunnel {} at {} from {}", welcome.tunnel, ", ".join(welcome.urls), self._fan_out.backend.name
        )
        if self._on_welcome is not None:
            self._on_welcome(welcome)

    def _server_drains(self, keeper: Keeper, again: bool) -> None:
        # Its visitors may still ask for something: the link is the server's to close.
        keeper.link.draining = True
        if not keeper.leaving:
            logger.info("= the server at {} drains: dialling anew", keeper.place)
            if not again:
                self._go_on_from(keeper.place)
            keeper.leaving = True
            keeper.look()

    def _part_outdated(self) -> None:
        """Now that others take their place: links of other options finish what is under way on them."""
        for keeper in list(self._keepers.values()):
            if keeper.outdated and not keeper.parting and self._group is not None and self._is_served():
                self._group.create_task(keeper.part(inf))

    def _refused(self, link: Link, refuse: Refuse) -> None:
        keeper = self._keepers.get(link)
        was_left = keeper is not None and keeper.outdated
        logger.error("= the server ended the session: {}", _line(refuse.text))
        # Its last word, whatever it adds: a server may say it as often as it likes.
        link.close()
        if refuse.final and not was_left and self._group is not None and not self._stopping:
            self._stopping = True
            self._group.create_task(self._give_up(_final(refuse)))

    async def _give_up(self, refusal: FinalRefusal) -> None:
        raise refusal

    def _grow(self, worker: int, links: int) -> None:
        most = max(1, self._config.max_links // self._workers)
        self._wanted[worker] = max(1, min(links, most))
        self._fill_slots()
        self._look_at_unwanted()

    def _look_at_unwanted(self) -> None:
        """Have their watchers end; the links themselves are the server's to close."""
        for slot, keeper in self._slots.items():
            if not self._is_wanted(slot):
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
    if not 0 <= welcome.worker < welcome.workers <= WORKERS:
        raise ValueError(f"process {welcome.worker} of {welcome.workers}")
    return replace(
        welcome, tunnel=normalise_tunnel_name(welcome.tunnel), urls=[url for url in words[:8] if len(url) <= _SHOWN]
    )


def _line(text: str) -> str:
    return escape(text[:_SHOWN])


def _final(refuse: Refuse) -> FinalRefusal:
    return FinalRefusal(_line(refuse.code), _line(refuse.text))
